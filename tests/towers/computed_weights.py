"""Checks of models whose weights are computed from others."""

from typing import Any

import torch
from measures import relative_error
from tolerances import EMBEDDING_FLOAT32, SUM_FLOAT32
from torch import nn

from clipfast import Model


def assert_agrees(model: Model, images: torch.Tensor) -> torch.Tensor:
    """The decomposed embedding is the module's own, in sum and in every part; returns it."""
    contributions = model.decompose(images)
    assert relative_error(contributions.embedding, model.encode_image(images, normalize=False)) <= EMBEDDING_FLOAT32
    assert contributions.max_error() <= SUM_FLOAT32
    assert model.verify(images).ok
    return contributions.embedding


def state_of(module: nn.Module) -> list[object]:
    """What a test compares before and after: every tensor with its bits and identity, hooks, classes and modes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    values = [(name, id(tensor), tensor._version, tensor.clone()) for name, tensor in tensors]
    modules = [
        (type(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part)))
        for part in module.modules()
    ]
    return [values, modules, torch.get_rng_state()]


def assert_untouched(before: list[Any], after: list[Any]) -> None:
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    for (name, identity, version, value), other in zip(before[0], after[0], strict=True):
        assert (name, identity, version) == other[:3]
        assert torch.equal(value, other[3]), name
