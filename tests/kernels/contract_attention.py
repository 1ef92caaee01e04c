"""Attention and its rows: the definition in float64 is the truth, whatever the backend, dtype or strides."""

from itertools import product

import pytest
import torch
from contracting import HEAD_DIMS, HEADS, IMAGES, LOW, SHAPES, TOKENS, WIDTH, Contract, floor, in_double
from measures import error, relative_error, relative_norm
from tolerances import FLOAT64, LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

EITHER_ROW = pytest.mark.parametrize("row", ["cls", "mean"])
# The longest with few heads, and once each: an interpreter runs these too.
LONG = ((577, 64, "cls"), (577, 80, "mean"))
ATTENTIONS = [(n, e, row) for n, e, row in product(TOKENS, HEAD_DIMS, ("cls", "mean")) if n < 577] + list(LONG)
LOW_ATTENTIONS = [(50, 64, torch.bfloat16), (50, 80, torch.bfloat16), (17, 104, torch.bfloat16)]
LOW_ATTENTIONS += [(50, 72, torch.bfloat16), (17, 65, torch.bfloat16), (17, 113, torch.float16)]
LOW_ATTENTIONS += [(257, 64, torch.bfloat16), (17, 80, torch.float16), (257, 64, torch.float16)]
# 72 in SO400M, 88 in g/14; 65 and 113 are codes one wider than a head.
OTHER_HEAD_DIMS = (1, 16, 20, 32, 40, 65, 72, 88, 96, 112, 113, 128, 160, 256)
# Tokens of images of 512 pixels in patches of 16 and 8, and of 518 and 672 pixels in patches of 14.
MANY_TOKENS = [(1025, 72, "cls"), (1370, 64, "mean"), (2305, 72, "mean"), (4097, 64, "mean")]
WEIGHTED_MANY = [(1025, 64, 3), (4097, 72, 1)]
# (0, 1, 2, 3, 4) packs queries, keys and values; the others lie in memory in any order.
ORDERS = pytest.mark.parametrize("order", [(0, 2, 3, 1, 4), (0, 3, 1, 2, 4), (2, 1, 0, 3, 4), (0, 1, 2, 3, 4)])


class AttentionContract(Contract):
    """``attention``, ``query_row`` and ``query_row_from_tokens``."""

    def attention(self, qkv: Tensor, row: reference.Row | None) -> tuple[Tensor, Tensor | None]:
        return ops.attention(qkv, row, backend=self.backend)

    # ---------------------------------------------------------------------------------------------- attention

    @pytest.mark.parametrize(
        ("tokens", "head_dim", "row"), [pytest.param(*case, id="N{}-E{}-{}".format(*case)) for case in ATTENTIONS]
    )
    def test_attention(self, tokens: int, head_dim: int, row: reference.Row) -> None:
        qkv = self.draw(0, IMAGES if tokens < 200 else 1, tokens, 3, HEADS if tokens < 500 else 1, head_dim)
        if row == "mean" and tokens == 1:
            with pytest.raises(ValueError, match="no token but the first"):
                self.attention(qkv, row)
            return
        before = qkv.clone()
        out, alpha = self.attention(qkv, row)
        expected_out, expected_alpha = reference.attention(qkv.double(), row)
        assert out.dtype == alpha.dtype == torch.float32
        assert relative_norm(out, expected_out) <= OP_FLOAT32
        assert relative_error(alpha, expected_alpha) <= OP_FLOAT32
        if tokens <= 197:  # of longer rows the worst single entry is beyond what float32 sums can promise
            assert relative_error(out, expected_out) <= OP_FLOAT32
        assert torch.equal(qkv, before)

    @pytest.mark.parametrize(("tokens", "head_dim", "row"), MANY_TOKENS)
    def test_attention_of_many_tokens(self, tokens: int, head_dim: int, row: reference.Row) -> None:
        qkv = self.draw(0, 1, tokens, 3, 1, head_dim)
        out, alpha = self.attention(qkv, row)
        expected_out, expected_alpha = reference.attention(qkv.double(), row)
        assert relative_norm(out, expected_out) <= OP_FLOAT32
        assert relative_error(alpha, expected_alpha) <= OP_FLOAT32

    @EITHER_ROW
    @pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
    def test_attention_of_other_head_dims(self, head_dim: int, row: reference.Row) -> None:
        qkv = self.draw(0, 1, 19, 3, HEADS, head_dim)
        for have, expected in zip(self.attention(qkv, row), reference.attention(qkv.double(), row), strict=True):
            assert relative_error(have, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("tokens", [1, 17, 257])  # a class token alone, with the patches, and apart from them
    def test_attention_without_weights(self, tokens: int) -> None:
        qkv = self.draw(0, 1, tokens, 3, HEADS, 64)
        out, alpha = self.attention(qkv, None)
        assert alpha is None
        assert relative_norm(out, reference.attention(qkv.double())[0]) <= OP_FLOAT32

    @EITHER_ROW
    @ORDERS
    def test_attention_of_any_strides(self, order: tuple[int, ...], row: reference.Row) -> None:
        """The last axis is contiguous, the others lie in memory in any order, with gaps."""
        contiguous = self.draw(0, IMAGES, 17, 3, HEADS, 64)
        wide = contiguous.new_full([*(contiguous.shape[axis] for axis in order[:-1]), 72], torch.nan)
        wide[..., :64] = contiguous.permute(order)
        qkv = wide[..., :64].permute([order.index(axis) for axis in range(5)])
        assert torch.equal(qkv, contiguous)
        assert not qkv.is_contiguous()
        for have, expected in zip(self.attention(qkv, row), reference.attention(contiguous.double(), row), strict=True):
            assert relative_error(have, expected) <= OP_FLOAT32

    @EITHER_ROW
    def test_attention_of_a_last_axis_with_gaps(self, row: reference.Row) -> None:
        qkv = self.draw(0, 1, 17, 3, HEADS, 32)[..., ::2]
        for have, expected in zip(self.attention(qkv, row), reference.attention(qkv.double(), row), strict=True):
            assert relative_error(have, expected) <= OP_FLOAT32

    @EITHER_ROW
    @pytest.mark.parametrize("sign", [1, -1])
    def test_attention_with_extreme_logits(self, row: reference.Row, sign: int) -> None:
        """Logits of ±10⁴ − n: exact in float32 because head_dim 64 scales by 1/8; exp() of them overflows."""
        qkv = self.draw(0, IMAGES, 6, 3, HEADS, 64)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0] = 8
        qkv[:, :, 1, :, 0] = sign * 1e4 - torch.arange(6.0, device=self.device)[:, None]
        out, alpha = self.attention(qkv, row)
        geometric = torch.exp(-torch.arange(6.0, dtype=torch.float64, device=self.device))
        assert relative_error(alpha, (geometric / geometric.sum()).expand(IMAGES, HEADS, 6)) <= OP_FLOAT32
        assert relative_error(out, reference.attention(qkv.double(), row)[0]) <= OP_FLOAT32

    @EITHER_ROW
    def test_attention_that_is_all_on_one_token(self, row: reference.Row) -> None:
        qkv = self.draw(0, IMAGES, 6, 3, HEADS, 64)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0] = 8
        qkv[:, :, 1, :, 0] = -1e4
        qkv[:, 4, 1, :, 0] = 1e4
        out, alpha = self.attention(qkv, row)
        assert torch.equal(alpha, torch.eye(6, device=self.device)[4].expand_as(alpha))
        assert error(out, qkv[:, 4:5, 2].expand_as(out)) == 0

    @EITHER_ROW
    @pytest.mark.parametrize(("tokens", "head_dim", "dtype"), LOW_ATTENTIONS)
    def test_attention_in_low_precision(
        self, tokens: int, head_dim: int, dtype: torch.dtype, row: reference.Row
    ) -> None:
        qkv = self.draw(0, IMAGES if tokens < 100 else 1, tokens, 3, HEADS, head_dim, dtype=dtype)
        have = self.attention(qkv, row)
        assert have[0].dtype == dtype
        assert have[1].dtype == torch.float32
        exact = reference.attention(qkv.double(), row)
        for got, plain, expected in zip(have, reference.attention(qkv, row), exact, strict=True):
            assert error(got, expected) <= LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)
        if row == "cls":
            assert relative_error(have[1], exact[1]) <= OP_FLOAT32

    @EITHER_ROW
    def test_attention_in_float64(self, row: reference.Row) -> None:
        qkv = self.draw(0, IMAGES, 17, 3, HEADS, 64).double()
        if not self.takes_float64("attention"):
            with self.refuses_float64():
                self.attention(qkv, row)
            return
        for have, expected in zip(self.attention(qkv, row), reference.attention(qkv, row), strict=True):
            assert have.dtype == torch.float64
            assert relative_error(have, expected) <= FLOAT64

    @EITHER_ROW
    def test_attention_of_no_images(self, row: reference.Row) -> None:
        out, alpha = self.attention(self.draw(0, 0, 17, 3, HEADS, 64), row)
        assert out.shape == (0, 17, HEADS, 64)
        assert alpha.shape == (0, HEADS, 17)

    # ---------------------------------------------------------------------------------- weighted sums of rows

    def draw_weighted(
        self, tokens: int, head_dim: int, groups: int, dtype: torch.dtype = torch.float32, images: int = IMAGES
    ) -> tuple[Tensor, Tensor]:
        """Queries, keys and values, and weights of either sign, some of them 0."""
        weights = self.draw(1, images, groups, tokens)
        weights[..., ::3] = 0
        return self.draw(0, images, tokens, 3, HEADS, head_dim, dtype=dtype), weights

    def assert_weighted_rows(self, qkv: Tensor, weights: Tensor) -> None:
        """As the definition has them, relative to what is summed: weights of both signs cancel."""
        before = qkv.clone(), weights.clone()
        rows = ops.weighted_rows(qkv, weights, backend=self.backend)
        expected = reference.weighted_rows(qkv.double(), weights.double())
        terms = reference.weighted_rows(qkv.double(), weights.double().abs())
        assert rows.dtype == torch.float32
        assert rows.shape == expected.shape
        assert rows.is_contiguous()
        assert error(rows, expected) <= OP_FLOAT32 * float(terms.abs().max())
        assert torch.equal(qkv, before[0])
        assert torch.equal(weights, before[1])

    @pytest.mark.parametrize(
        ("tokens", "head_dim"), [(n, e) for n, e in product(TOKENS, HEAD_DIMS) if n < 197] + [(197, 80), (257, 64)]
    )
    def test_weighted_rows(self, tokens: int, head_dim: int) -> None:
        self.assert_weighted_rows(*self.draw_weighted(tokens, head_dim, 3, images=IMAGES if tokens < 100 else 1))

    @pytest.mark.parametrize(("tokens", "head_dim", "groups"), WEIGHTED_MANY)
    def test_weighted_rows_of_many_tokens(self, tokens: int, head_dim: int, groups: int) -> None:
        qkv, weights = self.draw_weighted(tokens, head_dim, groups, images=1)
        self.assert_weighted_rows(qkv[:, :, :, :1], weights)

    @pytest.mark.parametrize("groups", [1, 2, 5, 12, 16, 17, 40])
    def test_weighted_rows_of_any_number_of_weightings(self, groups: int) -> None:
        self.assert_weighted_rows(*self.draw_weighted(70, 64, groups, images=1))

    @pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
    def test_weighted_rows_of_other_head_dims(self, head_dim: int) -> None:
        self.assert_weighted_rows(*self.draw_weighted(19, head_dim, 3, images=1))

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("head_dim", [64, 80])
    def test_weighted_rows_in_low_precision(self, head_dim: int, dtype: torch.dtype) -> None:
        """In float32 whatever the queries and keys are."""
        self.assert_weighted_rows(*self.draw_weighted(50, head_dim, 3, dtype))

    def test_weighted_rows_of_one_query_are_its_row(self) -> None:
        qkv, _ = self.draw_weighted(19, 64, 1)
        weights = torch.eye(19, device=self.device).expand(IMAGES, 19, 19)
        rows = ops.weighted_rows(qkv, weights, backend=self.backend)
        assert relative_error(rows[:, 0], reference.attention(qkv.double())[1]) <= OP_FLOAT32
        assert relative_error(rows[:, 1:].mean(1), reference.attention(qkv.double(), "mean")[1]) <= OP_FLOAT32

    def test_weighted_rows_of_weights_of_zero(self) -> None:
        qkv, weights = self.draw_weighted(19, 64, 3)
        assert not ops.weighted_rows(qkv, torch.zeros_like(weights), backend=self.backend).any()

    @ORDERS
    def test_weighted_rows_of_any_strides(self, order: tuple[int, ...]) -> None:
        contiguous, weights = self.draw_weighted(17, 64, 3)
        wide = contiguous.new_full([*(contiguous.shape[axis] for axis in order[:-1]), 72], torch.nan)
        wide[..., :64] = contiguous.permute(order)
        qkv = wide[..., :64].permute([order.index(axis) for axis in range(5)])
        for scattered in (
            weights.permute(1, 2, 0).contiguous().permute(2, 0, 1),
            torch.stack([weights] * 2, -1)[..., 0],
        ):
            rows = ops.weighted_rows(qkv, scattered, backend=self.backend)
            assert relative_error(rows, reference.weighted_rows(contiguous.double(), weights.double())) <= OP_FLOAT32

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("tokens", [6, 70])
    def test_weighted_rows_with_extreme_logits(self, tokens: int, sign: int) -> None:
        """Logits of ±10⁴ − n, in one tile and in several: every row is the same."""
        qkv, weights = self.draw_weighted(tokens, 64, 3)
        qkv[:, :, :2] = 0
        qkv[:, :, 0, :, 0] = 8
        qkv[:, :, 1, :, 0] = sign * 1e4 - torch.arange(float(tokens), device=self.device)[:, None]
        geometric = torch.exp(-torch.arange(float(tokens), dtype=torch.float64, device=self.device))
        rows = ops.weighted_rows(qkv, weights.abs(), backend=self.backend)
        expected = weights.abs().double().sum(-1)[..., None] * (geometric / geometric.sum())
        assert relative_error(rows, expected[:, :, None].expand_as(rows)) <= OP_FLOAT32

    def test_weighted_rows_in_float64(self) -> None:
        qkv, weights = in_double(*self.draw_weighted(17, 64, 3))
        if not self.takes_float64("weighted_rows"):
            with self.refuses_float64():
                ops.weighted_rows(qkv, weights, backend=self.backend)
            return
        rows = ops.weighted_rows(qkv, weights, backend=self.backend)
        assert rows.dtype == torch.float64
        assert relative_error(rows, reference.weighted_rows(qkv, weights)) <= FLOAT64

    def test_weighted_rows_of_nothing(self) -> None:
        qkv, weights = self.draw_weighted(17, 64, 3)
        for images, tokens, groups in ((0, 17, 3), (3, 0, 3), (3, 17, 0)):
            given = qkv[:images, :tokens], weights[:images, :groups, :tokens]
            rows = ops.weighted_rows(*given, backend=self.backend)
            assert rows.shape == (images, groups, HEADS, tokens)

    # ------------------------------------------------------------------------------------ one query's attention

    def query_row(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return ops.query_row(*arguments, backend=self.backend)

    def draw_row(self, tokens: int, head_dim: int, dtype: torch.dtype, images: int = IMAGES) -> tuple[Tensor, ...]:
        """A query per image, and keys and values with the strides that they have side by side."""
        packed = self.draw(1, images, tokens, 2, HEADS, head_dim, dtype=dtype)
        return self.draw(0, images, HEADS, head_dim, dtype=dtype), packed[:, :, 0], packed[:, :, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW])
    @pytest.mark.parametrize(
        ("tokens", "head_dim"), [(n, e) for n, e in product(TOKENS, HEAD_DIMS) if n < 257] + [(257, 64), (577, 80)]
    )
    def test_query_row(self, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        """In float32 whatever the inputs are."""
        arguments = self.draw_row(tokens, head_dim, dtype, IMAGES if tokens < 100 else 1)
        before = [argument.clone() for argument in arguments]
        have = self.query_row(*arguments)
        for got, expected in zip(have, reference.query_row(*in_double(*arguments)), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, expected) <= OP_FLOAT32
        assert all(torch.equal(argument, was) for argument, was in zip(arguments, before, strict=True))

    @pytest.mark.parametrize("head_dim", [*OTHER_HEAD_DIMS, 300])
    def test_query_row_of_other_head_dims(self, head_dim: int) -> None:
        arguments = self.draw_row(19, head_dim, torch.float32)
        for got, expected in zip(self.query_row(*arguments), reference.query_row(*in_double(*arguments)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    def test_query_row_of_one_query_for_all(self) -> None:
        """A learned query, in another precision than the tokens and not repeated in memory."""
        _, key, value = self.draw_row(17, 64, torch.bfloat16)
        learned = self.draw(2, HEADS, 64).expand(IMAGES, HEADS, 64)
        have = self.query_row(learned, key, value)
        for got, expected in zip(have, reference.query_row(*in_double(learned, key, value)), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, expected) <= OP_FLOAT32

    def test_query_row_of_any_strides(self) -> None:
        contiguous = self.draw_row(17, 64, torch.float32)
        query, key, value = contiguous
        wide = torch.full((IMAGES, HEADS, 17, 128), torch.nan, device=self.device)
        wide[..., ::2] = value.transpose(1, 2)
        scattered = (
            query.transpose(0, 1).contiguous().transpose(0, 1),
            key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
            wide[..., ::2].transpose(1, 2),
        )
        assert not any(tensor.is_contiguous() for tensor in scattered)
        for got, expected in zip(self.query_row(*scattered), reference.query_row(*in_double(*contiguous)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("tokens", [6, 70])
    def test_query_row_with_extreme_scores(self, tokens: int, sign: int) -> None:
        """Logits of ±10⁴ − n, in one tile and in several."""
        query, key, value = self.draw_row(tokens, 64, torch.float32)
        query[:], key[:] = 0, 0
        query[..., 0] = 8
        key[..., 0] = sign * 1e4 - torch.arange(float(tokens), device=self.device)[:, None]
        z, alpha = self.query_row(query, key, value)
        geometric = torch.exp(-torch.arange(float(tokens), dtype=torch.float64, device=self.device))
        assert relative_error(alpha, (geometric / geometric.sum()).expand(IMAGES, HEADS, tokens)) <= OP_FLOAT32
        assert relative_error(z, reference.query_row(*in_double(query, key, value))[0]) <= OP_FLOAT32

    def test_query_row_that_is_all_on_one_token(self) -> None:
        query, key, value = self.draw_row(70, 64, torch.float32)
        query[:], key[:] = 0, 0
        query[..., 0], key[..., 0], key[:, 68, :, 0] = 8, -1e4, 1e4
        z, alpha = self.query_row(query, key, value)
        assert torch.equal(alpha, torch.eye(70, device=self.device)[68].expand_as(alpha))
        assert torch.equal(z, value[:, 68])

    def test_query_row_of_no_images(self) -> None:
        z, alpha = self.query_row(*(tensor[:0] for tensor in self.draw_row(17, 64, torch.float32)))
        assert z.shape == (0, HEADS, 64)
        assert alpha.shape == (0, HEADS, 17)

    def test_query_row_in_float64(self) -> None:
        arguments = in_double(*self.draw_row(17, 64, torch.float32))
        if not self.takes_float64("query_row"):
            with self.refuses_float64():
                self.query_row(*arguments)
            return
        for have, expected in zip(self.query_row(*arguments), reference.query_row(*arguments), strict=True):
            assert have.dtype == torch.float64
            assert relative_error(have, expected) <= FLOAT64

    # ------------------------------------------------------------------------- one query's attention, unformed keys

    def draw_query(self, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = [
            (IMAGES, HEADS, head_dim),
            (IMAGES, tokens, WIDTH),
            *[(HEADS, head_dim, WIDTH)] * 2,
            (HEADS, head_dim),
        ]
        scales = [1, 1, WIDTH**-0.5, WIDTH**-0.5, 1]
        return tuple(self.draw(i, *s, dtype=dtype) * f for i, (s, f) in enumerate(zip(shapes, scales, strict=True)))

    @pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
    def test_query_row_from_tokens(self, tokens: int, head_dim: int) -> None:
        arguments = self.draw_query(tokens, head_dim, torch.float32)
        have = ops.query_row_from_tokens(*arguments, backend=self.backend)
        for got, expected in zip(have, reference.query_row_from_tokens(*in_double(*arguments)), strict=True):
            assert got.dtype == torch.float32
            assert relative_error(got, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("head_dim", [64, 80, 104])
    def test_query_row_from_tokens_in_low_precision(self, head_dim: int, dtype: torch.dtype) -> None:
        arguments = self.draw_query(50, head_dim, dtype)
        have = ops.query_row_from_tokens(*arguments, backend=self.backend)
        plain = reference.query_row_from_tokens(*arguments)
        expected = reference.query_row_from_tokens(*in_double(*arguments))
        for got, low, exact in zip(have, plain, expected, strict=True):
            assert got.dtype == torch.float32
            assert error(got, exact) <= LOW_PRECISION_FACTOR * error(low, exact) + floor(exact)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_query_row_from_tokens_with_extreme_logits(self, sign: int) -> None:
        query, tokens, key_weight, value_weight, value_bias = self.draw_query(6, 64, torch.float32)
        query[:], key_weight[:] = 0, 0
        query[..., 0], key_weight[:, 0, 0] = 8, 1
        tokens[:, :, 0] = sign * 1e4 - torch.arange(6.0, device=self.device)
        arguments = (query, tokens, key_weight, value_weight, value_bias)
        z, alpha = ops.query_row_from_tokens(*arguments, backend=self.backend)
        geometric = torch.exp(-torch.arange(6.0, dtype=torch.float64, device=self.device))
        assert relative_error(alpha, (geometric / geometric.sum()).expand(IMAGES, HEADS, 6)) <= OP_FLOAT32
        assert relative_error(z, reference.query_row_from_tokens(*in_double(*arguments))[0]) <= OP_FLOAT32

    def test_query_row_from_tokens_of_no_images(self) -> None:
        query, tokens, *weights = self.draw_query(17, 64, torch.float32)
        z, alpha = ops.query_row_from_tokens(query[:0], tokens[:0], *weights, backend=self.backend)
        assert z.shape == (0, HEADS, 64)
        assert alpha.shape == (0, HEADS, 17)

    def test_query_row_from_tokens_of_any_strides(self) -> None:
        contiguous = self.draw_query(17, 64, torch.float32)
        scattered = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in contiguous]
        scattered[1] = torch.stack([contiguous[1]] * 2, -1)[..., 0]
        assert not any(tensor.is_contiguous() for tensor in scattered)
        have = ops.query_row_from_tokens(*scattered, backend=self.backend)
        for got, expected in zip(have, reference.query_row_from_tokens(*in_double(*contiguous)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32
