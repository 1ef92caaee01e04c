"""Moments, principal directions and top images of second-order effects against all effects written out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pixels, vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast import InputError
from clipfast.analyses.second_order import NeuronEffects, SecondOrder
from clipfast.analyses.second_order_moments import EffectMoments, Principal, TopImages

NEURONS, EMBED, IMAGES = 64, 20, 11


@dataclass
class All:
    have: NeuronEffects
    vectors: Tensor  # [B, M, D]

    @property
    def away(self) -> Tensor:
        return self.vectors - self.vectors.mean(0)


def all_effects(layer: int, seed: int = 4, **changes: Any) -> All:
    visual = vision_tower(seed=seed, dtype=torch.float64, **changes)
    images = pixels(visual, IMAGES, dtype=torch.float64)
    (have,) = SecondOrder(clipfast.wrap(visual), layer).decompose(images)
    return All(have, have.vectors(range(NEURONS)))


@pytest.fixture(scope="module", params=["few heads", "more heads than dimensions"])
def case(request: pytest.FixtureRequest) -> All:
    if request.param == "few heads":
        return all_effects(1)  # 2 of them
    return all_effects(0, layers=4, heads=8)  # 24


def collected(case: All, pieces: list[int], **options: Any) -> EffectMoments:
    moments, start = EffectMoments(**options), 0
    for size in pieces:
        moments.update(case.have[start : start + size])
        start += size
    return moments


def components(away: Tensor) -> tuple[Tensor, Tensor]:
    """First principal directions ``[M, D]`` and shares of ``[k, M, D]``, by singular values."""
    _, values, axes = torch.linalg.svd(away.transpose(0, 1), full_matrices=False)
    return axes[:, 0], values[:, 0] ** 2 / (values**2).sum(1)


def test_moments_are_those_of_all_images(case: All) -> None:
    moments = collected(case, [4, 0, 6, 1])
    assert moments.count == IMAGES
    assert error(moments.means(range(NEURONS)), case.vectors.mean(0)) <= FLOAT64
    assert error(moments.mean, case.have.coefficients.mean(0)) <= FLOAT64
    assert error(moments.shared, case.have.shared.mean(0)) <= FLOAT64
    assert error(moments.variance(), case.vectors.var(0).sum(-1)) <= FLOAT64
    expected = case.have.coefficients[:, :, 5]
    assert error(moments.covariances([5])[0], torch.cov(expected.T)) <= FLOAT64
    chosen = moments.select(7)
    assert torch.equal(chosen, case.vectors.var(0).sum(-1).argsort(descending=True)[:7])


def test_principal_directions_are_those_of_singular_values(case: All) -> None:
    found, (directions, shares) = collected(case, [5, 6]).principal(), components(case.away)
    assert error(found.shares, shares) <= FLOAT64
    side = torch.einsum("md,md->m", case.vectors.mean(0), directions).sign()
    assert error(found.directions, directions * side[:, None]) <= 1e-6  # of singular vectors
    along = torch.einsum("bmd,md->bm", case.away, found.directions)
    assert error(found.variances, along.square().sum(0) / (IMAGES - 1)) <= FLOAT64
    assert float(shares.min()) < 0.9 < float(shares.max()) + 0.1
    some = collected(case, [IMAGES]).principal([9, 2])
    assert error(some.directions, found.directions[[9, 2]]) <= 1e-6
    assert collected(case, [IMAGES]).principal([]).directions.shape == (0, EMBED)


def test_a_neuron_that_varies_along_one_direction_is_explained_by_it(case: All) -> None:
    """Where one later head alone reads the neurons, an effect is a number times one vector."""
    coefficients = case.have.coefficients.clone()
    coefficients[:, 1:] = 0
    alone = All(replace(case.have, coefficients=coefficients), case.vectors)
    found = collected(alone, [IMAGES]).principal()
    assert error(found.shares, torch.ones(NEURONS)) <= FLOAT64
    rows = case.have.weights.rows(range(NEURONS))[:, 0]
    cosines = torch.nn.functional.cosine_similarity(rows, found.directions)
    assert error(cosines.abs(), torch.ones(NEURONS)) <= FLOAT64
    still = All(replace(case.have, coefficients=torch.zeros_like(coefficients)), case.vectors)
    nothing: Principal = collected(still, [IMAGES]).principal()
    assert error(nothing.directions, torch.zeros(NEURONS, EMBED)) == 0
    assert error(nothing.shares, torch.zeros(NEURONS)) == 0


def test_merged_moments_are_those_of_one_pass(case: All) -> None:
    whole, first, second = collected(case, [IMAGES]), EffectMoments(), EffectMoments()
    first.merge(EffectMoments())
    first.update(case.have[:3])
    second.update(case.have[3:])
    second.merge(first)
    assert second.count == IMAGES
    assert error(second.mean, whole.mean) <= FLOAT64
    assert error(second.shared, whole.shared) <= FLOAT64
    assert error(second.covariances(range(NEURONS)), whole.covariances(range(NEURONS))) <= FLOAT64
    empty = EffectMoments()
    empty.merge(whole)
    assert error(empty.mean, whole.mean) == 0


@pytest.mark.parametrize("count", [1, 3, 50])
def test_top_images_are_those_farthest_from_the_mean(case: All, count: int) -> None:
    moments = collected(case, [IMAGES])
    top = TopImages(moments, count)
    for start, size in ((0, 4), (4, 0), (4, 7)):
        top.update(case.have[start : start + size])
    kept = min(count, IMAGES)
    values, places = case.away.norm(dim=-1).topk(kept, 0)
    assert top.seen == IMAGES
    assert error(top.norms, values) <= FLOAT64
    assert torch.equal(top.images, places)
    assert error(top.importance(), values.mean(0)) <= FLOAT64
    assert error(top.thresholds(), values[-1]) <= FLOAT64
    expected = case.away.norm(dim=-1)
    assert torch.equal(top.significant(case.have), expected > values[-1] * (1 + FLOAT64))
    assert int(top.significant(case.have).sum()) == NEURONS * (kept - 1)
    chosen = case.away.gather(0, places[..., None].expand(-1, -1, EMBED))  # [k, M, D]
    directions, shares = components(chosen)
    positive = (torch.einsum("kmd,md->km", chosen, directions) > 0).sum(0)
    found = top.principal()
    assert error(found.shares, shares) <= FLOAT64
    side = torch.where(positive > kept // 2, 1.0, -1.0)[:, None]
    assert error(found.directions, directions * side) <= 1e-6


def test_without_a_mean_effects_are_measured_from_zero(case: All) -> None:
    top = TopImages(count=3)
    top.update(case.have)
    values, places = case.vectors.norm(dim=-1).topk(3, 0)
    assert error(top.norms, values) <= FLOAT64
    assert torch.equal(top.images, places)


def test_merged_top_images_do_not_depend_on_the_order(case: All) -> None:
    moments = collected(case, [IMAGES])
    whole, parts = TopImages(moments, 4), [TopImages(moments, 4) for _ in range(3)]
    whole.update(case.have)
    for part, (start, stop) in zip(parts, ((0, 2), (2, 7), (7, 11)), strict=True):
        part.update(case.have[start:stop], range(start, stop))
    parts[2].merge(parts[0])
    parts[2].merge(TopImages(moments, 4))
    parts[2].merge(parts[1])
    assert parts[2].seen == IMAGES
    assert torch.equal(parts[2].images, whole.images)
    assert error(parts[2].norms, whole.norms) <= FLOAT64
    assert torch.equal(parts[2].select(5), whole.select(5))
    assert error(parts[2].principal().directions, whole.principal().directions) <= 1e-6


def test_of_equal_norms_the_lower_image_comes_first(case: All) -> None:
    top = TopImages(count=2)
    twin = case.have[:1]
    top.update(twin, [8])
    top.update(twin, [3])
    top.update(twin, [5])
    assert top.images[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("covariance", [True, False])
def test_moments_are_saved(case: All, tmp_path: Path, covariance: bool) -> None:
    moments, path = collected(case, [7], covariance=covariance), tmp_path / "moments.safetensors"
    moments.save(path)
    read = EffectMoments.load(path, case.have.weights)
    for each in (moments, read):
        each.update(case.have[7:])
    assert read.count == IMAGES
    assert torch.equal(read.mean, moments.mean)
    assert torch.equal(read.shared, moments.shared)
    if covariance:
        assert torch.equal(read.variance(), moments.variance())
    else:
        with pytest.raises(InputError, match="these moments keep no covariances"):
            read.variance()
    with pytest.raises(InputError, match="these moments are empty"):
        EffectMoments().save(path)


@pytest.mark.parametrize("from_zero", [True, False])
def test_top_images_are_saved(case: All, tmp_path: Path, from_zero: bool) -> None:
    top = TopImages(None if from_zero else collected(case, [IMAGES]), 3)
    path = tmp_path / "top.safetensors"
    with pytest.raises(InputError, match="nothing was pushed yet"):
        top.save(path)
    top.update(case.have[:5])
    top.save(path)
    read = TopImages.load(path, case.have.weights)
    for each in (top, read):
        each.update(case.have[5:])
    assert (read.seen, read.count) == (IMAGES, 3)
    assert torch.equal(read.images, top.images)
    assert torch.equal(read.norms, top.norms)
    assert torch.equal(read.principal([3]).directions, top.principal([3]).directions)


def test_files_of_something_else_are_refused(case: All, tmp_path: Path) -> None:
    moments, path, other = collected(case, [4]), tmp_path / "one.safetensors", all_effects(1, seed=5).have.weights
    moments.save(path)
    with pytest.raises(InputError, match="not of layer 1 of"):
        EffectMoments.load(path, other)
    with pytest.raises(InputError, match=r"not one that TopImages\.save wrote"):
        TopImages.load(path, case.have.weights)
    with pytest.raises(FileNotFoundError):
        EffectMoments.load(tmp_path / "none.safetensors", case.have.weights)
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(InputError, match="is damaged"):
        EffectMoments.load(path, case.have.weights)


def test_bad_input(case: All) -> None:
    moments = collected(case, [IMAGES])
    other = all_effects(1, seed=5).have
    for empty in (lambda: EffectMoments().mean, lambda: EffectMoments().variance()):
        with pytest.raises(InputError, match="these moments are empty"):
            empty()
    with pytest.raises(InputError, match="these effects are of another model, layer or centring"):
        moments.update(other)
    with pytest.raises(InputError, match="a covariance needs two images or more: 1 were seen"):
        collected(case, [1]).principal()
    with pytest.raises(InputError, match="these moments keep no covariances"):
        collected(case, [5], covariance=False).principal()
    with pytest.raises(InputError, match="only one of these moments keeps covariances"):
        moments.merge(EffectMoments(covariance=False))
    with pytest.raises(InputError, match="count is 65, expected 0 to 64"):
        moments.select(65)
    with pytest.raises(InputError, match="neuron 64 does not exist"):
        moments.means([64])
    with pytest.raises(InputError, match="count is 0, expected at least 1"):
        TopImages(moments, 0)
    top = TopImages(moments, 3)
    for ask in (lambda: top.images, lambda: top.significant(case.have), lambda: TopImages().weights):
        with pytest.raises(InputError, match="nothing was pushed yet"):
            ask()
    with pytest.raises(InputError, match="1 different numbers for 2 images"):
        top.update(case.have[:2], [4, 4])
    top.update(case.have[:2])
    with pytest.raises(InputError, match="image 1 was pushed before"):
        top.update(case.have[2:4], [1, 9])
    with pytest.raises(InputError, match="only top images of the same count and mean"):
        top.merge(TopImages(moments, 4))
    with pytest.raises(InputError, match="only top images of the same count and mean"):
        top.merge(TopImages(count=3))
    with pytest.raises(InputError, match="these effects are of another model"):
        top.significant(other)
    broken = case.have.coefficients.clone()
    broken[0, 0, 0] = float("inf")
    for target in (EffectMoments(), TopImages()):
        with pytest.raises(InputError, match="an effect is not finite"):
            target.update(replace(case.have, coefficients=broken))
