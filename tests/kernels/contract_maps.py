"""Maps and contributions of tokens: the definition in float64 is the truth."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from contracting import HEADS, IMAGES, LOW, WIDTH, Contract, floor, in_double
from measures import error, relative_error
from tolerances import FLOAT64, LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

LAYERS = 3
# Every number of tokens, head_dim and number of texts that models have; the long ones with few others, for speed.
SHAPES = [
    *[(tokens, head_dim, texts) for tokens in (1, 2, 17, 50) for head_dim in (64, 80, 104) for texts in (1, 3, 100)],
    *[(tokens, head_dim, 3) for tokens in (197, 257) for head_dim in (64, 80, 104)],
    *[(197, 80, 100), (257, 64, 100), (577, 80, 1), (577, 64, 33)],
    *[(5, head_dim, 3) for head_dim in (1, 8, 17, 48, 65, 72, 88, 96, 112, 113, 128)],
    *[(3, 64, 1000), (17, 80, 129)],
]
FEW = [(1, 64, 3), (2, 80, 1), (17, 104, 100), (50, 80, 3), (197, 64, 1), (257, 80, 3), (577, 64, 1), (5, 64, 1000)]
WEIGHTED = ["text_maps", "head_maps", "token_contributions"]
LISTS = [[0, 1, 2, 3, 4], [3], [4, 0, 2], []]  # heads to sum over, in any order
AXES = pytest.mark.parametrize(("tokens", "head_dim", "texts"), SHAPES)
FEW_AXES = pytest.mark.parametrize(("tokens", "head_dim", "texts"), FEW)


def layered(values: Tensor) -> list[Tensor]:
    """Layers ``[L, B, N, H, E]`` as the views that a forward keeps."""
    return list(values)


def apart(values: Tensor) -> list[Tensor]:
    return [value.clone() for value in values]


def between_others(values: Tensor) -> list[Tensor]:
    """Every second layer of a buffer, as the values inside packed queries, keys and values."""
    buffer = torch.full((2 * len(values), *values.shape[1:3], 3, *values.shape[3:]), torch.nan).to(values)
    buffer[1::2, :, :, 2] = values
    return [buffer[2 * layer + 1, :, :, 2] for layer in range(len(values))]


def backwards(values: Tensor) -> list[Tensor]:
    return list(values.flip(0).contiguous().unbind()[::-1])


def unevenly(values: Tensor) -> list[Tensor]:
    """One buffer, in no regular order."""
    shuffled = values[[1, 0, 2]].contiguous()
    return [shuffled[1], shuffled[0], shuffled[2]]


def turned(values: Tensor) -> list[Tensor]:
    """One buffer, evenly spaced, but the heads of some layers lie before the tokens."""
    buffer = values.clone()
    heads_first = buffer[1].view(buffer.shape[1], buffer.shape[3], buffer.shape[2], -1).transpose(1, 2)
    heads_first.copy_(values[1])
    return [buffer[0], heads_first, *buffer[2:]]


def spread_out(values: Tensor) -> list[Tensor]:
    """The last axis is not contiguous."""
    return list(values.transpose(-1, -2).contiguous().transpose(-1, -2))


class MapsContract(Contract):
    """``text_maps`` in its forms, ``head_maps`` and ``token_contributions``."""

    def weighted(self, name: str, alpha: Tensor, value: Tensor, basis: Tensor) -> Tensor:
        if name == "text_maps":
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            out = torch.zeros(*value.shape[:2], basis.shape[2], dtype=dtype, device=self.device)
            return ops.text_maps(alpha, value, basis, out, backend=self.backend)
        result: Tensor = getattr(ops, name)(alpha, value, basis, backend=self.backend)
        return result

    # --------------------------------------------------------------------------------------------------- text maps

    @AXES
    def test_text_maps_are_added_to_what_is_there(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = self.draw_weighted_values(tokens, head_dim, texts, torch.float32)
        around = self.draw(4, IMAGES + 2, tokens, texts)
        before, out = around.clone(), around[1:-1]
        assert ops.text_maps(*arguments, out, backend=self.backend) is out
        expected = before[1:-1].double() + reference.text_maps(*in_double(*arguments))
        assert relative_error(out, expected) <= OP_FLOAT32
        assert torch.equal(around[::4], before[::4]), "something was written before or after out"

    @pytest.mark.parametrize("listed", LISTS, ids=str)
    @pytest.mark.parametrize(("head_dim", "kind"), [(80, torch.int32), (104, torch.int64), (20, torch.int64)])
    def test_text_maps_of_some_heads(self, listed: list[int], head_dim: int, kind: torch.dtype) -> None:
        """Values of other heads, and what lies beside the values in memory, are not looked at: all are NaN."""
        alpha, basis = self.draw(1, IMAGES, 5, 17).softmax(-1), self.draw(3, 5, head_dim, 7)
        qkv = torch.full((IMAGES, 17, 3, 5, head_dim), torch.nan, device=self.device)
        qkv[:, :, 2, listed] = self.draw(2, IMAGES, 17, len(listed), head_dim)
        value, heads = qkv[:, :, 2], torch.tensor(listed, dtype=kind, device=self.device)
        before = self.draw(4, IMAGES, 17, 7)
        out = ops.text_maps(alpha, value, basis, before.clone(), heads, backend=self.backend)
        expected = before.double() + reference.text_maps(*in_double(alpha, value, basis), heads.long())
        assert relative_error(out, expected) <= OP_FLOAT32
        assert listed or torch.equal(out, before)

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize(("head_dim", "texts"), [(64, 100), (72, 3), (80, 3), (104, 20), (113, 3)])
    @pytest.mark.parametrize("name", WEIGHTED)
    def test_values_in_low_precision(self, name: str, head_dim: int, texts: int, dtype: torch.dtype) -> None:
        arguments = self.draw_weighted_values(50, head_dim, texts, dtype)
        have = self.weighted(name, *arguments)
        low = getattr(reference, name)(*(tensor.to(dtype) for tensor in arguments))
        expected = getattr(reference, name)(*in_double(*arguments))
        assert have.dtype == torch.float32
        assert error(have, expected) <= LOW_PRECISION_FACTOR * error(low, expected) + floor(expected)

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("name", WEIGHTED)
    def test_everything_in_low_precision(self, name: str, dtype: torch.dtype) -> None:
        arguments = tuple(tensor.to(dtype) for tensor in self.draw_weighted_values(17, 80, 16, dtype))
        have, low = self.weighted(name, *arguments), getattr(reference, name)(*arguments)
        expected = getattr(reference, name)(*in_double(*arguments))
        assert have.dtype == (torch.float32 if name == "text_maps" else dtype)
        assert error(have, expected) <= LOW_PRECISION_FACTOR * error(low, expected) + floor(expected)

    # ------------------------------------------------------------------------------------------- without the values

    def draw_unformed_values(self, tokens: int, head_dim: int, texts: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        alpha, _, basis = self.draw_weighted_values(tokens, head_dim, texts, dtype)
        weight = self.draw(6, HEADS, head_dim, WIDTH, dtype=dtype) * WIDTH**-0.5
        return (
            alpha,
            self.draw(5, IMAGES, tokens, WIDTH, dtype=dtype),
            weight,
            self.draw(7, HEADS, head_dim, dtype=dtype),
            basis,
        )

    @FEW_AXES  # few texts: also without ever forming the values; many: with them
    def test_text_maps_from_tokens(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = self.draw_unformed_values(tokens, head_dim, texts, torch.float32)
        before = self.draw(8, IMAGES, tokens, texts)
        out = before.clone()
        assert ops.text_maps_from_tokens(*arguments, out, backend=self.backend) is out
        expected = before.double() + reference.text_maps_from_tokens(*in_double(*arguments))
        assert relative_error(out, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("texts", [1, 3, 100])
    def test_text_maps_from_tokens_in_low_precision(self, texts: int, dtype: torch.dtype) -> None:
        alpha, *others = self.draw_unformed_values(50, 64, texts, dtype)
        out = torch.zeros(IMAGES, 50, texts, device=self.device)
        ops.text_maps_from_tokens(alpha, *others, out, backend=self.backend)
        expected = reference.text_maps_from_tokens(*in_double(alpha, *others))
        low = reference.text_maps_from_tokens(*(part.to(dtype) for part in (alpha, *others)))
        assert error(out, expected) <= LOW_PRECISION_FACTOR * error(low, expected) + floor(expected)

    # -------------------------------------------------------------------------------------------------- over layers

    def draw_layers(
        self, tokens: int, head_dim: int, texts: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha = self.draw(1, IMAGES, LAYERS, HEADS, tokens).softmax(-1)
        values = self.draw(2, LAYERS, IMAGES, tokens, HEADS, head_dim, dtype=dtype)
        return alpha, values, self.draw(3, LAYERS, HEADS, head_dim, texts)

    @FEW_AXES
    def test_layered_text_maps(self, tokens: int, head_dim: int, texts: int) -> None:
        alpha, values, basis = self.draw_layers(tokens, head_dim, texts)
        have = ops.layered_text_maps(alpha, layered(values), basis, backend=self.backend)
        expected = reference.layered_text_maps(alpha.double(), layered(values.double()), basis.double())
        assert have.dtype == torch.float32
        assert relative_error(have, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("lay", [layered, apart, between_others, backwards, unevenly, turned, spread_out])
    @pytest.mark.parametrize("pairs", [None, [5, 0, 2], []], ids=str)
    def test_layers_wherever_they_lie(self, lay: Callable[[Tensor], list[Tensor]], pairs: list[int] | None) -> None:
        alpha, values, basis = self.draw_layers(17, 80, 5)
        heads = None if pairs is None else torch.tensor(pairs, dtype=torch.long, device=self.device)
        laid_out = lay(values)
        have = ops.layered_text_maps(alpha, laid_out, basis, heads, backend=self.backend)
        expected = reference.layered_text_maps(alpha.double(), list(values.double()), basis.double(), heads)
        assert relative_error(have, expected) <= OP_FLOAT32
        assert all(torch.equal(value, before) for value, before in zip(laid_out, values, strict=True))

    def test_one_layer_is_text_maps(self) -> None:
        alpha, value, basis = self.draw_weighted_values(50, 64, 20, torch.float32)
        have = ops.layered_text_maps(alpha[:, None], [value], basis[None], backend=self.backend)
        assert relative_error(have, reference.text_maps(*in_double(alpha, value, basis))) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", LOW)
    def test_layers_in_low_precision(self, dtype: torch.dtype) -> None:
        alpha, values, basis = self.draw_layers(50, 64, 20, dtype)
        expected = reference.layered_text_maps(alpha.double(), list(values.double()), basis.double())
        low = reference.layered_text_maps(alpha.to(dtype), list(values), basis.to(dtype))
        for weights in (alpha, alpha.to(dtype)):
            have = ops.layered_text_maps(weights, layered(values), basis, backend=self.backend)
            assert have.dtype == weights.dtype
            assert error(have, expected) <= LOW_PRECISION_FACTOR * error(low, expected) + floor(expected)

    # --------------------------------------------------------------------------------- per head, and of every token

    @FEW_AXES
    def test_head_maps(self, tokens: int, head_dim: int, texts: int) -> None:
        arguments = self.draw_weighted_values(tokens, head_dim, texts, torch.float32)
        have = ops.head_maps(*arguments, backend=self.backend)
        assert have.is_contiguous()
        assert relative_error(have, reference.head_maps(*in_double(*arguments))) <= OP_FLOAT32

    # 63, 64 and 65 tokens: tiles that hold several images, or end where an image ends, or not
    @pytest.mark.parametrize("tokens", [1, 17, 50, 63, 64, 65, 197])
    @pytest.mark.parametrize("given", ["", "shift", "scale", "shift scale"])
    def test_token_contributions(self, tokens: int, given: str) -> None:
        arguments = self.draw_weighted_values(tokens, 64, 96, torch.float32)
        shift = self.draw(4, IMAGES, 96) if "shift" in given else None
        scale = self.draw(5, IMAGES) if "scale" in given else None
        have = ops.token_contributions(*arguments, shift, scale, backend=self.backend)
        doubled = [None if tensor is None else tensor.double() for tensor in (shift, scale)]
        assert have.is_contiguous()
        assert relative_error(have, reference.token_contributions(*in_double(*arguments), *doubled)) <= OP_FLOAT32

    @pytest.mark.parametrize(
        ("tokens", "head_dim", "columns"),
        [
            *[(257, 80, 33), (577, 104, 7), (50, 80, 130), (7, 88, 1), (5, 128, 200)],
            *[(9, 65, 33), (9, 72, 20), (9, 112, 7), (9, 113, 33)],
        ],
    )
    def test_token_contributions_of_other_shapes(self, tokens: int, head_dim: int, columns: int) -> None:
        arguments = self.draw_weighted_values(tokens, head_dim, columns, torch.float32)
        shift, scale = self.draw(4, IMAGES, columns), self.draw(5, IMAGES)
        have = ops.token_contributions(*arguments, shift, scale, backend=self.backend)
        expected = reference.token_contributions(*in_double(*arguments, shift, scale))
        assert relative_error(have, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("head_dim", [64, 80])
    @pytest.mark.parametrize("name", ["head_maps", "token_contributions"])
    def test_a_float32_matrix_is_not_rounded(self, name: str, head_dim: int, dtype: torch.dtype) -> None:
        """Values in low precision are exact inputs; what bounds the write has time for 16 bits of the matrix, not 8."""
        arguments = self.draw_weighted_values(17, head_dim, 40, dtype)
        have, expected = self.weighted(name, *arguments), getattr(reference, name)(*in_double(*arguments))
        largest = getattr(reference, name)(*(tensor.abs() for tensor in in_double(*arguments)))  # Σ |alpha v M|
        assert bool(((have.double() - expected).abs() <= 2**-16 * largest).all())

    # ------------------------------------------------------------------------------------------------ all of them

    @pytest.mark.parametrize("name", WEIGHTED)
    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 2, 3), (0, 1, 3, 2)])
    def test_values_of_any_strides(self, name: str, order: tuple[int, ...]) -> None:
        """Values whose heads lie before the tokens in memory, as attention kernels lay them out, and others."""
        alpha, value, basis = self.draw_weighted_values(17, 64, 5, torch.float32)
        laid_out = value.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
        expected = getattr(reference, name)(*in_double(alpha, value, basis))
        assert relative_error(self.weighted(name, alpha, laid_out, basis), expected) <= OP_FLOAT32

    @pytest.mark.parametrize("name", WEIGHTED)
    def test_weights_and_bases_of_any_strides(self, name: str) -> None:
        _, value, _ = self.draw_weighted_values(17, 64, 6, torch.float32)
        alpha = self.draw(1, IMAGES, 17, 4, HEADS).softmax(1)[:, :, 1].transpose(1, 2)  # tokens, then heads in memory
        for basis in (
            self.draw(3, HEADS, 6, 64).transpose(1, 2),
            self.draw(3, 64, HEADS, 2, 6)[:, :, 1].transpose(0, 1),
        ):
            expected = getattr(reference, name)(*in_double(alpha, value, basis))
            assert relative_error(self.weighted(name, alpha, value, basis), expected) <= OP_FLOAT32
        same = self.draw(1, 1, 1, 17).softmax(-1).expand(IMAGES, HEADS, 17)
        expected = getattr(reference, name)(*in_double(same, value, basis))
        assert relative_error(self.weighted(name, same, value, basis), expected) <= OP_FLOAT32

    def test_shift_and_scale_of_any_strides(self) -> None:
        arguments = self.draw_weighted_values(17, 64, 6, torch.float32)
        shift, scale = self.draw(4, 6, IMAGES).T, self.draw(5, IMAGES, 3)[:, 1]
        have = ops.token_contributions(*arguments, shift, scale, backend=self.backend)
        assert relative_error(have, reference.token_contributions(*in_double(*arguments, shift, scale))) <= OP_FLOAT32

    @pytest.mark.parametrize("name", WEIGHTED)
    @pytest.mark.parametrize("extreme", [1e4, -1e4])
    def test_weights_that_are_all_on_one_token(self, name: str, extreme: float) -> None:
        _, value, basis = self.draw_weighted_values(50, 64, 5, torch.float32)
        logits = extreme * self.draw(9, IMAGES, HEADS, 50)
        arguments = logits.softmax(-1), value, basis
        expected = getattr(reference, name)(*in_double(*arguments))
        assert relative_error(self.weighted(name, *arguments), expected) <= OP_FLOAT32

    @pytest.mark.parametrize("name", WEIGHTED)
    def test_inputs_are_left_alone(self, name: str) -> None:
        arguments = self.draw_weighted_values(17, 64, 5, torch.float32)
        before = [tensor.clone() for tensor in arguments]
        self.weighted(name, *arguments)
        assert all(torch.equal(tensor, old) for tensor, old in zip(arguments, before, strict=True))

    @pytest.mark.parametrize("name", [*WEIGHTED, "layered_text_maps", "text_maps_from_tokens"])
    def test_maps_in_float64(self, name: str) -> None:
        alpha, value, basis = in_double(*self.draw_weighted_values(17, 80, 3, torch.float32))
        with nullcontext() if self.takes_float64(name) else self.refuses_float64():
            if name == "text_maps_from_tokens":
                arguments = in_double(*self.draw_unformed_values(17, 80, 3, torch.float32))
                have = torch.zeros(IMAGES, 17, 3, dtype=torch.float64, device=self.device)
                ops.text_maps_from_tokens(*arguments, have, backend=self.backend)
                expected = reference.text_maps_from_tokens(*arguments)
            elif name == "layered_text_maps":
                have = ops.layered_text_maps(alpha[:, None], [value], basis[None], backend=self.backend)
                expected = reference.text_maps(alpha, value, basis)
            else:
                have, expected = self.weighted(name, alpha, value, basis), getattr(reference, name)(alpha, value, basis)
            assert have.dtype == torch.float64
            assert error(have, expected) <= FLOAT64

    @pytest.mark.parametrize(
        ("images", "tokens", "heads", "texts"), [(0, 17, 2, 3), (2, 0, 2, 3), (2, 17, 0, 3), (2, 17, 2, 0)]
    )
    def test_nothing_of_something(self, images: int, tokens: int, heads: int, texts: int) -> None:
        """No images, tokens, heads or texts: an empty result, or a sum of nothing."""
        alpha, basis = self.draw(1, images, heads, tokens), self.draw(3, heads, 64, texts)
        value = self.draw(2, images, tokens, 3, heads, 64)[:, :, 2]
        before = self.draw(4, images, tokens, texts)
        out = ops.text_maps(alpha, value, basis, before.clone(), backend=self.backend)
        assert torch.equal(out, before)
        for name in ("head_maps", "token_contributions"):
            assert torch.equal(self.weighted(name, alpha, value, basis), getattr(reference, name)(alpha, value, basis))
        nothing = torch.zeros_like(before)
        have = ops.layered_text_maps(alpha[:, None], [value], basis[None], backend=self.backend)
        assert torch.equal(have, nothing)
        none = ops.layered_text_maps(alpha[:, None][:, :0], [], basis[None][:0], backend=self.backend)
        assert torch.equal(none, nothing)
