"""Rows in float8 and their products: the definition in float64 is the truth."""

import pytest
import torch
from contract_layers import EVERY_ACTIVATION
from contracting import IMAGES, LOW, Contract, floor
from measures import error, relative_error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

FLOAT8 = torch.float8_e4m3fn
EVERY_DTYPE = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *LOW])


def numbers(bits: Tensor) -> Tensor:
    """Float8 in float64."""
    return bits.view(FLOAT8).double()


class Fp8Contract(Contract):
    """``quantize_rows`` and ``scaled_linear``."""

    def check_rows(self, x: Tensor, activation: reference.Activation | None) -> None:
        """Scale and numbers are right, and every number is one of the two nearest, or the nearest but for float32.

        Half a unit in the last place of a number is at most 1/16 of it, or 2⁻¹⁰ of the scale where it is subnormal.
        """
        values, scale = ops.quantize_rows(x, activation, backend=self.backend)
        wide = x.double()
        exact = wide if activation is None else reference.activated(wide, activation)
        _, expected = reference.quantize_rows(wide, activation)
        assert (values.dtype, scale.dtype) == (torch.uint8, torch.float32)
        assert values.shape == x.shape
        assert values.is_contiguous()
        assert scale.is_contiguous()
        near = 1e-5 if activation is not None and x.dtype != torch.float32 else 1e-6  # six terms of erf, or eight
        assert float(((scale.double() - expected) / expected).abs().max()) <= near
        scaled = exact / scale.double()[..., None]
        half_unit = (scaled.abs() / 16).clamp_min(2.0**-10)
        off = (numbers(values) - scaled).abs()
        lost = 0 if activation is None else 1e-6 * wide.abs() / scale.double()[..., None]  # of x, where it cancels
        assert bool((off <= half_unit * (1 + 16 * near) + lost).all())
        nearest = scaled.float().to(FLOAT8).double()
        assert float((numbers(values) != nearest).double().mean()) <= 1e-2  # ties, decided in float32
        assert int((numbers(values).abs().amax(-1) != 448).sum()) == 0

    @EVERY_DTYPE
    @pytest.mark.parametrize("width", [1, 2, 7, 64, 768, 1001, 4096])
    def test_quantize_rows(self, width: int, dtype: torch.dtype) -> None:
        self.check_rows(self.draw(20, IMAGES, 5, width, dtype=dtype), None)

    @EVERY_DTYPE
    @EVERY_ACTIVATION
    def test_quantize_rows_with_an_activation(self, activation: reference.Activation, dtype: torch.dtype) -> None:
        self.check_rows(2 * self.draw(21, IMAGES, 17, 320, dtype=dtype), activation)

    @pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
    def test_rows_of_any_size(self, size: float) -> None:
        self.check_rows(self.draw(22, 40, 96) * size, None)

    def test_every_number_of_float8_is_kept(self) -> None:
        """And everything between two of them goes to the nearer one, of two as near to the even one."""
        known = torch.arange(0x7F, dtype=torch.uint8, device=self.device)
        exact = numbers(known).float()
        between = (exact[1:] + exact[:-1]) / 2
        above, below = (torch.nextafter(between, torch.full_like(between, limit)) for limit in (1e4, 0.0))
        row = torch.cat([exact, between, above, below])
        values, scale = ops.quantize_rows(torch.stack([row, -row]), backend=self.backend)
        assert scale.tolist() == [1, 1]
        even = torch.where(known[:-1] % 2 == 0, known[:-1], known[1:])
        expected = torch.cat([known, even, known[1:], known[:-1]])
        assert torch.equal(values[0], expected)
        assert torch.equal(values[1] & 0x7F, expected)
        assert bool((values[1][expected > 0] >= 0x80).all())

    def test_rows_of_any_strides(self) -> None:
        x = self.draw(23, IMAGES, 9, 48)
        expected = ops.quantize_rows(x, backend=self.backend)
        wide = x.new_full((IMAGES, 9, 57), torch.nan)
        apart = x.new_full((IMAGES, 48, 9), torch.nan).transpose(1, 2)
        for view in (wide[..., 3:51], apart):
            view.copy_(x)
            for got, right in zip(ops.quantize_rows(view, backend=self.backend), expected, strict=True):
                assert torch.equal(got, right)
        for got, right in zip(ops.quantize_rows(wide[:, 0, 3:51], backend=self.backend), expected, strict=True):
            assert torch.equal(got, right[:, 0])

    def test_rows_of_zeros_and_of_nothing(self) -> None:
        values, scale = ops.quantize_rows(torch.zeros(3, 5, device=self.device), "gelu", backend=self.backend)
        assert not values.any()
        assert scale.tolist() == [1, 1, 1]
        values, scale = ops.quantize_rows(self.draw(24, 0, 5), backend=self.backend)
        assert values.shape == (0, 5)
        assert scale.shape == (0,)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
    def test_what_is_not_a_number_stays_none(self, value: float) -> None:
        x = self.draw(25, 3, 32)
        x[1, 4] = value
        rows = ops.quantize_rows(x, backend=self.backend)
        weight = ops.quantize_rows(self.draw(26, 16, 32), backend=self.backend)
        have = ops.scaled_linear(*rows, *weight, backend=self.backend)
        assert have.isnan().all(-1).tolist() == [False, True, False]
        assert have.isnan().any(-1).tolist() == [False, True, False]

    # -------------------------------------------------------------------------------------------------- products

    @pytest.mark.parametrize("sizes", [(1, 16, 16), (9, 96, 384), (50, 384, 96)], ids=str)
    @pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
    def test_scaled_linear(self, sizes: tuple[int, int, int], with_bias: bool) -> None:
        """Of float8 a product is exact in float32; what a GPU's sums lose, 2⁻¹³, the result's own rounding hides."""
        tokens, inner, columns = sizes
        rows = reference.quantize_rows(self.draw(27, IMAGES, tokens, inner))
        weight = reference.quantize_rows(self.draw(28, columns, inner) * inner**-0.5)
        bias = self.draw(29, columns, dtype=torch.bfloat16) if with_bias else None
        have = ops.scaled_linear(*rows, *weight, bias, backend=self.backend)
        assert have.dtype == torch.bfloat16
        assert have.is_contiguous()
        factors = [each.double() if each.is_floating_point() else each for each in (*rows, *weight)]
        expected = reference.scaled_linear(*factors, None if bias is None else bias.double())
        sums = 2**-13 if self.device != "cpu" else OP_FLOAT32
        limit = error(expected.bfloat16(), expected) + sums * float(expected.abs().max())
        assert error(have, expected) <= limit + floor(expected)

    def test_scaled_linear_of_any_strides(self) -> None:
        rows = reference.quantize_rows(self.draw(27, IMAGES, 9, 32))
        weight = reference.quantize_rows(self.draw(28, 48, 32))
        expected = ops.scaled_linear(*rows, *weight, backend=self.backend)
        apart = [torch.stack([each, each], each.ndim)[..., 0] for each in (*rows, *weight)]
        assert torch.equal(ops.scaled_linear(*apart, backend=self.backend), expected)
        one = ops.scaled_linear(rows[0][:, 0], rows[1][:, 0], *weight, backend=self.backend)
        assert relative_error(one, expected[:, 0]) <= 2**-7

    def test_scaled_linear_of_nothing(self) -> None:
        values, scale = reference.quantize_rows(self.draw(27, IMAGES, 9, 32))
        weight, weight_scale = reference.quantize_rows(self.draw(28, 48, 32))
        have = ops.scaled_linear(values[:0], scale[:0], weight, weight_scale, backend=self.backend)
        assert have.shape == (0, 9, 48)
        have = ops.scaled_linear(values, scale, weight[:0], weight_scale[:0], backend=self.backend)
        assert have.shape == (IMAGES, 9, 0)
        bias = self.draw(29, 48, dtype=torch.bfloat16)
        have = ops.scaled_linear(values[..., :0], scale, weight[:, :0], weight_scale, bias, backend=self.backend)
        assert torch.equal(have, bias.expand(IMAGES, 9, 48))
