"""Wrapping, decomposing and verifying leave a module of any package as it was, to the bit."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import openai_package
import pytest
import torch
from builders import vision_tower
from families import FAMILIES
from torch import Tensor, nn

import clipfast

SIDE = 24


def _hooks(module: nn.Module) -> list[tuple[str, int]]:
    """How many hooks of each kind every module has."""
    return [
        (f"{path}.{name}", len(value))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name.endswith("_hooks")
    ]


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "places": {name: tensor.data_ptr() for name, tensor in module.state_dict().items()},
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "hooks": _hooks(module),
        "training": [part.training for part in module.modules()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "methods": [name for part in module.modules() for name in vars(part) if callable(vars(part)[name])],
    }


def _random() -> tuple[Tensor, Any, tuple[Any, ...]]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _equal(have: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(have, expected)
    if isinstance(expected, np.ndarray):
        return np.array_equal(have, expected)
    if isinstance(expected, dict):
        return have.keys() == expected.keys() and all(_equal(have[name], value) for name, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(have) == len(expected) and all(map(_equal, have, expected))
    return bool(have == expected)


def _own(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if name == "open_clip":
        visual = vision_tower(dtype=torch.float64)
        return visual, visual
    if name == "openai":
        openai_package.package()  # skips where it is not installed
        clip: Any = openai_package.build()  # whose norms take float32
        return clip, clip.encode_image
    family = FAMILIES[name]()
    return family.module, family.embed


@pytest.mark.parametrize("name", ["open_clip", "openai", *FAMILIES])
def test_a_module_stays_as_it_was(name: str) -> None:
    module, own = _own(name)
    side = module.visual.input_resolution if name == "openai" else SIDE
    dtype = torch.float32 if name == "openai" else torch.float64
    images = torch.randn(2, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = own(images)
    before, numbers = _state(module), _random()
    model = clipfast.wrap(module)
    model.describe()
    texts = torch.ones(1, model.tower.embed_dim, dtype=dtype)
    for depth in ("all", "pool"):
        if (depth == "pool" and model.tower.pooling == "cls") or (depth == "all" and not model.tower.blocks):
            continue
        contributions = model.decompose(images, texts=texts, attention=True, depth=depth)
        contributions.heads()
    model.verify(images)
    model.encode_image(images)
    assert _equal(_random(), numbers)
    after = _state(module)
    for what, value in before.items():
        assert _equal(after[what], value), what
    with torch.no_grad():
        assert torch.equal(own(images), embedding)
