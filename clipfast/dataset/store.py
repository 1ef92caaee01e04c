"""Contributions of many images in few files.

A saved :class:`~clipfast.contributions.Contributions` carries the model's basis (some 20-80 MB for large models) so
that it can be read without the model. Written per image it would dwarf the codes, so images are gathered until their
own data weighs as much as the basis (at least 16 MB, at most 512 MB) and written as ``contributions-00000.safetensors``
and so on, each readable with :meth:`Contributions.load`.
"""

from pathlib import Path

from clipfast.contributions import Contributions
from clipfast.files import atomic_write

_LEAST = 16 << 20
_MOST = 512 << 20


class ShardWriter:
    """Gathers contributions and writes them to numbered files in a folder.

    Args:
        folder: the folder.
        written: how many such files are there already.
    """

    def __init__(self, folder: Path, written: int = 0) -> None:
        self._folder = folder
        self._waiting: list[Contributions] = []
        self._held = 0
        self._written = written

    def add(self, found: Contributions) -> list[tuple[str, int]]:
        """Takes a batch; returns where each of its images will be found: (file name, row).

        Raises:
            OSError: a file cannot be written.
        """
        name = self._name()
        start = sum(len(part) for part in self._waiting)
        places = [(name, start + row) for row in range(len(found))]
        self._waiting.append(found.cpu())
        self._held += found.nbytes
        basis = sum(found.basis.values(layer).nbytes for layer in found.layers)
        if self._held >= min(max(basis, _LEAST), _MOST):
            self.flush()
        return places

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._waiting:
            return
        with atomic_write(self._folder / self._name()) as partial:
            Contributions.cat(self._waiting).save(partial)
        self._waiting, self._held = [], 0
        self._written += 1

    def _name(self) -> str:
        return f"contributions-{self._written:05d}.safetensors"
