"""Linear layers without an activation: the definition in float64 is the truth."""

import pytest
import torch
from contracting import IMAGES, LOW, Contract, floor, in_double
from measures import error, relative_error
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

EVERY_SIZE = pytest.mark.parametrize(
    ("tokens", "inner", "columns"), [(1, 1, 1), (2, 33, 65), (9, 104, 136), (50, 96, 384), (3, 600, 2100)]
)
EITHER_BIAS = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])


class LinearContract(Contract):
    """``linear``, ``add_linear``, ``linear_unrounded``."""

    def draw_linear(
        self, tokens: int, inner: int, columns: int, dtype: torch.dtype, with_bias: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = (
            self.draw(6, IMAGES, tokens, inner, dtype=dtype),
            self.draw(7, columns, inner) * max(inner, 1) ** -0.5,
        )
        return x, weight.to(dtype), self.draw(8, columns, dtype=dtype) if with_bias else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, weight, bias, backend=self.backend)

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear(*in_double(x, weight), None if bias is None else bias.double())

    def float32_bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        """The largest error of a float32 product."""
        return OP_FLOAT32

    @EVERY_SIZE
    @EITHER_BIAS
    def test_linear(self, tokens: int, inner: int, columns: int, with_bias: bool) -> None:
        arguments = self.draw_linear(tokens, inner, columns, torch.float32, with_bias)
        have = self.linear(*arguments)
        assert have.dtype == torch.float32
        assert have.is_contiguous()
        assert relative_error(have, self.expected(*arguments)) <= self.float32_bound(*arguments)

    @EVERY_SIZE
    @EITHER_BIAS
    @pytest.mark.parametrize("dtype", LOW)
    def test_linear_in_low_precision(
        self, tokens: int, inner: int, columns: int, with_bias: bool, dtype: torch.dtype
    ) -> None:
        arguments = self.draw_linear(tokens, inner, columns, dtype, with_bias)
        have, expected = self.linear(*arguments), self.expected(*arguments)
        assert have.dtype == dtype
        assert have.is_contiguous()
        assert error(have, expected) <= LOW_PRECISION_FACTOR * error(reference.linear(*arguments), expected) + floor(
            expected
        )

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW])
    def test_linear_of_any_strides(self, dtype: torch.dtype) -> None:
        x, weight, bias = self.draw_linear(9, 33, 95, dtype)
        assert bias is not None
        expected = self.expected(x, weight, bias)
        limit = LOW_PRECISION_FACTOR * error(reference.linear(x, weight, bias), expected) + floor(expected)
        wide = x.new_full((IMAGES, 9, 41), torch.nan)
        apart = x.new_full((IMAGES, 33, 9), torch.nan).transpose(1, 2)
        for view in (wide[..., 3:36], apart):
            view.copy_(x)
            assert error(self.linear(view, weight, bias), expected) <= limit
        assert error(self.linear(wide[:, 0, 3:36], weight, bias), expected[:, 0]) <= limit
        assert error(self.linear(x[0, 0], weight, bias), expected[0, 0]) <= limit
        bias_apart = torch.stack([bias, bias], 1)[:, 0]
        assert error(self.linear(x, weight.t().contiguous().t(), bias_apart), expected) <= limit
        assert error(self.linear(x, torch.cat([weight, weight], 1)[:, :33], bias), expected) <= limit

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear_of_nothing(self, dtype: torch.dtype) -> None:
        x, weight, bias = self.draw_linear(9, 80, 96, dtype)
        assert bias is not None
        assert self.linear(x[:0], weight, bias).shape == (0, 9, 96)
        assert self.linear(x[:, :0], weight, None).shape == (IMAGES, 0, 96)
        assert self.linear(x, weight[:0], bias[:0]).shape == (IMAGES, 9, 0)
        assert torch.equal(self.linear(x[..., :0], weight[:, :0], bias), bias.expand(IMAGES, 9, 96))
        assert torch.equal(
            self.linear(x[..., :0], weight[:, :0], None), torch.zeros_like(x[..., :1]).expand(-1, -1, 96)
        )

    def test_linear_in_float64(self) -> None:
        arguments = self.draw_linear(3, 16, 24, torch.float64)
        have = self.linear(*arguments)
        assert have.dtype == torch.float64
        assert relative_error(have, self.expected(*arguments)) <= 1e-14

    # ------------------------------------------------------------------------------- added to the residual stream

    def draw_added(self, tokens: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        h, weight, _ = self.draw_linear(tokens, inner, columns, dtype)
        return self.draw(14, IMAGES, tokens, columns, dtype=dtype), h, weight

    @EVERY_SIZE
    def test_add_linear(self, tokens: int, inner: int, columns: int) -> None:
        x, h, weight = self.draw_added(tokens, inner, columns, torch.float32)
        expected = reference.add_linear(*in_double(x, h, weight))
        before = [tensor.clone() for tensor in (h, weight)]
        assert ops.add_linear(x, h, weight, backend=self.backend) is None  # type: ignore[func-returns-value]
        assert relative_error(x, expected) <= OP_FLOAT32
        assert all(torch.equal(now, then) for now, then in zip((h, weight), before, strict=True))

    @EVERY_SIZE
    @pytest.mark.parametrize("dtype", LOW)
    def test_add_linear_rounds_once(self, tokens: int, inner: int, columns: int, dtype: torch.dtype) -> None:
        """The product is not rounded before it meets the stream."""
        x, h, weight = self.draw_added(tokens, inner, columns, dtype)
        expected = reference.add_linear(*in_double(x, h, weight))
        ops.add_linear(x, h, weight, backend=self.backend)
        assert error(x, expected) <= error(expected.to(dtype), expected) + floor(expected)

    def test_add_linear_of_any_strides(self) -> None:
        x, h, weight = self.draw_added(9, 33, 95, torch.float32)
        expected = reference.add_linear(*in_double(x, h, weight))
        wide = h.new_full((IMAGES, 9, 41), torch.nan)
        wide[..., 3:36] = h
        for view in (wide[..., 3:36], h.transpose(1, 2).contiguous().transpose(1, 2)):
            for factor in (weight, weight.t().contiguous().t()):
                stream = x.clone()
                ops.add_linear(stream, view, factor, backend=self.backend)
                assert relative_error(stream, expected) <= OP_FLOAT32
        with pytest.raises(ValueError, match=r"^x is not contiguous$"):
            ops.add_linear(x.transpose(0, 1).contiguous().transpose(0, 1), h, weight, backend=self.backend)

    def test_add_linear_of_nothing(self) -> None:
        x, h, weight = self.draw_added(9, 80, 96, torch.bfloat16)
        before = x.clone()
        ops.add_linear(x, h[..., :0], weight[:, :0], backend=self.backend)
        assert torch.equal(x, before)
        ops.add_linear(x[:0], h[:0], weight, backend=self.backend)

    def test_add_linear_in_float64(self) -> None:
        x, h, weight = self.draw_added(3, 16, 24, torch.float64)
        expected = reference.add_linear(x, h, weight)
        ops.add_linear(x, h, weight, backend=self.backend)
        assert relative_error(x, expected) <= 1e-14

    # --------------------------------------------------------------------------------------- in full precision

    @EVERY_SIZE
    @pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *LOW])
    def test_linear_unrounded(self, tokens: int, inner: int, columns: int, dtype: torch.dtype) -> None:
        _, weight, bias = self.draw_linear(1, inner, columns, dtype)
        assert bias is not None
        x = self.draw(6, tokens, inner, dtype=dtype)
        have = ops.linear_unrounded(x, weight, bias, backend=self.backend)
        assert have.dtype == torch.float32
        assert have.is_contiguous()
        assert relative_error(have, reference.linear(*in_double(x, weight, bias))) <= OP_FLOAT32

    def test_linear_unrounded_of_nothing(self) -> None:
        _, weight, bias = self.draw_linear(1, 80, 96, torch.bfloat16)
        assert bias is not None
        x = self.draw(6, 3, 80, dtype=torch.bfloat16)
        assert ops.linear_unrounded(x[:0], weight, bias, backend=self.backend).shape == (0, 96)
        alone = ops.linear_unrounded(x[:, :0], weight[:, :0], bias, backend=self.backend)
        assert torch.equal(alone, bias.float().expand(3, 96))

    def test_linear_unrounded_in_float64(self) -> None:
        _, weight, bias = self.draw_linear(1, 16, 24, torch.float64)
        assert bias is not None
        x = self.draw(6, 3, 16, dtype=torch.float64)
        have = ops.linear_unrounded(x, weight, bias, backend=self.backend)
        assert have.dtype == torch.float64
        assert relative_error(have, reference.linear(x, weight, bias)) <= 1e-14
