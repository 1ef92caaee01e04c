"""A linear map that a user puts after a model's embedding."""

from typing import Any

import pytest
import torch
from builders import pixels, vision_tower
from huggingface_models import MODELS
from tolerances import FLOAT64

import clipfast
from clipfast import InputError


@pytest.mark.parametrize("name", ["Dinov2Model", "SiglipVisionModel"])
def test_a_probe_after_a_model_without_projection(name: str) -> None:
    module = MODELS[name]().double().eval()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    plain = clipfast.wrap(module)
    probe = torch.randn(plain.tower.embed_dim, 5, dtype=torch.float64)
    model = clipfast.wrap(module, projection=probe)
    contributions = model.decompose(images)
    expected = plain.encode_image(images, normalize=False) @ probe
    assert contributions.embedding.shape == (2, 5)
    assert torch.allclose(contributions.embedding, expected, atol=FLOAT64, rtol=0)
    assert torch.allclose(model.encode_image(images, normalize=False), expected, atol=FLOAT64, rtol=0)
    assert contributions.max_error() <= FLOAT64
    assert model.verify(images).ok


def test_a_map_after_a_projection_is_followed_when_it_changes() -> None:
    visual = vision_tower(dtype=torch.float64)
    images = pixels(visual, dtype=torch.float64)
    bridge = torch.randn(20, 7, dtype=torch.float64)
    model = clipfast.wrap(visual, projection=bridge)
    for weight in (bridge, visual.proj):  # each is a source of what is read
        with torch.no_grad():
            weight.mul_(2)
            own = visual(images)
        contributions = model.decompose(images)
        assert torch.allclose(contributions.embedding, own @ bridge, atol=FLOAT64, rtol=0)
        assert contributions.max_error() <= FLOAT64


def test_it_follows_the_dtype_of_the_module() -> None:
    visual = vision_tower()
    model = clipfast.wrap(visual, projection=torch.randn(20, 4))
    visual.double()
    assert model.decompose(pixels(visual, dtype=torch.float64)).embedding.dtype == torch.float64


@pytest.mark.parametrize("shape", [(5, 5), (20,)])
def test_a_map_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^projection is float32 .*: expected floating point \[20, any width\]$"):
        clipfast.wrap(vision_tower(), projection=torch.zeros(shape))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.nn.Linear(20, 4), r"projection is a Linear: give a tensor, of a linear layer weight\.T"),
        ([[1.0]], "projection is a list: give a tensor"),
        (torch.zeros(20, 4, device="meta"), "projection is on the meta device and has no values"),
        (torch.zeros(20, 0), r"projection is float32 \[20, 0\]"),
    ],
)
def test_what_is_no_map_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        clipfast.wrap(vision_tower(), projection=given)
