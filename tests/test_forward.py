"""The decomposed forward where sizes differ that are often equal, and what a request keeps."""

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from tolerances import FLOAT64

from clipfast import NotKept, wrap
from clipfast.basis import fold
from clipfast.forward import Request, decompose


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [((27, 30), (8, 4), (3, 7)), ((24, 21), (8, 8), (3, 2)), ((31, 12), (4, 6), (7, 2))],
)
def test_pixels_beside_the_last_whole_patch_are_not_read(
    image_size: tuple[int, int], patch_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    visual = vision_tower(dtype=torch.float64, image_size=image_size, patch_size=patch_size)
    images = pixels(visual, dtype=torch.float64)
    contributions = wrap(visual).decompose(images)
    assert contributions.grid == grid
    with torch.no_grad():
        assert error(contributions.embedding, visual(images)) <= FLOAT64
    read = images.clone()
    read[:, :, grid[0] * patch_size[0] :] = 9
    read[:, :, :, grid[1] * patch_size[1] :] = 9
    assert torch.equal(wrap(visual).decompose(read).embedding, contributions.embedding)


def test_a_request_keeps_codes_alone_by_default() -> None:
    visual = vision_tower()
    tower = wrap(visual).tower
    contributions = decompose(tower, pixels(visual), Request(layers=(0, 2)), fold(tower, "uniform"))
    assert contributions.layers == (0, 2)
    for name in ("attention", "maps", "class_codes"):
        with pytest.raises(NotKept):
            getattr(contributions, name)
    with pytest.raises(NotKept):
        contributions.tokens(0)


def test_equal_requests_share_a_key() -> None:
    """CUDA graphs are kept by request."""
    assert len({Request(layers=(0, 1)), Request(layers=(0, 1)), Request(layers=(0, 1), tokens=True)}) == 2


def test_no_result_of_the_forward_requires_gradients() -> None:
    visual = vision_tower()
    tower = wrap(visual).tower
    assert any(tensor.requires_grad for tensor in tower.tensors())
    contributions = decompose(tower, pixels(visual), Request(layers=(0, 1, 2)), fold(tower, "uniform"))
    for name in ("embedding", "norm", "mean", "std", "codes", "start", "mlps", "rest"):
        assert not getattr(contributions, name).requires_grad, name


@pytest.mark.parametrize("pooling", [{}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=["class", "average"])
@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
def test_all_kept_at_once_is_what_is_kept_alone(pooling: dict[str, object], layers: list[int] | None) -> None:
    visual = vision_tower(dtype=torch.float64, **pooling)
    images, texts = pixels(visual, dtype=torch.float64), directions(3, 20, dtype=torch.float64)
    model = wrap(visual)
    together = model.decompose(
        images, texts=texts, maps="per_head", attention=True, tokens=True, class_token=True, layers=layers
    )
    kept = together.layers
    maps = model.decompose(images, texts=texts, maps="per_head", layers=layers).maps
    assert error(together.maps, maps) <= FLOAT64
    assert error(model.decompose(images, texts=texts, layers=layers).maps, maps.sum((1, 2))) <= FLOAT64
    assert error(together.attention, model.decompose(images, attention=True, layers=layers).attention) <= FLOAT64
    class_codes = model.decompose(images, class_token=True, layers=layers).class_codes
    assert error(together.class_codes, class_codes) <= FLOAT64
    tokens = model.decompose(images, tokens=True, layers=layers)
    for layer in kept:
        assert error(together.tokens(layer), tokens.tokens(layer)) <= FLOAT64
    assert together.max_error() <= FLOAT64
