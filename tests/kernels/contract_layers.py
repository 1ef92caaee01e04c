"""LayerNorm, its statistics and the MLP: the definition in float64 is the truth."""

from itertools import product

import pytest
import torch
from contracting import IMAGES, LOW, Contract, floor, in_double
from measures import error, relative_error
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference
from clipfast.kernels.dispatch import AUTO, BackendUnavailable

ACTIVATIONS: tuple[reference.Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu")
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
# (tokens, K, M): of one and of odd sizes, one tile and several, the class token alone, the ratio 1 : 4 of a real layer.
LAYERS = [*product([(1, 1, 1), (2, 33, 65), (9, 104, 136)], ACTIVATIONS)]
LAYERS += [((17, 48, 192), "quick_gelu"), ((50, 96, 384), "gelu"), ((1, 80, 320), "gelu_tanh")]
EVERY_LAYER = pytest.mark.parametrize(
    ("sizes", "activation"), [pytest.param(*layer, id="N{}-K{}-M{}-{}".format(*layer[0], layer[1])) for layer in LAYERS]
)
WIDTHS = (1, 2, 7, 64, 768, 1001, 1664)
EPS = 1e-5


class LayersContract(Contract):
    """``layer_statistics``, ``add_layer_norm``, ``linear_activation``; :class:`LinearContract` has ``linear``."""

    # -------------------------------------------------------------------------------------- the final LayerNorm

    @pytest.mark.parametrize("width", [1, 2, 64, 1664])
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_layer_statistics(self, width: int, offset: float) -> None:
        """An offset of 100 loses the variance to cancellation unless it is taken around the mean."""
        residual = self.draw(5, IMAGES, width) + offset
        have = ops.layer_statistics(residual, 1e-5, backend=self.backend)
        for got, expected in zip(have, reference.layer_statistics(residual.double(), 1e-5), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, expected) <= OP_FLOAT32

    def test_layer_statistics_in_bfloat16(self) -> None:
        residual = self.draw(5, IMAGES, 768, dtype=torch.bfloat16)
        have = ops.layer_statistics(residual, 1e-5, backend=self.backend)
        plain = reference.layer_statistics(residual, 1e-5)
        expected = reference.layer_statistics(residual.double(), 1e-5)
        for got, low, exact in zip(have, plain, expected, strict=True):
            assert got.dtype == torch.float32
            assert error(got, exact) <= LOW_PRECISION_FACTOR * error(low, exact) + floor(exact)

    # ------------------------------------------------------------------------------- the first half of an MLP

    def draw_layer(self, tokens: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, ``weight`` and ``bias``, so that the hidden layer is about as large as its activation is curved."""
        x = self.draw(6, IMAGES, tokens, inner, dtype=dtype)
        return x, (self.draw(7, columns, inner) * max(inner, 1) ** -0.5).to(dtype), self.draw(8, columns, dtype=dtype)

    def linear_activation(self, x: Tensor, weight: Tensor, bias: Tensor, activation: reference.Activation) -> Tensor:
        return ops.linear_activation(x, weight, bias, activation, backend=self.backend)

    @EVERY_LAYER
    def test_linear_activation(self, sizes: tuple[int, int, int], activation: reference.Activation) -> None:
        arguments = self.draw_layer(*sizes, torch.float32)
        before = [tensor.clone() for tensor in arguments]
        have = self.linear_activation(*arguments, activation)
        assert have.dtype == torch.float32
        assert have.is_contiguous()
        assert relative_error(have, reference.linear_activation(*in_double(*arguments), activation)) <= OP_FLOAT32
        assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))

    @EVERY_LAYER
    @pytest.mark.parametrize("dtype", LOW)
    def test_linear_activation_in_low_precision(
        self, sizes: tuple[int, int, int], activation: reference.Activation, dtype: torch.dtype
    ) -> None:
        arguments = self.draw_layer(*sizes, dtype)
        have = self.linear_activation(*arguments, activation)
        assert have.dtype == dtype
        plain = reference.linear_activation(*arguments, activation)
        expected = reference.linear_activation(*in_double(*arguments), activation)
        assert error(have, expected) <= LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)

    @EVERY_ACTIVATION
    @pytest.mark.parametrize(
        ("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
    )
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter; the result is 0
    def test_activations_everywhere(self, activation: reference.Activation, dtype: torch.dtype, share: float) -> None:
        """A layer of one weight, 1, is the activation itself: right to two units of x's last place, never NaN."""
        x = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([0.0, -0.0, 1e4, -1e4, 6e4, -6e4])])
        x = x.to(self.device, dtype)[:, None]
        one, zero = x.new_ones(1, 1), x.new_zeros(1)
        have = self.linear_activation(x, one, zero, activation)
        expected = reference.linear_activation(x.double(), one.double(), zero.double(), activation)
        assert bool(((have.double() - expected).abs() <= share * x.double().abs()).all())

    @EVERY_ACTIVATION
    def test_a_nan_stays_one(self, activation: reference.Activation) -> None:
        for dtype, inner in product((torch.float32, torch.bfloat16), (80, 5)):
            x, weight, bias = self.draw_layer(3, inner, 16, dtype)
            x[1, 1, 1] = torch.nan
            assert torch.equal(self.linear_activation(x, weight, bias, activation).isnan().any(-1), x.isnan().any(-1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("inner", [80, 33])
    def test_linear_activation_of_any_strides(self, inner: int, dtype: torch.dtype) -> None:
        """Rows with gaps, rows that start anywhere, one row for all, and columns that lie apart."""
        x, weight, bias = self.draw_layer(9, inner, 96, dtype)
        expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
        plain = reference.linear_activation(x, weight, bias, "gelu")
        limit = LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)
        wide = x.new_full((IMAGES, 9, inner + 8), torch.nan)
        shifted = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
        apart = x.new_full((IMAGES, inner, 9), torch.nan).transpose(1, 2)
        for view in (wide[..., :inner], wide[..., 3 : inner + 3], shifted, apart):
            view.copy_(x)
            assert error(self.linear_activation(view, weight, bias, "gelu"), expected) <= limit
        class_tokens = self.linear_activation(wide[:, 0, 3 : inner + 3], weight, bias, "gelu")
        assert error(class_tokens, expected[:, 0]) <= limit
        by_columns = self.linear_activation(x[0].t().contiguous().t(), weight, bias, "gelu")
        assert error(by_columns, expected[0]) <= limit
        same = self.linear_activation(x[:1, :1].expand(IMAGES, 9, inner), weight, bias, "gelu")
        assert error(same, expected[:1, :1].expand_as(expected)) <= limit
        weight_apart = weight.t().contiguous().t()
        bias_apart = torch.stack([bias, bias], 1)[:, 0]
        assert error(self.linear_activation(x, weight_apart, bias_apart, "gelu"), expected) <= limit

    def test_linear_activation_of_any_number_of_axes(self) -> None:
        x, weight, bias = self.draw_layer(4, 16, 24, torch.float32)
        expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
        assert relative_error(self.linear_activation(x[0, 0], weight, bias, "gelu"), expected[0, 0]) <= OP_FLOAT32
        four = self.linear_activation(x.view(IMAGES, 2, 2, 16), weight, bias, "gelu")
        assert relative_error(four, expected.view(IMAGES, 2, 2, 24)) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear_activation_of_nothing(self, dtype: torch.dtype) -> None:
        x, weight, bias = self.draw_layer(9, 80, 96, dtype)
        assert self.linear_activation(x[:0], weight, bias, "gelu").shape == (0, 9, 96)
        assert self.linear_activation(x[:, :0], weight, bias, "gelu").shape == (IMAGES, 0, 96)
        assert self.linear_activation(x, weight[:0], bias[:0], "gelu").shape == (IMAGES, 9, 0)

    def test_linear_activation_of_no_columns(self) -> None:
        """What is left is the bias; whoever has no use for such a layer refuses it."""
        x, weight, bias = self.draw_layer(9, 0, 96, torch.float32)
        expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
        reasons = self.reasons("linear_activation", x, weight, bias, "gelu")
        if reasons:
            assert reasons == ["x has no columns"]
        have = ops.linear_activation(x, weight, bias, "gelu", backend=AUTO if reasons else self.backend)
        assert relative_error(have, expected) <= OP_FLOAT32

    def test_linear_activation_in_float64(self) -> None:
        arguments = self.draw_layer(3, 16, 24, torch.float64)
        if not self.takes_float64("linear_activation"):
            with self.refuses_float64():
                self.linear_activation(*arguments, "gelu")
            return
        have = self.linear_activation(*arguments, "gelu")
        assert have.dtype == torch.float64
        assert relative_error(have, reference.linear_activation(*arguments, "gelu")) <= 1e-14

    # --------------------------------------------------------------------------- the residual stream's LayerNorm

    def draw_norm(self, width: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x``, ``delta``, ``weight`` and ``bias``."""
        x, delta = (self.draw(seed, IMAGES, 5, width) for seed in (9, 10))
        return (
            (x + offset).to(dtype),
            delta.to(dtype),
            self.draw(11, width, dtype=dtype),
            self.draw(12, width, dtype=dtype),
        )

    def carried(self, width: int) -> Tensor:
        """Biases as large as the stream, and larger where trained models have them."""
        carried = self.draw(13, width)
        carried[::7] *= 30
        return carried

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("with_delta", [True, False], ids=["term", "no term"])
    @pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *LOW])
    def test_carried_biases_join_the_norm_and_not_the_stream(
        self, width: int, with_delta: bool, dtype: torch.dtype
    ) -> None:
        """Their sum with the stream is not rounded: all that 16 bits may lose is in the result."""
        x, delta, weight, bias = self.draw_norm(width, dtype)
        added = delta if with_delta else None
        carried = self.carried(width)
        arguments = (x, added, weight, bias, EPS, carried)
        updated = x + delta if with_delta else x.clone()
        reasons = self.reasons("add_layer_norm", *arguments)
        if reasons:
            assert reasons == ["biases are carried"]
            with pytest.raises(BackendUnavailable, match="cannot compute add_layer_norm: biases are carried"):
                ops.add_layer_norm(*arguments, backend=self.backend)
        have = ops.add_layer_norm(*arguments, backend=AUTO if reasons else self.backend)
        assert have.dtype == dtype
        assert have.is_contiguous()
        assert torch.equal(x, updated)
        assert torch.equal(carried, self.carried(width))
        _, expected = reference.add_layer_norm(
            *in_double(updated), None, *in_double(weight, bias), EPS, carried.double()
        )
        assert error(have, expected) <= error(expected.to(dtype), expected) + floor(expected)

    def test_carried_biases_of_any_strides(self) -> None:
        x, _, weight, bias = self.draw_norm(48, torch.float32)
        carried = torch.stack([self.carried(48)] * 2, 1)[:, 0]
        auto = bool(self.reasons("add_layer_norm", x, None, weight, bias, EPS, carried))
        have = ops.add_layer_norm(x, None, weight, bias, EPS, carried, backend=AUTO if auto else self.backend)
        _, expected = reference.add_layer_norm(x.double(), None, *in_double(weight, bias), EPS, carried.double())
        assert relative_error(have, expected) <= OP_FLOAT32

    def add_layer_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
        return ops.add_layer_norm(x, delta, weight, bias, eps, backend=self.backend)

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("with_delta", [True, False])
    def test_add_layer_norm(self, width: int, with_delta: bool) -> None:
        """x is changed in place, to the sum as torch rounds it, and that sum is what the norm is of."""
        x, delta, weight, bias = self.draw_norm(width, torch.float32)
        updated = x + delta if with_delta else x.clone()
        delta_before = delta.clone()
        have = self.add_layer_norm(x, delta if with_delta else None, weight, bias)
        assert have.dtype == torch.float32
        assert have.is_contiguous()
        assert torch.equal(x, updated)
        assert torch.equal(delta, delta_before)
        _, expected = reference.add_layer_norm(updated.double(), None, weight.double(), bias.double(), EPS)
        assert relative_error(have, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("width", [2, 64, 768, 1001, 1664])
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    @pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *LOW])
    def test_add_layer_norm_of_large_means(self, width: int, offset: float, dtype: torch.dtype) -> None:
        """No worse than twice the definition in the same precision, given the same stream."""
        x, delta, weight, bias = self.draw_norm(width, dtype, offset)
        updated = x + delta
        have = self.add_layer_norm(x, delta, weight, bias)
        assert have.dtype == dtype
        assert torch.equal(x, updated)
        _, plain = reference.add_layer_norm(updated, None, weight, bias, EPS)
        _, expected = reference.add_layer_norm(updated.double(), None, weight.double(), bias.double(), EPS)
        assert error(have, expected) <= LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)

    @pytest.mark.parametrize("dtype", LOW)
    def test_add_layer_norm_with_weights_of_float32(self, dtype: torch.dtype) -> None:
        x, delta, weight, bias = self.draw_norm(768, dtype)
        weight, bias = weight.float() * 1.001, bias.float() * 1.001
        updated = x + delta
        have = self.add_layer_norm(x, delta, weight, bias)
        assert have.dtype == dtype
        assert torch.equal(x, updated)
        _, expected = reference.add_layer_norm(updated.double(), None, weight.double(), bias.double(), EPS)
        # All but the result's own rounding is in float32.
        assert error(have, expected) <= error(expected.to(dtype), expected) + floor(expected)

    @pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), *LOW])
    def test_the_layer_norm_of_equal_numbers_is_the_bias(self, dtype: torch.dtype) -> None:
        _, _, weight, bias = self.draw_norm(48, dtype)
        x = torch.full((IMAGES, 5, 48), 3.0, dtype=dtype, device=self.device)
        assert error(self.add_layer_norm(x, None, weight, bias), bias.expand_as(x)) == 0

    def test_a_wide_layer_norm(self) -> None:
        x, delta, weight, bias = self.draw_norm(8192, torch.float32)
        have = self.add_layer_norm(x, delta, weight, bias)
        _, expected = reference.add_layer_norm(x.double(), None, weight.double(), bias.double(), EPS)
        assert relative_error(have, expected) <= OP_FLOAT32

    def test_add_layer_norm_changes_no_more_than_its_rows(self) -> None:
        """Rows with gaps between them, and the class token of every image."""
        x, delta, weight, bias = self.draw_norm(48, torch.float32)
        weight, bias = (torch.stack([vector, vector], 1)[:, 0] for vector in (weight, bias))
        apart = torch.stack([delta, delta], 3)[..., 0]  # its columns lie apart; those of delta do not, but its rows may
        updated = x + delta
        _, normalized = reference.add_layer_norm(updated.double(), None, weight.double(), bias.double(), EPS)
        for part, added in ((slice(None), apart), (0, delta)):
            wide = torch.full((IMAGES, 5, 56), 7.0, device=self.device)
            wide[..., 3:51] = x
            expected = wide.clone()
            expected[:, part, 3:51] = updated[:, part]
            have = self.add_layer_norm(wide[:, part, 3:51], added[:, part], weight, bias)
            assert torch.equal(wide, expected)
            assert have.is_contiguous()
            assert relative_error(have, normalized[:, part]) <= OP_FLOAT32

    def test_streams_in_other_orders_are_changed_or_refused(self) -> None:
        """Whoever cannot change such a stream in place says so, and ``"auto"`` finds another."""
        x, delta, weight, bias = self.draw_norm(48, torch.float32)
        updated = x + delta
        _, expected = reference.add_layer_norm(updated.double(), None, weight.double(), bias.double(), EPS)
        by_columns = x.transpose(1, 2).contiguous().transpose(1, 2)
        longer = torch.cat([x[:, :1], x], 1)
        for stream in (by_columns, longer[:, 1:], x.transpose(0, 1).contiguous().transpose(0, 1)):
            arguments, before = (stream, delta, weight, bias, EPS), stream.clone()
            reasons = self.reasons("add_layer_norm", *arguments)
            if reasons:
                with pytest.raises(BackendUnavailable, match="cannot compute add_layer_norm: x has strides"):
                    ops.add_layer_norm(*arguments, backend=self.backend)
                assert torch.equal(stream, before)
            have = ops.add_layer_norm(*arguments, backend=AUTO if reasons else self.backend)
            assert torch.equal(stream, updated)
            assert relative_error(have, expected) <= OP_FLOAT32

    def test_add_layer_norm_of_nothing(self) -> None:
        x, delta, weight, bias = self.draw_norm(48, torch.bfloat16)
        assert self.add_layer_norm(x[:0], delta[:0], weight, bias).shape == (0, 5, 48)
        assert self.add_layer_norm(x[:, :0], None, weight, bias).shape == (IMAGES, 0, 48)

    def test_add_layer_norm_in_float64(self) -> None:
        x, delta, weight, bias = self.draw_norm(48, torch.float64)
        updated, expected = reference.add_layer_norm(x, delta, weight, bias, EPS)
        if not self.takes_float64("add_layer_norm"):
            before = x.clone()
            with self.refuses_float64():
                self.add_layer_norm(x, delta, weight, bias)
            assert torch.equal(x, before)
            return
        have = self.add_layer_norm(x, delta, weight, bias)
        assert have.dtype == torch.float64
        assert torch.equal(x, updated)
        assert relative_error(have, expected) <= 1e-14
