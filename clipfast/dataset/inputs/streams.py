"""Reading a file once, forward: the checksum of its bytes, and what it holds when it is compressed."""

import contextlib
import io
from typing import BinaryIO, cast

import fsspec.compression
import fsspec.utils
import pyarrow as pa
import xxhash

from clipfast.dataset.inputs.locations import unit_error
from clipfast.dataset.plan import UnitError
from clipfast.inputs import printable

_BUFFER = 1 << 20
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""What compressed files begin with, by fsspec's name for the compression."""


class Checksummed(io.RawIOBase):
    """A file that is read forward, with the checksum of what was read.

    Args:
        file: open for reading; it is closed with this one.
        name: what the user calls it, for messages.

    Raises:
        UnitError: when a read fails.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__()
        self._file, self._name = file, name
        self._hash, self.size = xxhash.xxh3_128(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: object, /) -> int:
        """Reads as many bytes as there are, at most as many as fit."""
        view = memoryview(cast(bytearray, buffer)).cast("B")
        try:
            data = self._file.read(len(view))
        except UnitError:
            raise
        except Exception as error:  # file systems raise what they like
            raise unit_error(self._name, error) from None
        view[: len(data)] = data
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def seekable(self) -> bool:
        """Whether the file is; the checksum is wrong afterwards."""
        return self._file.seekable()

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        """Goes to a byte."""
        return self._file.seek(position, whence)

    def tell(self) -> int:
        """Where the file is."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file too."""
        if not self.closed:
            self._file.close()
        super().close()

    @property
    def checksum(self) -> str:
        """XXH3-128 of what was read, 32 hexadecimal digits."""
        return self._hash.hexdigest()


class Forward:
    """A file that may be compressed, read forward.

    Args:
        file: open for reading; it is closed with this one.
        name: what the user calls it, for messages and, where its first bytes do not tell, for its compression.
        seeks: whether bytes that are passed over need not be read, and no checksum is wanted.

    Attributes:
        compression: fsspec's name of it, None where there is none.

    Raises:
        UnitError: when the file cannot be read, or its compressed data are damaged.
    """

    def __init__(self, file: BinaryIO, name: str, *, seeks: bool = False) -> None:
        self._raw, self._name = Checksummed(file, name), name
        self._seeks = seeks
        self._buffer = io.BufferedReader(self._raw, _BUFFER)
        self._position = 0
        try:
            self.compression = _compression(self._buffer.peek(8)[:8], name)
            self._file = self._opened()
        except BaseException:
            self.close()
            raise

    def _opened(self) -> BinaryIO:
        if self.compression is None:
            return self._buffer
        if self.compression in fsspec.compression.compr:
            return cast(BinaryIO, fsspec.compression.compr[self.compression](self._buffer, mode="rb"))
        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(self._buffer, mode="r"), "zstd"))

    def read(self, size: int) -> bytes:
        """The next bytes, fewer than ``size`` at the end alone."""
        parts, left = [], size
        while left > 0:
            data = self._some(min(left, _BUFFER))
            if not data:
                break
            parts.append(data)
            left -= len(data)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._position += len(data)
        return data

    def _some(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except UnitError:
            raise
        except Exception as error:  # decompressors raise what they like on damage
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UnitError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UnitError("damaged", f"{printable(self._name)}: damaged or cut {self.compression} data ({reason})")

    def tell(self) -> int:
        """Bytes read or passed over so far, uncompressed."""
        return self._position

    def skip(self, size: int) -> int:
        """Passes over bytes; gives how many there were, or ``size`` where they are not read."""
        if self._seeks and self.compression is None and size > 0:
            with contextlib.suppress(OSError, ValueError):  # an answer of a web server that only goes forward
                self._buffer.seek(size, io.SEEK_CUR)
                self._position += size
                return size
        left = size
        while left > 0:
            data = self.read(min(left, _BUFFER))
            if not data:
                break
            left -= len(data)
        return size - left

    def finish(self) -> bool:
        """Reads to the end, so that the checksum is of all bytes; gives whether a byte other than zero was left."""
        more = False
        while data := self.read(_BUFFER):
            more = more or data.count(0) < len(data)
        while self._buffer.read(_BUFFER):
            pass
        return more

    @property
    def size(self) -> int:
        """Bytes of the file that were read, compressed as they are."""
        return self._raw.size

    @property
    def checksum(self) -> str:
        """XXH3-128 of these bytes, 32 hexadecimal digits."""
        return self._raw.checksum

    def close(self) -> None:
        """Closes the file."""
        self._buffer.close()


def _compression(head: bytes, name: str) -> str | None:
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    named = fsspec.utils.infer_compression(name)
    return named if named not in {"zip", *_MAGIC.values()} else None
