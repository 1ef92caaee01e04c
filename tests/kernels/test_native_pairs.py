"""Attention and its rows in bfloat16 by pairs: AVX512-BF16 has instructions for it, and other CPUs emulate them here.

Most of the contract's tests of attention are in float32, which is not multiplied in pairs. Here they are in bfloat16,
with the cases that only pairs can get wrong.
"""

import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from contract_attention import EITHER_ROW, ORDERS
from contracting import HEADS, IMAGES, Contract, draw, floor
from measures import error, relative_error, relative_norm
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32, SDPA_FACTOR
from torch import Tensor

from clipfast.kernels import native, ops, reference

SHAPES = [*product((1, 2, 6, 17, 50, 197), (64, 80)), (257, 64), (19, 88), (19, 96), (19, 104), (19, 128)]
SHAPES += [(7, 1), (12, 20), (33, 33), (16, 2), (65, 7), (5, 129)]  # widths that leave a part of a pair, or of 16 bytes
ATTENTIONS = [(*shape, row) for shape, row in product(SHAPES, ("cls", "mean")) if shape[0] > 1 or row == "cls"]
ATTENTIONS += [(577, 64, "cls"), (577, 80, "mean")]
NORMAL = 2.0**-126
"""The instructions flush smaller values to zero."""


def attention(qkv: Tensor, row: reference.Row | None = "cls") -> tuple[Tensor, Tensor | None]:
    return ops.attention(qkv, row, backend="native")


def assert_close(have: tuple[Tensor, Tensor | None], qkv: Tensor, row: reference.Row) -> None:
    """Values are as accurate as the definition in bfloat16, and the weights returned are those of float32."""
    (out, alpha), (expected, expected_alpha) = have, reference.attention(qkv.double(), row)
    assert out.dtype == torch.bfloat16
    assert alpha is not None
    assert alpha.dtype == torch.float32
    assert error(out, expected) <= LOW_PRECISION_FACTOR * error(reference.attention(qkv, row)[0], expected) + floor(
        expected
    )
    assert relative_error(alpha, expected_alpha) <= OP_FLOAT32


class Pairs(Contract):
    """Not collected; a class per instruction set inherits it."""

    backend = "native"
    isa: str

    @pytest.fixture(autouse=True)
    def _in_pairs(self) -> Iterator[None]:
        isa, pairs = native.isa(), native.emulate_bf16_pairs(True)
        try:
            if native.limit(self.isa) != self.isa:
                pytest.skip(f"this CPU has no {self.isa}")
            yield
        finally:
            native.limit(isa)
            native.emulate_bf16_pairs(pairs)

    @pytest.mark.parametrize(("tokens", "head_dim", "row"), ATTENTIONS)
    def test_definition(self, tokens: int, head_dim: int, row: reference.Row) -> None:
        qkv = draw(0, IMAGES if tokens < 100 else 1, tokens, 3, HEADS, head_dim, dtype=torch.bfloat16)
        before = qkv.clone()
        assert_close(attention(qkv, row), qkv, row)
        assert torch.equal(qkv, before)

    def test_pairs_are_in_use(self) -> None:
        """Weights rounded to bfloat16 give larger errors than the kernel of floats."""
        if self.isa == "avx512_bf16":
            pytest.skip("no other kernel of bfloat16 runs there")
        qkv = draw(0, 1, 50, 3, HEADS, 64, dtype=torch.bfloat16)
        expected = reference.attention(qkv.double())[0]
        pairs = relative_norm(attention(qkv)[0], expected)
        native.emulate_bf16_pairs(False)
        assert relative_norm(attention(qkv)[0], expected) < 0.9 * pairs

    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_weighted_rows(self, tokens: int, head_dim: int) -> None:
        """Products of pairs are exact: rows are those of float32."""
        qkv = draw(0, IMAGES if tokens < 100 else 1, tokens, 3, HEADS, head_dim, dtype=torch.bfloat16)
        weights = draw(1, len(qkv), 5, tokens)
        rows = ops.weighted_rows(qkv, weights, backend="native")
        expected = reference.weighted_rows(qkv.double(), weights.double())
        terms = reference.weighted_rows(qkv.double(), weights.double().abs())
        assert error(rows, expected) <= OP_FLOAT32 * float(terms.max())

    @pytest.mark.parametrize("tokens", [50, 197, 257, 577])
    def test_errors_are_those_of_torchs_attention(self, tokens: int) -> None:
        """Both multiply bfloat16, sum in float32, and round weights and results."""
        ours, torchs = 0.0, 0.0
        for seed in range(4):
            qkv = draw(seed, 1, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
            expected = reference.attention(qkv.double())[0]
            ours += relative_norm(attention(qkv)[0], expected)
            query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
            sdpa = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            torchs += relative_norm(sdpa.transpose(1, 2), expected)
        assert ours <= SDPA_FACTOR * torchs

    @pytest.mark.parametrize("tokens", [1, 17])
    def test_without_weights(self, tokens: int) -> None:
        qkv = draw(0, IMAGES, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
        out, alpha = attention(qkv, None)
        assert alpha is None
        assert torch.equal(out, attention(qkv, "cls")[0])

    @EITHER_ROW
    @ORDERS
    def test_any_strides(self, order: tuple[int, ...], row: reference.Row) -> None:
        """Axes in any order in memory, rows with gaps, and a start between two pairs."""
        contiguous = draw(0, IMAGES, 17, 3, HEADS, 64, dtype=torch.bfloat16)
        shape = [*(contiguous.shape[axis] for axis in order[:-1]), 73]
        wide = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        wide[..., 1:65] = contiguous.permute(order)
        qkv = wide[..., 1:65].permute([order.index(axis) for axis in range(5)])
        for have, expected in zip(attention(qkv, row), attention(contiguous, row), strict=True):
            assert torch.equal(have, expected)
        gaps = torch.stack([contiguous] * 2, -1)[..., 0]
        assert gaps.stride(-1) == 2
        assert torch.equal(attention(gaps, row)[0], attention(contiguous, row)[0])

    @EITHER_ROW
    def test_all_on_one_token(self, row: reference.Row) -> None:
        qkv = draw(0, IMAGES, 6, 3, HEADS, 64, dtype=torch.bfloat16)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 8, -1e4
        qkv[:, 4, 1, :, 0] = 1e4
        out, alpha = attention(qkv, row)
        assert torch.equal(alpha, torch.eye(6)[4].expand(IMAGES, HEADS, 6))
        assert torch.equal(out, qkv[:, 4:5, 2].expand_as(out))

    def test_no_images(self) -> None:
        out, alpha = attention(draw(0, 0, 17, 3, HEADS, 64, dtype=torch.bfloat16))
        assert out.shape == (0, 17, HEADS, 64)
        assert alpha.shape == (0, HEADS, 17)

    @pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize("head_dim", [20, 33])
    def test_infinities_and_nan_are_those_of_floats(self, what: float, part: int, head_dim: int) -> None:
        """In either entry of a pair, and where a pair is half empty."""
        for token, entry in ((0, 0), (3, 1), (16, head_dim - 1)):
            qkv = draw(0, 1, 17, 3, HEADS, head_dim, dtype=torch.bfloat16)
            qkv[0, token, part, 0, entry] = what
            have = attention(qkv, "mean")
            expected = reference.attention(qkv.float(), "mean")
            for got, exact in zip(have, expected, strict=True):
                assert torch.equal(got.isnan(), exact.isnan())
                assert torch.equal(got.isposinf(), exact.isposinf())
                assert torch.equal(got.isneginf(), exact.isneginf())

    def test_denormal_values_count_as_zero(self) -> None:
        """Of values, queries and keys; the error is below the smallest normal number per token."""
        tokens = 17
        tiny = torch.tensor([2.0**-127, -(2.0**-130), 2.0**-133, NORMAL, -NORMAL, 2.0**-120], dtype=torch.bfloat16)
        assert tiny.double()[2] != 0
        qkv = draw(0, IMAGES, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
        qkv[:, :, 2] = tiny[torch.arange(IMAGES * tokens * HEADS * 64) % 6].view(IMAGES, tokens, HEADS, 64)
        out, alpha = attention(qkv)
        expected, expected_alpha = reference.attention(qkv.double())
        assert error(out, expected) <= tokens * NORMAL + 2.0**-8 * float(expected.abs().max())
        assert relative_error(alpha, expected_alpha) <= OP_FLOAT32
        for part in (0, 1):
            qkv = draw(0, IMAGES, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
            qkv[:, :, part, :, ::3] = tiny[0]
            assert_close(attention(qkv), qkv, "cls")

    def test_results_do_not_depend_on_the_number_of_threads(self) -> None:
        qkv = draw(0, 3, 19, 3, 2, 24, dtype=torch.bfloat16)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = attention(qkv, "mean")
            for count in range(2, (os.cpu_count() or 1) + 3):
                torch.set_num_threads(count)
                for have, one in zip(attention(qkv, "mean"), expected, strict=True):
                    assert torch.equal(have, one)
        finally:
            torch.set_num_threads(before)


class TestGeneric(Pairs):
    isa = "generic"


class TestAvx2(Pairs):
    isa = "avx2"


class TestAvx512Bf16(Pairs):
    isa = "avx512_bf16"

    @pytest.mark.parametrize("tokens", [17, 50, 197])
    def test_emulation_agrees_with_the_instruction(self, tokens: int) -> None:
        """Products are summed in the same order; only the sums of the softmax run over other numbers of lanes."""
        qkv = draw(0, IMAGES, tokens, 3, HEADS, 64, dtype=torch.bfloat16)
        out, alpha = attention(qkv)
        native.limit("avx2")
        emulated, same = attention(qkv)
        assert relative_error(alpha, same) <= OP_FLOAT32
        assert float((out != emulated).float().mean()) <= 0.01  # where the sum's last bit changed a rounding
