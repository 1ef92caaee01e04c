"""Small batches as CUDA graphs: refused without a GPU, the same numbers with one."""

from collections.abc import Callable

import pytest
import torch
from builders import pixels, vision_tower
from measures import error
from tolerances import FLOAT32

import clipfast
from clipfast import InputError, Model
from clipfast.graphs import KEPT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="cuda_graphs needs a model on a CUDA device, and this one is on cpu"):
        clipfast.wrap(vision_tower(), cuda_graphs=8)
    with pytest.raises(InputError, match="cuda_graphs needs a model on a CUDA device"):
        clipfast.load("scenes", device="cpu", cuda_graphs=8)


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(InputError, match="cuda_graphs is -1: it is the largest batch to capture, 0 for none"):
        clipfast.wrap(vision_tower(), cuda_graphs=-1)


def test_a_model_that_moved_to_the_cpu_runs_there() -> None:
    """No graph is asked for a batch that is not on a GPU."""
    model = clipfast.wrap(vision_tower())
    model._graphs.largest = 8
    images = pixels(model.module, 2)
    assert not model._graphs.takes(images)
    assert model.decompose(images).max_error() <= FLOAT32


@pytest.fixture
def pair() -> tuple[Model, Model]:
    module = vision_tower().to("cuda")
    return clipfast.wrap(module, cuda_graphs=4), clipfast.wrap(module)


@needs_gpu
def test_a_replay_gives_what_the_forward_gives(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    for count in (1, 4, 5, 1):  # 5 is too large for a graph
        for draw in range(2):
            images = torch.randn_like(pixels(plain.module, count).cuda()) + draw
            have, expected = (model.decompose(images, attention=True) for model in (graphed, plain))
            for name, tensor in expected._tensors().items():
                assert error(have._tensors()[name].cpu(), tensor.cpu()) <= FLOAT32, name
    assert len(graphed._graphs._captured) == 2


@needs_gpu
def test_results_are_the_callers_own(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    first, second = (torch.randn_like(pixels(plain.module, 2).cuda()) for _ in range(2))
    kept = graphed.decompose(first)
    before = kept.codes.clone()
    graphed.decompose(second)
    assert torch.equal(kept.codes, before)


@needs_gpu
@pytest.mark.parametrize("change", [lambda p: p.mul_(1.1), lambda p: setattr(p, "data", p.data * 1.1)])
def test_weights_that_change_are_seen(pair: tuple[Model, Model], change: Callable[[torch.Tensor], object]) -> None:
    graphed, plain = pair
    images = pixels(plain.module, 2).cuda()
    graphed.decompose(images)
    with torch.no_grad():
        for parameter in plain.module.parameters():
            change(parameter)
    assert error(graphed.decompose(images).heads().cpu(), plain.decompose(images).heads().cpu()) <= FLOAT32


@needs_gpu
def test_few_graphs_are_kept(pair: tuple[Model, Model]) -> None:
    graphed, plain = pair
    images = pixels(plain.module, 1).cuda()
    for layers in range(KEPT + 2):
        graphed.decompose(images, layers=[layers % plain.tower.layers], attention=layers >= plain.tower.layers)
    assert len(graphed._graphs._captured) <= KEPT
