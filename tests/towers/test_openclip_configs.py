"""Every model open_clip knows: decomposed exactly, or refused for a listed reason."""

from typing import Any

import open_clip
import pytest
import torch
from builders import named_tower, pixels
from measures import relative_error
from tolerances import EMBEDDING_FLOAT32, SUM_FLOAT32

from clipfast import wrap
from clipfast.towers import openclip, openclip_models


def shrink(vision: dict[str, Any]) -> dict[str, Any]:
    """Two layers, two heads as wide as the config's, four patches a side; every other flag as it is.

    Of a ResNet: one block a stage, two positions a side.
    """
    if isinstance(vision["layers"], list):
        return {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 32}
    patch = vision["patch_size"]
    return {"layers": 2, "width": 2 * vision.get("head_width", 64), "image_size": 4 * patch, "embed_dim": 32}


def vision_config(name: str) -> dict[str, Any]:
    return dict(open_clip.get_model_config(name)["vision_cfg"])


# Models with a trunk of timm are walked over in test_timm_reading.
@pytest.mark.parametrize(
    "name", [name for name in open_clip.list_models() if "timm_model_name" not in vision_config(name)]
)
def test_decomposes_or_is_refused(name: str) -> None:
    vision = vision_config(name)
    visual = named_tower(name, **shrink(vision))
    reasons = openclip.refusals(visual)
    assert [key for key, _ in reasons] == [key for key, _ in openclip_models.supports(name)]
    assert reasons == []
    model, images = wrap(visual), pixels(visual)
    with torch.no_grad():
        plain = visual(images)
    plain = plain[0] if isinstance(plain, tuple) else plain
    contributions = model.decompose(images)
    assert contributions.max_error() <= SUM_FLOAT32
    assert relative_error(contributions.embedding, plain) <= EMBEDDING_FLOAT32
    assert torch.equal(model.encode_image(images, normalize=False), plain)


def test_the_well_known_models_are_supported() -> None:
    """At their full size, by their configs."""
    names = [
        "ViT-B-32",
        "ViT-B-16-quickgelu",
        "ViT-L-14-336",
        "ViT-H-14",
        "ViT-g-14",
        "ViT-bigG-14-CLIPA",
        "ViT-M-16-alt",
        "coca_ViT-L-14",
        "RN50x64-quickgelu",
    ]
    assert {name: openclip_models.supports(name) for name in names} == {name: [] for name in names}
