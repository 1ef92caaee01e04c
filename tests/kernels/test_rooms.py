"""Memory that a forward uses again: what is lent, what comes back, and that nothing of it is anybody's afterwards."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import directions, pixels, vision_tower
from torch import Tensor
from torch.utils._pytree import tree_leaves

import clipfast
from clipfast.kernels import ops, rooms

CPU = torch.device("cpu")
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[rooms.Rooms]:
    """Every set of rooms that is opened."""
    found: list[rooms.Rooms] = []

    class Watched(rooms.Rooms):
        def __init__(self) -> None:
            super().__init__()
            self.fresh: list[Tensor] = []
            found.append(self)

        def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
            known = {room.data_ptr() for room in self._free}
            taken = super().take(like, shape)
            if taken.numel() and taken.data_ptr() not in known:
                self.fresh.append(self._lent[taken.data_ptr()])
            return taken

    monkeypatch.setattr(rooms, "Rooms", Watched)
    return found


def test_a_room_is_lent_again_once_it_is_free() -> None:
    with rooms.reused(CPU) as room:
        first = rooms.empty(LIKE, 3, 4)
        second = rooms.empty(LIKE, 3, 4)
        assert first.data_ptr() != second.data_ptr()
        assert first.shape == (3, 4)
        assert first.is_contiguous()
        place = first.data_ptr()
        room.free(first[1:, 2].view(-1))  # by any view
        room.free(first, None, torch.zeros(12))  # once is enough, and strangers are let be
        assert rooms.empty(LIKE, 2, 5).data_ptr() == place
        assert rooms.empty(LIKE, 12).data_ptr() not in (place, second.data_ptr())


def test_a_room_fits_in_size_and_dtype() -> None:
    with rooms.reused(CPU) as room:
        held = rooms.empty(LIKE, 100)
        room.free(held)
        assert rooms.empty(LIKE.bfloat16(), 100).dtype == torch.bfloat16
        assert rooms.empty(LIKE, 40).data_ptr() != held.data_ptr()  # less than half of it
        large = rooms.empty(LIKE, 150)  # and the one of 100 is given up for it
        room.free(large)
        assert rooms.empty(LIKE, 100).data_ptr() == large.data_ptr()
        assert rooms.empty(LIKE, 0, 7).shape == (0, 7)


def test_rooms_are_a_matter_of_one_thread_and_one_block() -> None:
    with rooms.reused(CPU) as room:
        free = rooms.empty(LIKE, 8)
        room.free(free)
        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(rooms.any_open()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
        with rooms.reused(CPU):
            assert rooms.empty(LIKE, 8).data_ptr() != free.data_ptr()
        assert rooms.empty(LIKE, 8).data_ptr() == free.data_ptr()
        with rooms.reused(torch.device("meta")) as none:
            none.free(free)
    assert not rooms.any_open()


def test_operations_write_into_rooms() -> None:
    x, weight, bias = torch.randn(2, 5, 16), torch.randn(48, 16), torch.randn(48)
    want = ops.linear(x, weight, bias)
    with rooms.reused(CPU) as room:
        free = rooms.empty(LIKE, *want.shape)
        room.free(free)
        have = ops.linear(x, weight, bias)
        assert have.data_ptr() == free.data_ptr()
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_a_forward_needs_as_many_rooms_for_any_number_of_layers(
    made: list[Any], pooling: str, dtype: torch.dtype
) -> None:
    wanted: dict[str, Any] = {"texts": directions(3, 20), "maps": "summed", "attention": True, "tokens": True}
    for layers in (2, 7):
        visual = vision_tower(layers=layers, pool_type=pooling, final_ln_after_pool=True, dtype=dtype)
        model = clipfast.wrap(visual)
        found = model.decompose(pixels(visual, dtype=dtype), class_token=pooling == "tok", **wanted)
        kept = [each for each in tree_leaves(vars(found)) if isinstance(each, Tensor)]
        places = {each.untyped_storage().data_ptr() for each in made[-1].fresh}
        assert len(kept) > 5
        assert not [each.shape for each in kept if each.numel() and each.untyped_storage().data_ptr() in places]
    assert len(made) == 2
    assert 1 < len(made[0].fresh) == len(made[1].fresh)


def test_the_next_forward_changes_nothing_of_the_last() -> None:
    visual = vision_tower()
    model = clipfast.wrap(visual)
    wanted: dict[str, Any] = {"texts": directions(3, 20), "maps": "per_head", "attention": True, "tokens": True}
    found = model.decompose(pixels(visual, seed=1), **wanted)
    before = [each.clone() for each in tree_leaves(vars(found)) if isinstance(each, Tensor)]
    model.decompose(pixels(visual, seed=2), **wanted)
    after = [each for each in tree_leaves(vars(found)) if isinstance(each, Tensor)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
