"""Files of a unit, checked as they are read: whole ones, and pieces of shards.

A record has size and checksum of every file, so a file that is read whole is checked by that. Of a shard often a piece
alone is read, a chunk or the index of chunks. The checksums of its pieces stand among the attributes of its array, in
``zarr.json``, a file that is read whole. So what is read is what was written, in that file: not only undamaged, as the
crc32c of a chunk says, but also of no other unit and no other place.
"""

import asyncio
import base64
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore

from clipfast.errors import InputError

_BLOCK = 1 << 20
_ABSENT = np.iinfo(np.uint64).max  # in an index: the chunk was never written
_CRC = 4  # bytes behind an index


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and checksum (xxh3_128) of every file in a folder and below, by its path in the folder, in a fixed order.

    Files are read in blocks, whatever their size.

    Raises:
        OSError: one cannot be read.
    """
    paths = sorted((path for path in folder.rglob("*") if not path.is_dir()), key=lambda path: path.parts)
    return {path.relative_to(folder).as_posix(): sized_checksum(path) for path in paths}


def sized_checksum(path: Path) -> tuple[int, str]:
    """Bytes and checksum (xxh3_128, 32 hexadecimal digits) of a file, read in blocks.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def advice(folder: Path) -> str:
    """What to do about damage in a unit's folder, for the end of a message."""
    collection = folder.parent.parent
    return (
        f"`clipfast collection validate {collection}` lists all damage, "
        f"`clipfast collection retry {collection}` computes the unit again"
    )


def damaged(path: Path, folder: Path, what: str) -> InputError:
    """The error about a damaged file of a unit's folder."""
    return InputError(f"{path} is damaged: {what}; {advice(folder)}")


def read_whole(folder: Path, name: str, files: Mapping[str, tuple[int, str]]) -> bytes:
    """The bytes of a file that a record names.

    Args:
        folder: of the unit.
        name: of the file in there.
        files: those of the record.

    Raises:
        InputError: it is gone, damaged, or not in the record.
    """
    path = folder / name
    if name not in files:
        raise damaged(path, folder, "the record of the unit does not name it")
    size, checksum = files[name]
    try:
        if path.stat().st_size == size:
            content = path.read_bytes()
            if xxhash.xxh3_128_hexdigest(content) != checksum:
                raise damaged(path, folder, "its checksum is not that of the record")
            return content
        raise damaged(path, folder, f"it has {path.stat().st_size} bytes, the record says {size}")
    except FileNotFoundError:
        raise InputError(f"{path} is gone; {advice(folder)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {advice(folder)}") from None


def checksums_of_pieces(shard: Path, chunks: int) -> str:
    """The checksums of a shard's chunks and of its index.

    Args:
        shard: a file with its index at the end.
        chunks: how many chunks its index has.

    Returns:
        A number of 64 bits each (xxh3_64, little endian), all of them in base64.

    Raises:
        OSError: it cannot be read.
    """
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = len(content) - 16 * chunks - _CRC
        index = np.frombuffer(content[start : len(content) - _CRC], "<u8").reshape(-1, 2)
        ranges = [(int(offset), int(offset + size)) for offset, size in index if offset != _ABSENT]
        sums = [xxhash.xxh3_64_intdigest(content[first:last]) for first, last in [*ranges, (start, len(content))]]
    return base64.b64encode(np.array(sums, "<u8").tobytes()).decode("ascii")


class CheckedStore(LocalStore):
    """The files of a unit for Zarr, to read. Nothing that differs from what was recorded is given to it.

    Zarr itself takes a missing shard, and a chunk cut off at the end of one, for values that were never written.

    Args:
        root: the folder of the unit.
        files: bytes and checksum of each file, from the record.

    Attributes:
        bytes_read: how many bytes were read so far.
    """

    def __init__(self, root: Path, files: Mapping[str, tuple[int, str]]) -> None:
        super().__init__(root, read_only=True)
        self._files = files
        self._pieces: dict[str, frozenset[int]] = {}
        self.bytes_read = 0

    def expect(self, pieces: Mapping[str, str]) -> None:
        """Takes the checksums of pieces of shards, see :func:`checksums_of_pieces`, by the shards' names."""
        for name, sums in pieces.items():
            self._pieces[name] = frozenset(np.frombuffer(base64.b64decode(sums), "<u8").tolist())

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a file or a piece of it.

        Raises:
            InputError: they are not those that were recorded.
        """
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The same without asyncio."""
        content = read_whole(self.root, key, self._files) if byte_range is None else self._piece(key, byte_range)
        self.bytes_read += len(content)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    def _piece(self, name: str, byte_range: ByteRequest) -> bytes:
        path = self.root / name
        if name not in self._files or name not in self._pieces:
            raise damaged(path, self.root, "the record of the unit does not name it")
        size = self._files[name][0]
        start, stop = _bounds(byte_range, size)
        try:
            with open(path, "rb", buffering=0) as file:
                have = os.fstat(file.fileno()).st_size
                if have != size:
                    raise damaged(path, self.root, f"it has {have} bytes, the record says {size}")
                file.seek(start)
                content = file.read(stop - start)
        except FileNotFoundError:
            raise InputError(f"{path} is gone; {advice(self.root)}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; {advice(self.root)}") from None
        if xxhash.xxh3_64_intdigest(content) not in self._pieces[name]:
            raise damaged(path, self.root, f"bytes {start} to {stop} are not those that were written")
        return content


def _bounds(byte_range: ByteRequest, size: int) -> tuple[int, int]:
    """First byte, and the first one behind."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    assert isinstance(byte_range, OffsetByteRequest)
    return byte_range.offset, size
