"""The moments of a whole collection: those of its units, merged in the order of the plan.

The order is fixed, so the sums have the same bits whoever computed the units. The result is kept in
``moments.safetensors``, with the digest of the records that it is of in ``merged.json``.
"""

import json
from collections.abc import Callable
from pathlib import Path

import xxhash

from clipfast import storage
from clipfast.analyses.moments import Moments
from clipfast.basis import Basis, StoredBasis
from clipfast.dataset.manifest import BASIS, MOMENTS, Manifest, Record
from clipfast.errors import InputError
from clipfast.files import write_text

MERGED = "merged.json"
BASIS_FORMAT = "clipfast.basis/1"


def save_basis(basis: Basis, layers: int, folder: Path) -> None:
    """Writes the model's part of every contribution.

    Raises:
        OSError: it cannot be written.
    """
    kept = tuple(range(layers))
    header = {"format": BASIS_FORMAT, "layers": kept} | basis.header()
    storage.write(folder / BASIS, header, basis.tensors(kept))


def load_basis(folder: Path) -> StoredBasis:
    """Reads what :func:`save_basis` wrote.

    Raises:
        InputError: it is gone or damaged.
    """
    path = folder / BASIS
    try:
        header, tensors = storage.read(path, BASIS_FORMAT, "clipfast collect")
    except FileNotFoundError:
        raise InputError(f"{path} is gone: collect the images again") from None
    with storage.as_damage(path):
        return StoredBasis.of(tensors, tuple(header["layers"]), header)


def unit_moments(manifest: Manifest, record: Record, basis: Basis, backend: str = "auto") -> Moments | None:
    """The moments of one unit; None where none of its images is in.

    Raises:
        InputError: they are gone, damaged, or not those of the record.
    """
    if not record.count:
        return None
    path = manifest.data / record.folder / MOMENTS
    if MOMENTS not in record.files:
        raise InputError(f"{manifest.record_path(record.unit)} names no {MOMENTS}: it is damaged")
    size, checksum = record.files[MOMENTS]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): see `clipfast collection validate`") from None
    if len(data) != size or storage.checksum(data) != checksum:
        raise InputError(f"{path} is damaged or was edited: see `clipfast collection validate`")
    moments = Moments.load(path, backend=backend, basis=basis)
    if moments.count != record.count:
        raise InputError(f"{path} holds {moments.count} images, its record counts {record.count}: it is damaged")
    return moments


def merged_moments(
    manifest: Manifest, *, backend: str = "auto", advance: Callable[[int], None] = lambda _: None
) -> Moments:
    """The moments of all finished units; read from the kept file where it is of these records.

    Args:
        manifest: of the collection.
        backend: which kernels the moments use.
        advance: called with 1 after each unit.

    Raises:
        InputError: no image is in, or a file is gone or damaged.
    """
    kept = _kept(manifest, backend)
    return kept if kept is not None else merge_units(manifest, backend=backend, advance=advance)


def merge_units(
    manifest: Manifest, *, backend: str = "auto", advance: Callable[[int], None] = lambda _: None
) -> Moments:
    """As :func:`merged_moments`, always from the units' own files."""
    basis = load_basis(manifest.folder)
    total: Moments | None = None
    for record in manifest.records():
        moments = unit_moments(manifest, record, basis, backend)
        if moments is not None and total is None:
            total = moments
        elif moments is not None and total is not None:
            total.merge(moments)
        advance(1)
    if total is None:
        raise InputError(f"{manifest.folder} holds no image: none was collected, or none could be read")
    return total


def keep_merged(manifest: Manifest, advance: Callable[[int], None] = lambda _: None) -> Moments | None:
    """Merges the moments of all units into the kept file; None where no image is in. Hold the collection's lock.

    Raises:
        InputError: a file is gone or damaged.
        OSError: the result cannot be written.
    """
    if not any(record.count for record in manifest.records()):
        return None
    kept = _kept(manifest, "auto")
    if kept is not None:
        return kept
    digest, moments = records_digest(manifest), merge_units(manifest, advance=advance)
    moments.save(manifest.folder / MOMENTS)
    content = {"records": digest, "moments": storage.file_checksum(manifest.folder / MOMENTS)}
    write_text(manifest.folder / MERGED, json.dumps(content) + "\n")
    return moments


def records_digest(manifest: Manifest) -> str:
    """A digest of all records, 32 hexadecimal digits: another one after any change."""
    digest = xxhash.xxh3_128()
    for unit in sorted(manifest.finished()):
        digest.update(manifest.record_path(unit).read_bytes())
    return digest.hexdigest()


def _kept(manifest: Manifest, backend: str) -> Moments | None:
    """What :func:`keep_merged` wrote, None where it is of other records, damaged or not there: it is made again."""
    try:
        content = json.loads((manifest.folder / MERGED).read_text(encoding="utf-8"))
        if content["records"] != records_digest(manifest):
            return None
        path = manifest.folder / MOMENTS
        moments = Moments.load(path, backend=backend)
        return moments if storage.file_checksum(path) == content["moments"] else None
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return None
