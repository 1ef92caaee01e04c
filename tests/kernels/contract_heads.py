"""Moments of codes and TEXTSPAN: the definition in float64 is the truth."""

import pytest
import torch
from contracting import LOW, Contract, in_double
from measures import error, relative_error
from tolerances import FLOAT64, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import ops, reference

EXTRA = 3  # entries of a code that all heads share: 1, μ and σ
CODES = [(1, 1, 64), (3, 2, 64), (33, 2, 64), (8, 2, 80), (5, 1, 104), (2, 3, 1)]  # images, heads, entries of a code
CODES += [(4, 2, 65), (4, 1, 72), (3, 1, 88), (3, 1, 112), (3, 1, 113)]
SPANS = [
    (1, 1, 1),
    (2, 3, 5),
    (40, 8, 3),
    (300, 16, 12),
    (333, 19, 24),
    (150, 67, 5),
    (1200, 24, 4),
]  # texts, rank, size


class MomentsContract(Contract):
    """``moments``."""

    def sums(self, groups: int, columns: int) -> tuple[Tensor, Tensor]:
        """Totals to start from."""
        options = {"dtype": torch.float64, "device": self.device}
        return torch.zeros(groups, columns, **options), torch.zeros(groups, columns, columns, **options)

    def moments(self, codes: Tensor, shared: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        total, second = self.sums(*centre.shape)
        ops.moments(codes, shared, centre, total, second, backend=self.backend)
        return total, second

    @pytest.mark.parametrize(("images", "groups", "entries"), CODES)
    def test_moments_are_added_to_what_is_there(self, images: int, groups: int, entries: int) -> None:
        columns = entries + EXTRA
        arguments = self.draw(0, images, groups, entries), self.draw(1, images, EXTRA), self.draw(2, groups, columns)
        before = self.draw(3, groups, columns).double(), self.draw(4, groups, columns, columns).double()
        have = before[0].clone(), before[1].clone()
        assert ops.moments(*arguments, *have, backend=self.backend) is None
        for got, was, expected in zip(have, before, reference.moments(*in_double(*arguments)), strict=True):
            assert got.dtype == torch.float64
            assert relative_error(got - was, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("extra", [0, 1, 40])
    def test_moments_with_more_or_fewer_shared_entries(self, extra: int) -> None:
        arguments = self.draw(0, 5, 2, 20), self.draw(1, 5, extra), self.draw(2, 2, 20 + extra)
        for got, expected in zip(self.moments(*arguments), reference.moments(*in_double(*arguments)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("dtype", LOW)
    def test_moments_of_low_precision_codes_are_not_rounded_again(self, dtype: torch.dtype) -> None:
        shapes = ((9, 2, 64), (9, EXTRA), (2, 67))
        arguments = [self.draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
        for got, expected in zip(self.moments(*arguments), reference.moments(*in_double(*arguments)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    @pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
    def test_moments_of_codes_of_any_strides(self, order: tuple[int, ...]) -> None:
        """Axes in any order in memory, with gaps; shared entries that are a column of something else."""
        codes, shared, centre = self.draw(0, 7, 3, 32), self.draw(1, EXTRA, 7).T, self.draw(2, 70, 3)[::2].T
        wide = codes.new_full([size + 5 for size in (codes.shape[axis] for axis in order)], torch.nan)
        strided = wide[tuple(slice(codes.shape[axis]) for axis in order)]
        strided.copy_(codes.permute(order))
        strided = strided.permute([order.index(axis) for axis in range(3)])
        assert not strided.is_contiguous()
        have = self.moments(strided, shared, centre)
        for got, expected in zip(have, reference.moments(*in_double(codes, shared, centre)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    def test_moments_of_layers_and_heads(self) -> None:
        """Codes ``[B, L, H, E]`` of one layer out of several, as a view."""
        codes = self.draw(0, 5, 3, 2, 64)
        arguments = codes[:, 1], self.draw(1, 5, EXTRA), self.draw(2, 2, 67)
        for got, expected in zip(self.moments(*arguments), reference.moments(*in_double(*arguments)), strict=True):
            assert relative_error(got, expected) <= OP_FLOAT32

    def test_a_centre_near_a_large_mean_keeps_the_covariance(self) -> None:
        """Means 1000 times the spread: uncentred squares would leave one digit of the covariance in float32."""
        spread, images = self.draw(0, 200, 2, 24), 200
        far = self.draw(1, 1, 2, 24) + 1000
        codes = spread + far
        shared = self.draw(2, images, EXTRA) + 1000
        centre = torch.cat([codes[:4].mean(0), shared[:4].mean(0).expand(2, -1)], 1)
        total, second = self.moments(codes, shared, centre)
        mean = total / images
        have = second / images - mean[:, :, None] * mean[:, None]
        joined = torch.cat([codes, shared[:, None].expand(-1, 2, -1)], 2).double()
        expected = torch.stack([torch.cov(joined[:, head].T, correction=0) for head in range(2)])
        assert relative_error(have, expected) <= 1e-5

    def test_moments_of_integers_are_exact_however_they_are_batched(self) -> None:
        """Sums of small integers round nowhere: three uneven batches, two merged shards and one batch are the same."""
        codes, shared = (8 * self.draw(0, 83, 2, 20)).round(), (8 * self.draw(1, 83, EXTRA)).round()
        centre = (2 * self.draw(2, 2, 23)).round()
        whole = self.moments(codes, shared, centre)
        streamed = self.sums(2, 23)
        for part in (slice(0, 1), slice(1, 50), slice(50, 83)):
            ops.moments(codes[part], shared[part], centre, *streamed, backend=self.backend)
        shards = [self.moments(codes[part], shared[part], centre) for part in (slice(0, 40), slice(40, 83))]
        for one, other, first, last, expected in zip(
            whole, streamed, *shards, reference.moments(*in_double(codes, shared, centre)), strict=True
        ):
            assert torch.equal(one, expected)
            assert torch.equal(other, expected)
            assert torch.equal(first + last, expected)

    def test_second_moments_stay_exactly_symmetric(self) -> None:
        total, second = self.sums(1, 83)
        for seed in range(3):
            arguments = self.draw(seed, 7, 1, 80), self.draw(seed + 10, 7, EXTRA), self.draw(99, 1, 83)
            ops.moments(*arguments, total, second, backend=self.backend)
        assert torch.equal(second, second.transpose(1, 2))

    def test_errors_of_moments_do_not_grow_with_the_batch(self) -> None:
        """All of one sign, so that nothing averages out."""
        codes, shared = self.draw(0, 3000, 1, 13).abs(), self.draw(1, 3000, EXTRA).abs()
        arguments = codes, shared, torch.zeros(1, 16, device=self.device)
        for got, expected in zip(self.moments(*arguments), reference.moments(*in_double(*arguments)), strict=True):
            assert float(((got - expected) / expected).abs().max()) <= 2e-7

    def test_moments_of_nothing(self) -> None:
        centre = self.draw(2, 2, 67)
        for images, groups in ((0, 2), (3, 0)):
            total, second = self.draw(3, groups, 67).double(), self.draw(4, groups, 67, 67).double()
            before = total.clone(), second.clone()
            arguments = self.draw(0, images, groups, 64), self.draw(1, images, EXTRA), centre[:groups]
            ops.moments(*arguments, total, second, backend=self.backend)
            assert torch.equal(total, before[0])
            assert torch.equal(second, before[1])

    def test_moments_in_float64(self) -> None:
        arguments = in_double(self.draw(0, 33, 2, 64), self.draw(1, 33, EXTRA), self.draw(2, 2, 67))
        if not self.float64:
            with self.refuses_float64():
                self.moments(*arguments)
            return
        for got, expected in zip(self.moments(*arguments), reference.moments(*arguments), strict=True):
            assert relative_error(got, expected) <= FLOAT64


class SpanContract(Contract):
    """``span``."""

    def span(self, texts: Tensor, factor: Tensor, size: int, floor: float = 1e-10) -> tuple[Tensor, Tensor, Tensor]:
        return ops.span(texts, factor, size, floor, backend=self.backend)

    def assert_spans(self, have: tuple[Tensor, ...], expected: tuple[Tensor, ...], close: float = OP_FLOAT32) -> None:
        """Same picks; variances each to their own size, directions to theirs, which is 1."""
        picks, variance, directions = have
        assert picks.dtype == torch.long
        assert picks.tolist() == expected[0].tolist()
        picked = expected[1] > 0
        assert error(variance[picked] / expected[1][picked], torch.ones_like(expected[1][picked])) <= close
        assert not variance[~picked].any()
        assert error(directions, expected[2]) <= close

    @pytest.mark.parametrize(("texts", "rank", "size"), SPANS)
    def test_span(self, texts: int, rank: int, size: int) -> None:
        """More to pick than there are texts or coordinates, too: then it ends before."""
        decay = 0.9 ** torch.arange(rank, device=self.device)
        arguments = self.draw(0, 2, texts, rank), self.draw(1, 2, rank, rank) * decay
        have, expected = self.span(*arguments, size), reference.span(*in_double(*arguments), size, 1e-10)
        assert have[1].dtype == have[2].dtype == torch.float32
        self.assert_spans(have, expected)

    def test_directions_are_orthonormal(self) -> None:
        """Also of texts that are nearly alike: what is left of them is a hundredth."""
        texts = self.draw(0, 1, 100, 16) / 100 + self.draw(1, 1, 1, 16)
        _, _, directions = self.span(texts, self.draw(2, 1, 16, 16), 16)
        assert error(directions @ directions.transpose(1, 2), torch.eye(16, device=self.device)[None]) <= OP_FLOAT32

    def test_directions_of_two_texts_that_differ_in_the_twelfth_digit(self) -> None:
        """Taking the first from the second once leaves 1e-16 of it beside the 1e-12 that count."""
        texts = torch.tensor([[[1, 1, 0], [1, 1, 1e-12]]], device=self.device)
        picks, _, directions = self.span(texts, torch.tensor([1, 1, 1e9], device=self.device).diag()[None], 2)
        assert picks.tolist() == [[1, 0]]
        half = 0.5**0.5
        assert error(directions, torch.tensor([[[half, half, 0], [0, 0, -1]]], device=self.device)) <= OP_FLOAT32

    @pytest.mark.parametrize("texts", [5, 17, 111])
    def test_the_first_of_equal_texts_is_picked(self, texts: int) -> None:
        """A pool that holds every text four times, once with the sign turned."""
        once, factor = self.draw(0, 2, texts, 12), self.draw(1, 2, 12, 12)
        pool = torch.cat([once, -once, once, once], 1)
        have = self.span(pool, factor, 12)
        self.assert_spans(have, reference.span(*in_double(pool, factor), 12, 1e-10))
        assert int(have[0].max()) < texts
        assert have[0].tolist() == self.span(once, factor, 12)[0].tolist()

    def test_equal_variances_go_to_the_first_text(self) -> None:
        """Four axes of equal variance: in the order in which the texts name them."""
        axes = torch.eye(4, device=self.device)[None, [2, 0, 3, 1]]
        picks, variance, directions = self.span(axes.repeat(1, 5, 1), 3 * torch.eye(4, device=self.device)[None], 4)
        assert picks.tolist() == [[0, 1, 2, 3]]
        assert variance.tolist() == [[9, 9, 9, 9]]
        assert torch.equal(directions, axes)

    def test_heads_end_where_nothing_is_left_of_their_variance(self) -> None:
        """Of four heads: no variance, three directions with some beside five with none, two texts, and all of it."""
        texts, factor = self.draw(0, 4, 50, 8), self.draw(1, 4, 8, 8)
        turn, _ = torch.linalg.qr(self.draw(2, 8, 8))  # rounds: what is left is not exactly zero
        axes = torch.eye(8, device=self.device)
        factor[0] = 0
        texts[1], factor[1] = axes.repeat(7, 1)[:50] * self.draw(3, 50, 1) @ turn, turn.T @ (axes * (axes.cumsum(0)[2]))
        texts[2] = texts[2, :2].repeat(25, 1)
        have, expected = self.span(texts, factor, 10), reference.span(*in_double(texts, factor), 10, 1e-10)
        assert [int((picks >= 0).sum()) for picks in have[0]] == [0, 3, 2, 8]
        self.assert_spans(have, expected)

    @pytest.mark.parametrize("floor", [0.5, 0.1, 1.0])
    def test_picking_ends_at_the_floor(self, floor: float) -> None:
        arguments = self.draw(0, 2, 60, 10), self.draw(1, 2, 10, 10) * 0.5 ** torch.arange(10, device=self.device)
        expected = reference.span(*in_double(*arguments), 10, floor)
        assert 0 < int((expected[0] >= 0).sum()) < 20
        self.assert_spans(self.span(*arguments, 10, floor), expected)

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_the_unit_of_the_variance_does_not_matter(self, scale: float) -> None:
        texts, factor = self.draw(0, 1, 60, 8), self.draw(1, 1, 8, 8)
        assert self.span(texts, factor * scale, 8)[0].tolist() == self.span(texts, factor, 8)[0].tolist()

    @pytest.mark.parametrize("rank", [8, 16])  # padded to a power of two, and not
    def test_span_of_any_strides(self, rank: int) -> None:
        texts, factor = self.draw(0, rank, 40).T.expand(3, -1, -1), self.draw(1, rank, rank, 3).permute(2, 1, 0)
        assert not texts.is_contiguous()
        assert not factor.is_contiguous()
        before = texts.clone(), factor.clone()
        self.assert_spans(self.span(texts, factor, 6), reference.span(*in_double(texts, factor), 6, 1e-10))
        assert torch.equal(texts, before[0])
        assert torch.equal(factor, before[1])

    @pytest.mark.parametrize("where", ["texts", "factor"])
    def test_a_head_that_is_not_finite_has_no_picks(self, where: str) -> None:
        arguments = {"texts": self.draw(0, 2, 40, 8), "factor": self.draw(1, 2, 8, 8)}
        expected = self.span(*arguments.values(), 8)
        arguments[where][0, 5 if where == "texts" else 3, 2] = torch.nan
        have = self.span(*arguments.values(), 8)
        assert have[0][0].tolist() == [-1] * 8
        assert not have[1][0].any()
        assert not have[2][0].any()
        for got, other in zip(have, expected, strict=True):
            assert torch.equal(got[1], other[1])

    def test_span_of_no_heads(self) -> None:
        picks, variance, directions = self.span(self.draw(0, 0, 5, 4), self.draw(1, 0, 4, 4), 3)
        assert picks.shape == variance.shape == (0, 3)
        assert directions.shape == (0, 3, 4)

    def test_span_without_coordinates(self) -> None:
        picks, variance, directions = self.span(self.draw(0, 2, 5, 0), self.draw(1, 2, 0, 0), 3)
        assert picks.tolist() == [[-1] * 3] * 2
        assert not variance.any()
        assert directions.shape == (2, 3, 0)

    def test_span_in_float64(self) -> None:
        arguments = in_double(self.draw(0, 2, 300, 16), self.draw(1, 2, 16, 16))
        if not self.float64:
            with self.refuses_float64():
                self.span(*arguments, 16)
            return
        have = self.span(*arguments, 16)
        assert have[1].dtype == have[2].dtype == torch.float64
        self.assert_spans(have, reference.span(*arguments, 16, 1e-10), FLOAT64)

    @pytest.mark.parametrize(("texts", "rank", "size"), SPANS)
    def test_span_of_float32_texts_and_a_float64_factor(self, texts: int, rank: int, size: int) -> None:
        arguments = (
            self.draw(0, 2, texts, rank),
            self.draw(1, 2, rank, rank).double() * 0.9 ** torch.arange(rank, device=self.device),
        )
        have, expected = self.span(*arguments, size), reference.span(*in_double(*arguments), size, 1e-10)
        assert have[1].dtype == have[2].dtype == torch.float32
        self.assert_spans(have, expected)

    def test_a_factor_of_float64_is_not_rounded(self) -> None:
        """To float32 its two rows are the same, and the text along their difference would explain nothing."""
        factor = torch.tensor([[[1 + 2**-30, 0], [1, 0]]], dtype=torch.float64, device=self.device)
        picks, variance, _ = self.span(torch.tensor([[[1.0, -1.0]]], device=self.device), factor, 1)
        assert picks.tolist() == [[0]]
        assert variance.tolist() == [[2.0**-60]]
