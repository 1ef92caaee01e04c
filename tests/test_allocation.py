"""Decomposing never makes a tensor as large as the contributions of every token through every head."""

from collections.abc import Callable

import pytest
import torch
from builders import directions, named_tower, pixels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipfast import Model, wrap

IMAGES, TOKENS, HEADS, EMBED_DIM = 4, 50, 12, 512  # ViT-B-32
TOKEN_LEVEL = IMAGES * TOKENS * HEADS * EMBED_DIM


class Allocations(TorchDispatchMode):
    """Records how many elements the memory behind every tensor holds that any operation returns.

    Views of the weights are not counted: B-32's own weights are larger than the limit, and are there already.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.largest = 0
        self.by = "nothing"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() in self.weights:
                continue
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            if elements > self.largest:
                self.largest, self.by = elements, str(func)
        return result


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(named_tower("ViT-B-32", layers=3))


def largest(model: Model, work: Callable[[], object]) -> Allocations:
    with Allocations(model.module) as seen:
        work()
    return seen


@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_nothing_reaches_the_size_of_every_token_through_every_head(model: Model, centring: str) -> None:
    images, texts = pixels(model.module, IMAGES), directions(16, EMBED_DIM)

    def work() -> None:
        contributions = model.decompose(images, texts=texts, maps="summed", attention=True, centring=centring)
        assert contributions.attention.shape == (IMAGES, 3, HEADS, TOKENS)
        assert contributions.heads().shape[-1] == contributions.mlps.shape[-1] == EMBED_DIM
        contributions.max_error()
        contributions.scores(texts)

    seen = largest(model, work)
    assert 0 < seen.largest < TOKEN_LEVEL, f"{seen.by} returned {seen.largest} elements of {TOKEN_LEVEL}"


def test_averaging_over_patches_does_not_either() -> None:
    """The mean attention row needs every query's weights: one image's at a time."""
    pooled = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}
    model = wrap(named_tower("ViT-B-32", layers=3, **pooled))
    images, texts = pixels(model.module, IMAGES), directions(16, EMBED_DIM)
    seen = largest(model, lambda: model.decompose(images, texts=texts, attention=True).heads())
    assert 0 < seen.largest < TOKEN_LEVEL, f"{seen.by} returned {seen.largest} elements of {TOKEN_LEVEL}"


def test_the_guard_fires_where_tokens_are_asked_for(model: Model) -> None:
    contributions = model.decompose(pixels(model.module, IMAGES), tokens=True)
    seen = largest(model, lambda: contributions.tokens(1))
    assert seen.largest >= TOKEN_LEVEL


def test__values_hold_on_to_nothing_else(model: Model) -> None:
    """A view of a layer's packed queries, keys and values would keep three times the memory alive."""
    contributions = model.decompose(pixels(model.module, IMAGES), tokens=True)
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in contributions._values}
    assert sum(held.values()) == sum(value.numel() * value.element_size() for value in contributions._values)
