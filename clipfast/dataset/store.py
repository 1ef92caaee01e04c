"""Contributions of many images in few files.

A saved :class:`~clipfast.contributions.Contributions` carries the model's basis (20 to 80 MB for large models), so that
it can be read without the model. Written per image, it would be many times the size of the codes. So images are
gathered until their own data is as large as the basis (at least 16 MB, at most 512 MB) and written as
``contributions-00000.safetensors`` and so on. :meth:`Contributions.load` reads each of them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from clipfast import storage
from clipfast.contributions import Contributions

_MIN_BYTES = 16 << 20
_MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class Shard:
    """A file of contributions.

    Attributes:
        file: its name in the folder.
        rows: how many images it has.
        checksum: see :func:`clipfast.storage.file_checksum`.
    """

    file: str
    rows: int
    checksum: str


@dataclass(frozen=True)
class _State:
    """Files that are written, and batches that wait in memory, with rows and bytes of each."""

    shards: tuple[Shard, ...] = ()
    waiting: list[Contributions] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


class ShardWriter:
    """Gathers contributions and writes them to numbered files in a folder.

    Args:
        folder: the folder.
        shards: the files that are already there, to go on after them.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...] = ()) -> None:
        self._folder = folder
        self._state = _State(shards)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files that are written."""
        return self._state.shards

    @property
    def waiting(self) -> int:
        """Batches that are in memory only."""
        return len(self._state.sizes)

    @property
    def is_full(self) -> bool:
        """Whether what waits in memory is enough for a file."""
        if not self._state.waiting:
            return False
        first = self._state.waiting[0]
        basis = sum(first.basis.values(layer).nbytes for layer in first.layers)
        return sum(size for _, size in self._state.sizes) >= min(max(basis, _MIN_BYTES), _MAX_BYTES)

    def add(self, contributions: Contributions) -> list[tuple[str, int]]:
        """Takes a batch into memory; returns where each of its images will be: (file name, row)."""
        state = self._state
        start = sum(rows for rows, _ in state.sizes)
        state.waiting.append(contributions.cpu())
        state.sizes.append((len(contributions), contributions.nbytes))
        return [(_name(len(state.shards)), start + row) for row in range(len(contributions))]

    def drop(self, batches: int) -> None:
        """Forgets the batches in memory from this number on."""
        del self._state.waiting[batches:]
        del self._state.sizes[batches:]

    def flush(self) -> None:
        """Writes what waits in memory to a new file; when that fails, it still waits.

        Raises:
            OSError: the file cannot be written.
        """
        state = self._state
        if not state.waiting:
            return
        path = self._folder / _name(len(state.shards))
        contributions = Contributions.cat(state.waiting)
        contributions.save(path)
        shard = Shard(path.name, len(contributions), storage.file_checksum(path))
        self._state = _State((*state.shards, shard))


def _name(number: int) -> str:
    return f"contributions-{number:05d}.safetensors"
