"""Contributions cut into images and joined again."""

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from tolerances import FLOAT64

from clipfast import Contributions, InputError, Model, wrap

EVERYTHING = {"texts": directions(3, 20, dtype=torch.float64), "maps": "per_head", "attention": True, "tokens": True}


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(vision_tower(dtype=torch.float64))


@pytest.fixture(scope="module")
def images(model: Model) -> torch.Tensor:
    return pixels(model.module, 4, dtype=torch.float64)


def assert_close(have: Contributions, expected: Contributions) -> None:
    assert (len(have), have.layers, have.texts) == (len(expected), expected.layers, expected.texts)
    for name in ("embedding", "norm", "mean", "std", "codes", "mlps", "rest", "attention", "maps"):
        assert error(getattr(have, name), getattr(expected, name)) <= FLOAT64
    assert error(have.heads(), expected.heads()) <= FLOAT64
    for layer in expected.layers:
        assert error(have.tokens(layer), expected.tokens(layer)) <= FLOAT64
    assert have.max_error() <= FLOAT64


@pytest.mark.parametrize("rows", [[0], [2, 0], [3, 3, 1], [-1], []])
def test_selected_images_are_those_images(model: Model, images: torch.Tensor, rows: list[int]) -> None:
    whole = model.decompose(images, **EVERYTHING)
    assert_close(whole.select(rows), model.decompose(images[rows], **EVERYTHING))
    assert len(whole) == 4


@pytest.mark.parametrize("options", [{}, {"layers": [2, 0]}, {"layers": []}])
def test_joined_batches_are_one_batch(model: Model, images: torch.Tensor, options: dict) -> None:
    parts = [model.decompose(images[a:b], **EVERYTHING, **options) for a, b in ((0, 1), (1, 1), (1, 4))]
    assert_close(Contributions.cat(parts), model.decompose(images, **EVERYTHING, **options))


def test_batches_that_keep_different_things_are_not_joined(model: Model, images: torch.Tensor) -> None:
    bare = model.decompose(images)
    texts = EVERYTHING["texts"]
    different = [
        model.decompose(images, attention=True),
        model.decompose(images, layers=[0, 1]),
        model.decompose(images, centring="termwise"),
        model.decompose(images, texts=texts),
    ]
    for other in different:
        with pytest.raises(InputError, match=r"^only batches of one model that keep the same results can be joined$"):
            Contributions.cat([bare, other])
    summed, per_head = (model.decompose(images, texts=texts, maps=maps) for maps in ("summed", "per_head"))
    with pytest.raises(InputError, match="can be joined"):
        Contributions.cat([summed, per_head])
    with pytest.raises(InputError, match="can be joined"):
        Contributions.cat([])


def test_batches_of_different_models_are_not_joined(model: Model, images: torch.Tensor) -> None:
    """Codes of one model times the basis of another would be wrong without a sign of it."""
    other = wrap(vision_tower(seed=1, dtype=torch.float64))
    with pytest.raises(InputError, match=r"^only batches of one model"):
        Contributions.cat([model.decompose(images), other.decompose(images)])


def test_bytes_are_those_of_the_images(model: Model, images: torch.Tensor) -> None:
    """Per image: embedding and rest 20 each, three scalars, codes 3·2·16, mlps 4·20, all float64."""
    assert model.decompose(images).nbytes == 4 * 8 * (20 + 20 + 3 + 3 * 2 * 16 + 4 * 20)
    with_attention = model.decompose(images, attention=True)
    assert with_attention.nbytes == model.decompose(images).nbytes + 4 * 8 * (3 * 2 * 10)
    assert torch.equal(with_attention.cpu().heads(), with_attention.heads())
