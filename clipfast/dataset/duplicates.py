"""Names of images that two collections share, found in bounded memory."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from clipfast.dataset.images_table import read_images
from clipfast.dataset.manifest import Manifest

_BUCKETS = 64
_BYTES = 16  # of a hash
_MOST = 10_000  # hashes that are looked up again

Units = Sequence[tuple[Manifest, int]]
"""Units, each with a collection that has it."""


def names_in_both(one: Units, other: Units) -> Iterator[str]:
    """Names of images that are in both, some thousands at most, in the order of ``other``.

    Hashes of the names go to files, divided by their first bits, and are compared file by file. What is equal there is
    looked up again.

    Raises:
        InputError: a table of images is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="clipfast-names-") as folder:
        first, second = Path(folder, "1"), Path(folder, "2")
        for units, path in ((one, first), (other, second)):
            path.mkdir()
            _write_hashes(units, path)
        both: set[bytes] = set()
        for bucket in range(_BUCKETS):
            equal = np.intersect1d(_hashes(first, bucket), _hashes(second, bucket))
            both.update(bytes(each) for each in equal[: _MOST - len(both)])
    if both:
        names = {name for name in _names(one) if _hash(name) in both}
        yield from (name for name in _names(other) if _hash(name) in both and name in names)


def _hash(name: str) -> bytes:
    return xxhash.xxh3_128_digest(name.encode("utf-8", "surrogateescape"))


def _names(units: Units) -> Iterator[str]:
    for manifest, unit in units:
        record = manifest.record(unit)
        yield from read_images(manifest.data / record.folder, record, ["id"]).column("id").to_pylist()


def _write_hashes(units: Units, folder: Path) -> None:
    files = [open(folder / str(bucket), "wb") for bucket in range(_BUCKETS)]  # noqa: SIM115
    try:
        for name in _names(units):
            digest = _hash(name)
            files[digest[0] % _BUCKETS].write(digest)
    finally:
        for file in files:
            file.close()


def _hashes(folder: Path, bucket: int) -> npt.NDArray[np.void]:
    return np.fromfile(folder / str(bucket), np.dtype(f"V{_BYTES}"))
