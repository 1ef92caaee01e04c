"""The decomposed forward where sizes differ that are often equal: sides of images, of patches, and of the grid."""

import pytest
import torch
from builders import pixels, vision_tower
from measures import error
from tolerances import FLOAT64

from clipfast import wrap


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
