"""What every backend must do: the definition in float64 is the truth, whatever the backend, dtype or strides."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from measures import error, relative_error
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference
from clipfast.kernels.dispatch import BACKENDS

IMAGES, HEADS, WIDTH = 3, 2, 48  # an odd batch
SHAPES = [pytest.param(n, e, id=f"N{n}-E{e}") for n, e in product((1, 2, 17, 50, 197), (64, 80, 104))]
COLUMNS = (1, 3, 100)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_weighted_values(tokens: int, head_dim: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha`` and ``basis`` in float32 and ``value`` in ``dtype``, with the strides that a layer's values have."""
    alpha = draw(1, IMAGES, HEADS, tokens).softmax(-1)
    value = draw(2, IMAGES, tokens, 3, HEADS, head_dim, dtype=dtype)[:, :, 2]
    return alpha, value, draw(3, HEADS, head_dim, columns)


def in_double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def floor(expected: Tensor) -> float:
    """Where the low-precision definition happens to be exact, a backend may still round in float32."""
    return OP_FLOAT32 * float(expected.abs().max())


class OpsContract:
    """Inherited by one class per backend, which names it."""

    backend: str

    @pytest.fixture(autouse=True)
    def _runs_here(self) -> None:
        refused = next(backend for backend in BACKENDS if backend.name == self.backend).refusals()
        if refused:
            pytest.skip(f"{self.backend}: {', '.join(refused)}")

    @pytest.fixture(autouse=True)
    def _poisoned(self) -> Iterator[None]:
        """Memory that nobody wrote is NaN, so that reading it shows."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            assert torch.empty(8).isnan().all(), "uninitialised memory is not poisoned"
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(deterministic)

    def attention(self, qkv: Tensor, row: reference.Row | None) -> tuple[Tensor, Tensor | None]:
        return ops.attention(qkv, row, backend=self.backend)

    # ---------------------------------------------------------------------------------------------- attention

    @pytest.mark.parametrize("row", ["cls", "mean"])
    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_attention(self, tokens: int, head_dim: int, row: reference.Row) -> None:
        qkv = draw(0, IMAGES, tokens, 3, HEADS, head_dim)
        if row == "mean" and tokens == 1:
            with pytest.raises(ValueError, match="no token but the first"):
                self.attention(qkv, row)
            return
        out, alpha = self.attention(qkv, row)
        want_out, want_alpha = reference.attention(qkv.double(), row)
        assert out.dtype == alpha.dtype == torch.float32
        assert relative_error(out, want_out) <= OP_FLOAT32
        assert relative_error(alpha, want_alpha) <= OP_FLOAT32

    def test_attention_without_weights(self) -> None:
        qkv = draw(0, IMAGES, 17, 3, HEADS, 64)
        out, alpha = self.attention(qkv, None)
        assert alpha is None
        assert relative_error(out, reference.attention(qkv.double())[0]) <= OP_FLOAT32

    @pytest.mark.parametrize("row", ["cls", "mean"])
    @pytest.mark.parametrize("order", [(0, 2, 3, 1, 4), (0, 3, 1, 2, 4), (2, 1, 0, 3, 4), (0, 1, 2, 3, 4)])
    def test_attention_of_any_strides(self, order: tuple[int, ...], row: reference.Row) -> None:
        """The last axis is contiguous, the others lie in memory in any order, with gaps."""
        contiguous = draw(0, IMAGES, 17, 3, HEADS, 64)
        wide = contiguous.new_full([*(contiguous.shape[axis] for axis in order[:-1]), 72], torch.nan)
        wide[..., :64] = contiguous.permute(order)
        qkv = wide[..., :64].permute([order.index(axis) for axis in range(5)])
        assert torch.equal(qkv, contiguous)
        assert not qkv.is_contiguous()
        for have, want in zip(self.attention(qkv, row), reference.attention(contiguous.double(), row), strict=True):
            assert relative_error(have, want) <= OP_FLOAT32

    @pytest.mark.parametrize("row", ["cls", "mean"])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_attention_with_extreme_logits(self, row: reference.Row, sign: int) -> None:
        """Logits of ±10⁴ − n: exact in float32 because head_dim 64 scales by 1/8; exp() of them overflows."""
        qkv = draw(0, IMAGES, 6, 3, HEADS, 64)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0] = 8
        qkv[:, :, 1, :, 0] = sign * 1e4 - torch.arange(6.0)[:, None]
        out, alpha = self.attention(qkv, row)
        geometric = torch.exp(-torch.arange(6.0, dtype=torch.float64))
        assert relative_error(alpha, (geometric / geometric.sum()).expand(IMAGES, HEADS, 6)) <= OP_FLOAT32
        assert relative_error(out, reference.attention(qkv.double(), row)[0]) <= OP_FLOAT32

    @pytest.mark.parametrize("row", ["cls", "mean"])
    def test_attention_that_is_all_on_one_token(self, row: reference.Row) -> None:
        qkv = draw(0, IMAGES, 6, 3, HEADS, 64)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0] = 8
        qkv[:, :, 1, :, 0] = -1e4
        qkv[:, 4, 1, :, 0] = 1e4
        out, alpha = self.attention(qkv, row)
        assert torch.equal(alpha, torch.eye(6)[4].expand_as(alpha))
        assert error(out, qkv[:, 4:5, 2].expand_as(out)) == 0

    @pytest.mark.parametrize("row", ["cls", "mean"])
    @pytest.mark.parametrize("head_dim", [64, 80, 104])
    def test_attention_in_bfloat16(self, head_dim: int, row: reference.Row) -> None:
        qkv = draw(0, IMAGES, 50, 3, HEADS, head_dim, dtype=torch.bfloat16)
        have = self.attention(qkv, row)
        assert have[0].dtype == torch.bfloat16
        assert have[1].dtype == torch.float32
        for got, plain, want in zip(
            have, reference.attention(qkv, row), reference.attention(qkv.double(), row), strict=True
        ):
            assert error(got, want) <= LOW_PRECISION_FACTOR * error(plain, want) + floor(want)

    def test_attention_of_no_images(self) -> None:
        out, alpha = self.attention(draw(0, 0, 17, 3, HEADS, 64), "cls")
        assert out.shape == (0, 17, HEADS, 64)
        assert alpha.shape == (0, HEADS, 17)

    # ------------------------------------------------------------------------------------ one query's attention

    def draw_query(self, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = [
            (IMAGES, HEADS, head_dim),
            (IMAGES, tokens, WIDTH),
            *[(HEADS, head_dim, WIDTH)] * 2,
            (HEADS, head_dim),
        ]
        scales = [1, 1, WIDTH**-0.5, WIDTH**-0.5, 1]
        return tuple(draw(i, *s, dtype=dtype) * f for i, (s, f) in enumerate(zip(shapes, scales, strict=True)))

    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_query_row_from_tokens(self, tokens: int, head_dim: int) -> None:
        arguments = self.draw_query(tokens, head_dim, torch.float32)
        have = ops.query_row_from_tokens(*arguments, backend=self.backend)
        for got, want in zip(have, reference.query_row_from_tokens(*in_double(*arguments)), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, want) <= OP_FLOAT32

    @pytest.mark.parametrize("head_dim", [64, 80, 104])
    def test_query_row_from_tokens_in_bfloat16(self, head_dim: int) -> None:
        arguments = self.draw_query(50, head_dim, torch.bfloat16)
        have = ops.query_row_from_tokens(*arguments, backend=self.backend)
        plain = reference.query_row_from_tokens(*arguments)
        want = reference.query_row_from_tokens(*in_double(*arguments))
        for got, low, exact in zip(have, plain, want, strict=True):
            assert got.dtype == torch.float32
            assert error(got, exact) <= LOW_PRECISION_FACTOR * error(low, exact) + floor(exact)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_query_row_with_extreme_logits(self, sign: int) -> None:
        query, tokens, key_weight, value_weight, value_bias = self.draw_query(6, 64, torch.float32)
        query[:], key_weight[:] = 0, 0
        query[..., 0], key_weight[:, 0, 0] = 8, 1
        tokens[:, :, 0] = sign * 1e4 - torch.arange(6.0)
        arguments = (query, tokens, key_weight, value_weight, value_bias)
        z, alpha = ops.query_row_from_tokens(*arguments, backend=self.backend)
        geometric = torch.exp(-torch.arange(6.0, dtype=torch.float64))
        assert relative_error(alpha, (geometric / geometric.sum()).expand(IMAGES, HEADS, 6)) <= OP_FLOAT32
        assert relative_error(z, reference.query_row_from_tokens(*in_double(*arguments))[0]) <= OP_FLOAT32

    # -------------------------------------------------------------------------- maps and contributions of tokens

    @pytest.mark.parametrize("texts", COLUMNS)
    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_text_maps_are_added_to_what_is_there(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = draw_weighted_values(tokens, head_dim, texts, torch.float32)
        before = draw(4, IMAGES, tokens, texts)
        out = before.clone()
        result = ops.text_maps(*arguments, out, backend=self.backend)
        assert result is out
        want = before.double() + reference.text_maps(*in_double(*arguments))
        assert relative_error(out, want) <= OP_FLOAT32

    def draw_unformed_values(self, tokens: int, head_dim: int, texts: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        alpha, _, basis = draw_weighted_values(tokens, head_dim, texts, dtype)
        _, tokens_in, _, value_weight, value_bias = self.draw_query(tokens, head_dim, dtype)
        return alpha, tokens_in, value_weight, value_bias, basis

    @pytest.mark.parametrize("texts", COLUMNS)  # few: without the values; 100: with them
    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_text_maps_from_tokens(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = self.draw_unformed_values(tokens, head_dim, texts, torch.float32)
        before = draw(5, IMAGES, tokens, texts)
        out = before.clone()
        assert ops.text_maps_from_tokens(*arguments, out, backend=self.backend) is out
        want = before.double() + reference.text_maps_from_tokens(*in_double(*arguments))
        assert relative_error(out, want) <= OP_FLOAT32

    @pytest.mark.parametrize("texts", COLUMNS)
    def test_text_maps_from_tokens_in_bfloat16(self, texts: int) -> None:
        alpha, *arguments, basis = self.draw_unformed_values(50, 64, texts, torch.bfloat16)
        out = torch.zeros(IMAGES, 50, texts)
        ops.text_maps_from_tokens(alpha, *arguments, basis, out, backend=self.backend)
        exact = reference.text_maps_from_tokens(*in_double(alpha, *arguments, basis))
        low = reference.text_maps_from_tokens(*(part.bfloat16() for part in (alpha, *arguments, basis)))
        assert error(out, exact) <= LOW_PRECISION_FACTOR * error(low, exact) + floor(exact)

    @pytest.mark.parametrize("texts", COLUMNS)
    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_head_maps(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = draw_weighted_values(tokens, head_dim, texts, torch.float32)
        have = ops.head_maps(*arguments, backend=self.backend)
        assert relative_error(have, reference.head_maps(*in_double(*arguments))) <= OP_FLOAT32

    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_token_contributions(self, tokens: int, head_dim: int) -> None:
        arguments = draw_weighted_values(tokens, head_dim, 33, torch.float32)
        have = ops.token_contributions(*arguments, backend=self.backend)
        assert relative_error(have, reference.token_contributions(*in_double(*arguments))) <= OP_FLOAT32

    @pytest.mark.parametrize("name", ["text_maps", "head_maps", "token_contributions"])
    def test_values_in_bfloat16(self, name: str) -> None:
        arguments = draw_weighted_values(50, 80, 7, torch.bfloat16)
        have = self.weighted(name, *arguments)
        plain = getattr(reference, name)(*(tensor.bfloat16() for tensor in arguments))
        want = getattr(reference, name)(*in_double(*arguments))
        assert have.dtype == torch.float32
        assert error(have, want) <= LOW_PRECISION_FACTOR * error(plain, want) + floor(want)

    @pytest.mark.parametrize("name", ["text_maps", "head_maps", "token_contributions"])
    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 2, 3)])
    def test_values_of_any_strides(self, name: str, order: tuple[int, ...]) -> None:
        """Values whose heads lie before the tokens in memory, as attention kernels lay them out, and others."""
        alpha, value, basis = draw_weighted_values(17, 64, 5, torch.float32)
        laid_out = value.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
        want = getattr(reference, name)(*in_double(alpha, value, basis))
        assert relative_error(self.weighted(name, alpha, laid_out, basis), want) <= OP_FLOAT32

    @pytest.mark.parametrize("name", ["text_maps", "head_maps", "token_contributions"])
    def test_inputs_are_left_alone(self, name: str) -> None:
        arguments = draw_weighted_values(17, 64, 5, torch.float32)
        before = [tensor.clone() for tensor in arguments]
        self.weighted(name, *arguments)
        assert all(torch.equal(tensor, old) for tensor, old in zip(arguments, before, strict=True))

    def weighted(self, name: str, alpha: Tensor, value: Tensor, basis: Tensor) -> Tensor:
        if name == "text_maps":
            out = torch.zeros(*value.shape[:2], basis.shape[2], dtype=basis.dtype)
            return ops.text_maps(alpha, value, basis, out, backend=self.backend)
        result: Tensor = getattr(ops, name)(alpha, value, basis, backend=self.backend)
        return result

    # -------------------------------------------------------------------------------------- the final LayerNorm

    @pytest.mark.parametrize("width", [1, 2, 64, 1664])
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_layer_statistics(self, width: int, offset: float) -> None:
        """An offset of 100 loses the variance to cancellation unless it is taken around the mean."""
        residual = draw(5, IMAGES, width) + offset
        have = ops.layer_statistics(residual, 1e-5, backend=self.backend)
        for got, want in zip(have, reference.layer_statistics(residual.double(), 1e-5), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, want) <= OP_FLOAT32

    def test_layer_statistics_in_bfloat16(self) -> None:
        residual = draw(5, IMAGES, 768, dtype=torch.bfloat16)
        have = ops.layer_statistics(residual, 1e-5, backend=self.backend)
        plain = reference.layer_statistics(residual, 1e-5)
        want = reference.layer_statistics(residual.double(), 1e-5)
        for got, low, exact in zip(have, plain, want, strict=True):
            assert got.dtype == torch.float32
            assert error(got, exact) <= LOW_PRECISION_FACTOR * error(low, exact) + floor(exact)

    # ------------------------------------------------------------------------------------------------- float64

    def test_float64_stays_float64(self) -> None:
        qkv = draw(0, IMAGES, 17, 3, HEADS, 64, dtype=torch.float64)
        arguments = in_double(*draw_weighted_values(17, 64, 5, torch.float32))
        query = self.draw_query(17, 64, torch.float64)
        results = [
            *self.attention(qkv, "cls"),
            *ops.query_row_from_tokens(*query, backend=self.backend),
            *(self.weighted(name, *arguments) for name in ("text_maps", "head_maps", "token_contributions")),
            *ops.layer_statistics(query[0][0], 1e-5, backend=self.backend),
        ]
        assert {result.dtype for result in results} == {torch.float64}
