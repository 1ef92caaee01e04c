"""Retrieval against all products of all images in float64: blocks, ties, queries of every kind, files."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import directions, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import clipfast
from clipfast.analyses import retrieval
from clipfast.analyses.ranking import largest
from clipfast.analyses.retrieval import Index
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene

IMAGES = 53
ONE = [(1, 0)]
SOME = [(2, 1), (0, 0)]  # 2 · 16 + 3 numbers of 20: kept as they are


def drawn(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def seen(model: clipfast.Model) -> clipfast.Contributions:
    return model.decompose(drawn(IMAGES, 2))


@pytest.fixture(scope="module")
def others(model: clipfast.Model) -> clipfast.Contributions:
    return model.decompose(drawn(5, 3))


def filled(seen: clipfast.Contributions, heads: list[tuple[int, int]], batch: int = 10, **kwargs: Any) -> Index:
    index = Index(heads)
    for start in range(0, len(seen), batch):
        index.add(seen.select(range(start, min(start + batch, len(seen)))), **kwargs)
    return index


def outputs(contributions: clipfast.Contributions, heads: list[tuple[int, int]]) -> Tensor:
    return torch.stack([contributions.head(layer, head) for layer, head in heads]).sum(0)


def define(queries: Tensor, images: Tensor, measure: str) -> Tensor:
    """All scores at once, ``[Q, N]``."""
    if measure == "cosine":
        queries, images = (rows / rows.norm(dim=1, keepdim=True) for rows in (queries, images))
    return queries @ images.T


def ranked(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that divide neither images nor queries."""
    monkeypatch.setattr(retrieval, "IMAGES_AT_ONCE", 9)
    monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", 4)


# ------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("heads", [ONE, SOME])
@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("centred", [True, False])
def test_every_query_finds_what_all_products_find(
    seen: clipfast.Contributions, others: clipfast.Contributions, heads: Any, measure: Any, centred: bool
) -> None:
    index = filled(seen, heads)
    whole, new, texts = outputs(seen, heads), outputs(others, heads), directions(6, 20, dtype=torch.float64)
    mean = whole.mean(0) if centred else torch.zeros(20, dtype=torch.float64)

    own = define(whole - mean, whole - mean, measure).fill_diagonal_(-torch.inf)
    result = index.nearest(range(IMAGES), 7, measure=measure, centred=centred)
    values, images = ranked(own, 7)
    assert torch.equal(result.images, images)
    assert error(result.scores, values) <= FLOAT64

    for query, rows in ((others, new - mean), (3 * texts, texts if measure == "cosine" else 3 * texts)):
        values, images = ranked(define(rows, whole - mean, measure), 7)
        result = index.nearest(query, 7, measure=measure, centred=centred)
        assert torch.equal(result.images, images)
        assert error(result.scores, values) <= FLOAT64


def test_the_smaller_of_two_forms_is_kept(seen: clipfast.Contributions) -> None:
    one, some = filled(seen, ONE), filled(seen, SOME)
    assert one.kept == "19 numbers per image, coordinates in the heads' own span, in place of 20"
    assert some.kept == "20 numbers per image: the sum of the heads' outputs"
    assert repr(one) == f"Index(53 images, heads [(1, 0)], {one.kept})"
    assert Index(ONE).kept == "nothing yet"


def test_centring_matters(seen: clipfast.Contributions) -> None:
    """Raw outputs share their mean: raw cosines are larger, and find others."""
    index = filled(seen, ONE)
    raw, centred = (index.nearest(range(IMAGES), 3, centred=centred) for centred in (False, True))
    assert float(raw.scores.mean()) > float(centred.scores.mean())
    assert not torch.equal(raw.images, centred.images)


def test_heads_by_negative_layers_and_twice(seen: clipfast.Contributions) -> None:
    index = filled(seen, [(-1, 1), (2, 1), (0, 0)])
    assert index.heads == [(0, 0), (2, 1)]
    assert torch.equal(index.nearest([4], 5).images, filled(seen, SOME).nearest([4], 5).images)


def test_float32(seen: clipfast.Contributions) -> None:
    single = clipfast.wrap(vision_tower(seed=1)).decompose(drawn(IMAGES, 2, torch.float32))
    whole = outputs(seen, ONE) - outputs(seen, ONE).mean(0)
    result = filled(single, ONE).nearest([0, 7], 10)
    assert result.scores.dtype == torch.float32
    expected = define(whole[[0, 7]], whole, "cosine")
    assert error(result.scores, expected.gather(1, result.images)) <= FLOAT32


# --------------------------------------------------------------------------------------------------- ties and edges


def test_copies_find_each_other(seen: clipfast.Contributions) -> None:
    """Three copies of each image: its own copies come first, then the three of another."""
    few = seen.select([*range(6)] * 3)
    result = filled(few, ONE, batch=5).nearest(range(18), 17)
    assert error(result.scores[:, :2], torch.ones(18, 2)) <= FLOAT64
    for image, row in enumerate(result.images.tolist()):
        assert {*row[:2], image} == {image % 6, image % 6 + 6, image % 6 + 12}
        assert sorted([*row, image]) == [*range(18)]
        assert all(len({copy % 6 for copy in row[first : first + 3]}) == 1 for first in range(2, 17, 3))


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 40, 52])
def test_of_equal_scores_the_lower_index_comes_first(seen: clipfast.Contributions, count: int) -> None:
    """Small integers, whose products are exact: ties within blocks, across them, and at the last place."""
    index = filled(seen, ONE)
    rows = torch.randint(-1, 2, (IMAGES, 19), generator=torch.Generator().manual_seed(4)).double()
    rows[:, 2:] = 0
    index._parts = [rows]
    result = index.nearest(range(IMAGES), count, measure="dot", centred=False)
    values, images = ranked((rows @ rows.T).fill_diagonal_(-torch.inf), count)
    assert torch.equal(result.images, images)
    assert torch.equal(result.scores, values)


def test_more_than_there_are(seen: clipfast.Contributions, others: clipfast.Contributions) -> None:
    index = filled(seen, ONE)
    assert index.nearest([3, 50], 99).images.shape == (2, IMAGES - 1)
    assert sorted(index.nearest([3], 99).images[0].tolist()) == [image for image in range(IMAGES) if image != 3]
    assert sorted(index.nearest(others, 99).images[2].tolist()) == [*range(IMAGES)]


def test_one_image_alone(seen: clipfast.Contributions) -> None:
    index = filled(seen.select([0]), ONE)
    assert index.nearest([0], 3).images.shape == (1, 0)
    result = index.nearest(directions(2, 20), 3)  # the only image is the mean: it has no direction
    assert result.images.tolist() == [[0], [0]]
    assert result.scores.tolist() == [[0.0], [0.0]]


def test_no_batch_and_no_query(seen: clipfast.Contributions, model: clipfast.Model) -> None:
    index = filled(seen, ONE)
    index.add(seen.select([]))
    assert len(index) == IMAGES
    assert index.nearest([], 3).images.shape == (0, 3)
    assert index.nearest(model.decompose(torch.empty(0, 3, 24, 24)), 3).scores.shape == (0, 3)
    assert index.nearest(torch.empty(0, 20), 3).images.shape == (0, 3)


def test_batches_do_not_matter(seen: clipfast.Contributions) -> None:
    one, many = filled(seen, ONE, batch=IMAGES), filled(seen, ONE, batch=4)
    assert torch.equal(one.nearest(range(IMAGES), 5).images, many.nearest(range(IMAGES), 5).images)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 20])
def test_largest_is_a_stable_sort(count: int) -> None:
    scores = torch.randint(0, 4, (5, 6, 8), generator=torch.Generator().manual_seed(0)).double()
    scores[0, 0] = -torch.inf
    values, places = largest(scores, count)
    expected = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[..., :count])
    assert torch.equal(places, expected.indices[..., :count])


def test_largest_of_nothing() -> None:
    assert largest(torch.empty(0, 7), 3)[1].shape == (0, 3)
    assert largest(torch.empty(4, 0), 3)[0].shape == (4, 0)


# --------------------------------------------------------------------------------------------------- the known world


@pytest.mark.slow
def test_a_head_of_the_bundled_model_finds_the_same_background() -> None:
    """The head that does so best on some scenes does so on others; a sixth would be chance."""
    model = clipfast.load("scenes", device="cpu")
    scenes = [sample_scene(5, "test-unbiased", number) for number in range(160)]
    contributions = model.decompose([Image.fromarray(render(scene)) for scene in scenes])
    backgrounds = [scene.background for scene in scenes]

    def shared(heads: list[tuple[int, int]], images: range) -> float:
        index = Index(heads)
        index.add(contributions.select(images), names=backgrounds[images.start : images.stop])
        names = index.nearest(range(len(images)), 3).names or ()
        return sum(row.count(backgrounds[image]) for image, row in zip(images, names, strict=True)) / (3 * len(images))

    heads = [(layer, head) for layer in contributions.layers for head in range(contributions.basis.heads)]
    best = max(heads, key=lambda head: shared([head], range(80)))
    assert shared([best], range(80, 160)) >= 3 / 6


# ------------------------------------------------------------------------------------------------------------- faiss


def test_faiss(seen: clipfast.Contributions) -> None:
    index = filled(seen, ONE)
    if importlib.util.find_spec("faiss") is None:
        with pytest.raises(
            clipfast.MissingExtra, match=r"needs the package faiss-cpu: pip install 'clipfast\[faiss\]'"
        ):
            index.nearest([0], 3, engine="faiss")
        return
    for query in (range(IMAGES), directions(4, 20)):
        ours, theirs = index.nearest(query, 6), index.nearest(query, 6, engine="faiss")
        assert torch.equal(ours.images, theirs.images)
        assert error(theirs.scores, ours.scores) <= FLOAT32
    assert index.nearest([], 3, engine="faiss").images.shape == (0, 3)
    assert index.nearest([1], 99, engine="faiss").images.shape == (1, IMAGES - 1)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("heads", [ONE, SOME])
def test_saving(seen: clipfast.Contributions, others: clipfast.Contributions, tmp_path: Path, heads: Any) -> None:
    index = Index(heads)
    names = [f"tür {number}\udcff.png" for number in range(IMAGES)]  # a name that is not UTF-8
    index.add(seen, names=names)
    index.save(tmp_path / "index.safetensors")
    loaded = Index.load(tmp_path / "index.safetensors")
    assert (loaded.heads, loaded.names, loaded.kept) == (index.heads, names, index.kept)
    for query in ([0, 9], others, directions(3, 20, dtype=torch.float64)):
        mine, its = index.nearest(query, 4), loaded.nearest(query, 4)
        assert torch.equal(mine.images, its.images)
        assert torch.equal(mine.scores, its.scores)
        assert mine.names == its.names == tuple(tuple(names[image] for image in row) for row in mine.images.tolist())
    loaded.add(others, names=list("abcde"))
    assert len(loaded) == len(loaded.names) == IMAGES + 5


def test_a_file_of_something_else(seen: clipfast.Contributions, tmp_path: Path) -> None:
    seen.save(tmp_path / "contributions.safetensors")
    with pytest.raises(clipfast.InputError, match=r"not one that Index\.save wrote"):
        Index.load(tmp_path / "contributions.safetensors")
    with pytest.raises(clipfast.InputError, match="the index is empty"):
        Index(ONE).save(tmp_path / "empty.safetensors")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([IMAGES],), r"no images \[53\] in the index: they are 0 to 52"),
        (([-1],), r"no images \[-1\] in the index"),
        ((torch.ones(2, 19),), r"the query is torch.float32 \[2, 19\], expected text features \[texts, 20\]"),
        ((torch.ones(2, 20, dtype=torch.long),), r"the query is torch.int64"),
        ((torch.full((1, 20), torch.nan),), "the query has values that are not finite"),
        (([0], 0), "count is 0"),
        (([0], 1, {"measure": "euclid"}), "measure is 'euclid'"),
        (([0], 1, {"engine": "annoy"}), "engine 'annoy'"),
    ],
)
def test_queries_that_do_not_fit(seen: clipfast.Contributions, arguments: Any, message: str) -> None:
    options = arguments[2] if len(arguments) == 3 else {}
    with pytest.raises(clipfast.InputError, match=message):
        filled(seen, ONE).nearest(*arguments[:2], **options)


def test_batches_that_do_not_fit(seen: clipfast.Contributions, model: clipfast.Model) -> None:
    other = clipfast.wrap(vision_tower(seed=7, dtype=torch.float64)).decompose(drawn(2, 3))
    index = filled(seen, ONE)
    with pytest.raises(clipfast.InputError, match="another model"):
        index.add(other)
    with pytest.raises(clipfast.InputError, match="another model"):
        index.nearest(other)
    with pytest.raises(clipfast.InputError, match=r"layer 1 was not kept: the layers here are \[0, 2\]"):
        index.add(model.decompose(drawn(2, 3), layers=[0, 2]))
    with pytest.raises(clipfast.InputError, match="not finite"):
        index.add(model.decompose(torch.full((1, 3, 24, 24), torch.inf)))
    with pytest.raises(clipfast.InputError, match="all images of an index have names, or none has"):
        index.add(seen, names=["x"] * IMAGES)
    assert len(index) == IMAGES
    for wrong in (["x"], ["x", "", *"y" * (IMAGES - 2)], ["a\0b"] * IMAGES):
        with pytest.raises(clipfast.InputError, match=f"{len(wrong)} names for 53 images"):
            Index(ONE).add(seen, names=wrong)


@pytest.mark.parametrize("head", [(3, 0), (-4, 0), (0, 2), (0, -1)])
def test_heads_that_do_not_exist(seen: clipfast.Contributions, head: tuple[int, int]) -> None:
    with pytest.raises(clipfast.InputError, match="does not exist: "):
        Index([head]).add(seen)


def test_an_index_of_nothing() -> None:
    with pytest.raises(clipfast.InputError, match="no heads to retrieve by"):
        Index([])
    with pytest.raises(clipfast.InputError, match="the index is empty"):
        Index(ONE).nearest([0])
