"""Memory that a forward on the CPU uses again from layer to layer.

A layer's intermediate results are as large as the last one's, and yet malloc may not put them in the same place: what
it handed out on a boundary of 64 bytes, as torch asks for it, is too small for the next such request once the few bytes
around it went to something else. Then the heap grows with every layer. So a forward says what it is done with, and
products and operations in C++ write the next result there. Other devices are left alone: torch's allocators for them
do this themselves.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

SPARE = 2
"""A room may be so many times as large as what is put into it."""


class Rooms:
    """Pieces of memory, each lent to one tensor at a time."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous tensor of that shape, in the dtype of ``like``."""
        count = prod(shape)
        place = None
        for number, room in enumerate(self._free):
            if room.dtype == like.dtype and count <= room.numel() <= SPARE * count:
                place = number
        if place is None:
            # What is a little too small is given up: the larger one will do for both.
            self._free = [room for room in self._free if not count <= SPARE * room.numel() < SPARE * count]
            taken = like.new_empty(count)
        else:
            taken = self._free.pop(place)
        if count:
            self._lent[taken.data_ptr()] = taken
        return taken[:count].view(shape)

    def free(self, *tensors: Tensor | None) -> None:
        """Takes rooms back, by any view of what is in them; what was never lent is let be."""
        for tensor in tensors:
            room = None if tensor is None else self._lent.pop(tensor.untyped_storage().data_ptr(), None)
            if room is not None:
                self._free.append(room)


class _NoRooms(Rooms):
    """Where memory is somebody else's business."""

    def free(self, *tensors: Tensor | None) -> None:
        pass


NONE = _NoRooms()
_OPEN = threading.local()


@contextmanager
def reused(device: torch.device) -> Iterator[Rooms]:
    """Rooms for the operations of this thread until the end of the block; none of their results may leave it."""
    if device.type != "cpu" or _get_current_dispatch_mode() is not None:
        yield NONE
        return
    before = getattr(_OPEN, "rooms", None)
    _OPEN.rooms = rooms = Rooms()
    try:
        yield rooms
    finally:
        _OPEN.rooms = before


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``, or a room of that shape where there are rooms."""
    rooms: Rooms | None = getattr(_OPEN, "rooms", None)
    return like.new_empty(shape) if rooms is None or like.device.type != "cpu" else rooms.take(like, shape)


def free(tensor: Tensor) -> None:
    """Gives back what :func:`empty` lent, where there are rooms."""
    rooms: Rooms | None = getattr(_OPEN, "rooms", None)
    if rooms is not None:
        rooms.free(tensor)


def any_open() -> bool:
    """Whether there are rooms."""
    return getattr(_OPEN, "rooms", None) is not None
