"""TEXTSPAN from arrays: against the independent implementation, the definition, and by hand."""

import logging
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from builders import ROOT
from measures import error
from tolerances import FLOAT64, GOLDEN

import clipfast
from clipfast.analyses.textspan import Method

GOLDEN_FILE = ROOT.parent / "shared" / "golden" / "textspan.npz"


def outputs(images: int = 300, width: int = 24, rank: int = 10, seed: int = 0) -> torch.Tensor:
    """Outputs of a head: a mean, and a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
    weights = torch.randn(images, rank, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(rank)
    return weights @ basis.T + torch.randn(rank, generator=generator, dtype=torch.float64) @ basis.T


def texts(count: int = 200, width: int = 24, seed: int = 1) -> torch.Tensor:
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(features, dim=1)


def greedy(data: torch.Tensor, features: torch.Tensor, size: int, rank: int) -> tuple[list[int], torch.Tensor]:
    """Algorithm 1 of arXiv 2310.05916 on the data themselves: picks and reconstruction."""
    mean = data.mean(0)
    axes = torch.linalg.svd(data, full_matrices=False)[2][:rank]
    left, projected = data - mean, features @ axes.T @ axes
    picks, kept = [], torch.zeros_like(data)
    for _ in range(size):
        pick = int((left @ projected.T).std(0).argmax())
        unit = projected[pick] / projected[pick].norm()
        picks.append(pick)
        kept = kept + torch.outer(left @ unit, unit)
        left = left - torch.outer(left @ unit, unit)
        projected = projected - torch.outer(projected @ unit, unit)
    return picks, kept + mean


def test_golden_picks_and_reconstruction() -> None:
    if not GOLDEN_FILE.is_file():
        pytest.skip(f"no golden arrays beside this checkout: {GOLDEN_FILE.name}")
    with np.load(GOLDEN_FILE) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    result = clipfast.textspan(
        arrays["head_outputs"], arrays["text_features"], len(arrays["picks"]), rank=int(arrays["rank"])
    )
    assert list(result.picks) == arrays["picks"].tolist()
    expected = arrays["reconstruction"]  # holds the reconstruction of the last output in every row
    assert bool((expected == expected[-1]).all())
    assert error(result.reconstruct()[-1], expected[-1]) <= GOLDEN * float(expected.abs().max())


@pytest.mark.parametrize("rank", [10, 4])
def test_the_algorithm_on_the_data_themselves(rank: int) -> None:
    data, features = outputs(), texts()
    picks, reconstruction = greedy(data, features, rank, rank)
    result = clipfast.textspan(data, features, rank, rank=rank)
    assert list(result.picks) == picks
    assert error(result.reconstruct(), reconstruction) <= FLOAT64
    assert error(result.mean, data.mean(0)) <= FLOAT64


def test_two_directions_by_hand() -> None:
    """Outputs vary by ±2 along x and ±1 along y, and not at all along z."""
    data = torch.tensor([[2.0, 1.0, 3.0], [2.0, -1.0, 3.0], [-2.0, 1.0, 3.0], [-2.0, -1.0, 3.0]])
    features = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.8, 0.6, 0.0], [1.0, 0.0, 0.0]])
    result = clipfast.textspan(data, features, 2)
    assert result.picks == (3, 1)  # variances along the texts: 0, 4/3, 0.64·16/3 + 0.36·4/3, 16/3
    assert torch.allclose(result.explained, torch.tensor([0.8, 0.2], dtype=torch.float64))
    assert result.variance == pytest.approx(20 / 3)
    assert error(result.reconstruct(size=1), torch.tensor([[2.0, 0, 3]] * 2 + [[-2.0, 0, 3]] * 2)) <= GOLDEN
    assert error(result.reconstruct(), data) <= GOLDEN
    assert result.notes == ()


def test_a_span_of_one_dimension() -> None:
    """Of outputs ±2 along x and ±1 along y, x alone counts, which the second text is longer along."""
    data = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
    result = clipfast.textspan(data, torch.tensor([[0.8, 0.6], [0.9, 0.0]]), 1, rank=1)
    assert result.rank == 1
    assert result.picks == (1,)
    assert result.variance == pytest.approx(16 / 3)
    assert error(result.explained, torch.ones(1)) <= GOLDEN


def test_explained_shares_are_what_the_reconstruction_gains() -> None:
    data, features = outputs(), texts()
    result = clipfast.textspan(data, features, 6)
    total = (data - data.mean(0)).square().sum()
    for size in range(1, 7):
        left = (data - result.reconstruct(size=size)).square().sum() / total
        assert float(result.explained[:size].sum()) == pytest.approx(1 - float(left), abs=FLOAT64)


def test_a_rank_above_the_outputs_own_is_clamped_and_said() -> None:
    data, features = outputs(rank=6), texts()
    result = clipfast.textspan(data, features, 5, rank=80)
    assert result.rank == 6
    assert any("rank 80 is more than the numerical rank 6" in note for note in result.notes)
    assert result.picks == clipfast.textspan(data, features, 5).picks


def test_rounding_of_float32_is_no_rank() -> None:
    data = outputs(rank=6)
    assert clipfast.textspan(data.float(), texts().float(), 3, rank=80).rank == 6


def test_it_stops_where_nothing_is_left() -> None:
    result = clipfast.textspan(outputs(rank=4), texts(), 9)
    assert len(result.picks) == 4
    assert any("stopped after 4 of 9 texts" in note for note in result.notes)
    assert error(result.reconstruct(), outputs(rank=4)) <= FLOAT64


@pytest.mark.parametrize("method", ["greedy", "omp", "somp"])
def test_outputs_that_never_vary_have_no_texts(method: Method) -> None:
    result = clipfast.textspan(torch.ones(5, 24, dtype=torch.float64), texts(), 3, method=method)
    assert result.picks == ()
    assert error(result.reconstruct(), torch.ones(5, 24)) <= FLOAT64


def test_the_first_of_equal_texts_is_taken_and_no_copy_after_it(caplog: pytest.LogCaptureFixture) -> None:
    data, features = outputs(), texts(40)
    twice = torch.cat([features.flip(0), features, features])
    with caplog.at_level(logging.INFO, logger="clipfast"):
        result = clipfast.textspan(data, twice, 8)
    assert [record.getMessage() for record in caplog.records] == list(result.notes)
    assert all(pick < len(features) for pick in result.picks)
    assert len({pick % len(features) for pick in result.picks}) == 8
    assert any("80 texts stand twice" in note for note in result.notes)


def test_a_near_copy_explains_nothing_more() -> None:
    data, features = outputs(), texts(40)
    near = torch.nn.functional.normalize(features + 1e-9 * texts(40, seed=2), dim=1)
    alone, both = (clipfast.textspan(data, pool, 8) for pool in (features, torch.cat([features, near])))
    assert [pick % 40 for pick in both.picks] == list(alone.picks)


@pytest.mark.parametrize("method", ["greedy", "omp", "somp"])
def test_every_method_has_orthonormal_directions_and_explains_all_in_the_end(method: Method) -> None:
    result = clipfast.textspan(outputs(), texts(), 10, method=method)
    gram = result.directions @ result.directions.T
    assert error(gram, torch.eye(len(result.picks))) <= FLOAT64
    assert float(result.explained.sum()) == pytest.approx(1, abs=1e-6)


def test_omp_does_not_mind_how_long_a_text_is() -> None:
    """Of two texts in the same direction within the head's span, one half outside of it, greedy takes the longer."""
    data = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 0.9, 0], [0, -0.9, 0]])
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 2.0], [0.0, 1.0, 0.0]]), dim=1)
    assert clipfast.textspan(data, features, 1).picks == (1,)
    assert clipfast.textspan(data, features, 1, method="omp").picks == (0,)


def test_somp_adds_absolute_projections() -> None:
    """One far image makes a variance, but only one term of a sum."""
    data = torch.tensor([[9.0, 0.0]] + [[0.0, 2.5], [0.0, -2.5]] * 4)
    features = torch.eye(2)
    assert clipfast.textspan(data, features, 1).picks == (0,)
    assert clipfast.textspan(data, features, 1, method="somp").picks == (1,)


def test_somp_keeps_a_weak_direction_and_stops_where_texts_hold_nothing() -> None:
    """Absolute projections sum to 32 along x, to 0.4 along y and to 32 along z, where there is no text."""
    data = torch.tensor([[8.0, 0.1, 8], [8.0, -0.1, -8], [-8.0, 0.1, -8], [-8.0, -0.1, 8]])
    result = clipfast.textspan(data, torch.eye(3)[:2], 3, method="somp")
    assert result.picks == (0, 1)
    assert result.notes == ("stopped after 2 of 3 texts: what is left of the variance is rounding",)


def test_a_text_outside_of_the_span_stays_short_for_omp() -> None:
    """What it has inside the span is rounding: brought to unit length, it would be the best text."""
    axes = torch.eye(8, dtype=torch.float64)
    data = outputs(width=2, rank=2) @ axes[:2]
    strongest = torch.linalg.eigh(torch.cov(data[:, :2].T))[1][:, -1] @ axes[:2]
    features = torch.stack([axes[0] + axes[1], axes[5] + 1e-9 * strongest])
    assert clipfast.textspan(data, features, 1, method="omp").picks == (0,)


def test_somp_stops_where_texts_hold_no_more_than_rounding() -> None:
    axes = torch.eye(8, dtype=torch.float64)
    weak = outputs(width=2, rank=2) * torch.tensor([1, 1e-3], dtype=torch.float64)
    result = clipfast.textspan(weak @ axes[:2], torch.stack([axes[0], axes[0] + 1e-8 * axes[1]]), 2, method="somp")
    assert len(result.picks) == 1
    assert result.notes == ("stopped after 1 of 2 texts: what is left of the variance is rounding",)


def test_no_note_where_all_texts_asked_for_are_picked() -> None:
    """More than 256 texts, one along each axis, along which the outputs vary less and less."""
    deviations = torch.arange(600, 300, -1, dtype=torch.float64)
    result = clipfast.textspan(torch.cat([deviations.diag(), -deviations.diag()]), torch.eye(300).double(), 300)
    assert result.picks == tuple(range(300))
    assert result.notes == ()


def test_results_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        clipfast.textspan(outputs(5), texts(5), 2).picks = ()  # type: ignore[misc]


def test_somp_compares_texts_of_unit_length() -> None:
    """Absolute projections sum to 6 along x and to 8/√2 along the diagonal, however long the texts are."""
    data = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    features = torch.tensor([[0.01, 0.0], [5.0, 5.0]])
    assert clipfast.textspan(data, features, 1, method="somp").picks == (0,)


@pytest.mark.parametrize("shape", [(24,), (5, 23), (5, 25), (5, 24, 1)])
def test_reconstruct_rejects_outputs_of_another_shape(shape: tuple[int, ...]) -> None:
    span = clipfast.textspan(outputs(5), texts(5), 2)
    with pytest.raises(clipfast.InputError, match=r"head_outputs has shape .* expected \[images, 24\]"):
        span.reconstruct(torch.zeros(shape))


def test_the_repr_leaves_the_outputs_out() -> None:
    assert "_outputs" not in repr(clipfast.textspan(outputs(5), texts(5), 2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_outputs": torch.zeros(3)}, "head_outputs is"),
        ({"head_outputs": torch.zeros(3, 24, 1)}, r"head_outputs is torch.float32 \[3, 24, 1\]"),
        ({"text_features": torch.zeros(5, 24, 1)}, r"text_features is torch.float32 \[5, 24, 1\]"),
        ({"head_outputs": torch.zeros(0, 24)}, "head_outputs has no images"),
        (
            {
                "head_outputs": torch.zeros(3, 24).index_put(
                    (torch.tensor([1, 2]), torch.tensor([5, 0])), torch.tensor(torch.nan)
                )
            },
            "head_outputs has values that are not finite, first in row 1",
        ),
        ({"text_features": torch.zeros(5, 24, dtype=torch.int64)}, "text_features is torch.int64"),
        ({"text_features": torch.zeros(5, 7)}, r"text_features has shape \[5, 7\], expected \[texts, 24\]"),
        ({"text_features": torch.zeros(5, 25)}, r"text_features has shape \[5, 25\], expected \[texts, 24\]"),
        ({"text_features": torch.zeros(0, 24)}, "text_features has shape"),
        ({"size": 0}, "size is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"method": "best"}, "method is 'best'"),
    ],
)
def test_what_does_not_fit(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"head_outputs": outputs(5), "text_features": texts(5), "size": 2} | changed
    with pytest.raises(clipfast.InputError, match=message):
        clipfast.textspan(**arguments)  # type: ignore[arg-type]
