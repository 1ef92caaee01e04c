"""The members of a tar shard, read forward, once.

webdataset's own iteration (``webdataset.tariterators.tar_file_iterator``) reads a member before its size can be looked
at, passes over links without a word, and ends at a damaged header as at the end of the archive. So the members come
from ``tarfile`` itself, which webdataset reads with too, and webdataset groups them
(:mod:`clipfast.dataset.inputs.tars`).
"""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from clipfast.dataset.inputs.streams import Forward
from clipfast.inputs import printable

_MAX_METADATA_BYTES = 16 << 20
_END = bytes(tarfile.BLOCKSIZE)


class CutMemberError(tarfile.ReadError):
    """A member that is longer than the rest of the file, whether the file was cut or the header is wrong."""

    def __init__(self, member: tarfile.TarInfo) -> None:
        super().__init__(f"the file ends in the member {printable(member.name)}, which claims {member.size} bytes")


class Archive:
    """A tar file that is read forward.

    Args:
        stream: where it is read from.
        size: bytes of the tar file, uncompressed; None where that is not known.

    Attributes:
        inside: the name of the member that was being read, when an error was raised; None for an error between members.
    """

    def __init__(self, stream: Forward, size: int | None) -> None:
        self._stream, self._size = stream, size
        self._last = b""
        self.inside: str | None = None

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Its members in order, without folders and hidden files; :meth:`content` reads the last that was given.

        Raises:
            tarfile.TarError: it is damaged or cut there.
            UnitError: the file cannot be read there.
        """
        try:
            tar = tarfile.TarFile(fileobj=self, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all
                if member.size < 0 or (self._size is not None and member.offset_data + member.size > self._size):
                    self.inside = member.name
                    raise CutMemberError(member)
                name = PurePosixPath(member.name).name
                if not member.isdir() and name and not name.startswith("."):
                    yield member
                if member.isreg() and not member.issparse():
                    self._pass_over(member)
        except (ValueError, ArithmeticError, LookupError, RecursionError) as error:  # tarfile's own on odd headers
            raise tarfile.ReadError(f"a damaged header ({error})") from None
        if self._last != _END:  # tarfile stops at odd headers too
            raise tarfile.ReadError("no end mark where the archive ends, it is cut off or damaged there")

    def content(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of the member that was given last.

        Raises:
            CutMemberError: the file ends before.
            UnitError: the file cannot be read.
        """
        self.inside = member.name
        data = self._stream.read(member.size)
        if len(data) < member.size:
            raise CutMemberError(member)
        self.inside = None
        return data

    def _pass_over(self, member: tarfile.TarInfo) -> None:
        """What was not read of a member."""
        left = member.offset_data + member.size - self._stream.tell()
        if left > 0:
            self.inside = member.name
            if self._stream.skip(left) < left:
                raise CutMemberError(member)
            self.inside = None

    # What tarfile needs of a file.

    def read(self, size: int = -1) -> bytes:
        """At most 16 MiB: tarfile reads as many bytes at once as a header claims."""
        self._last = self._stream.read(min(size, _MAX_METADATA_BYTES) if size >= 0 else _MAX_METADATA_BYTES)
        return self._last

    def tell(self) -> int:
        """The position, from the beginning of the tar file."""
        return self._stream.tell()

    def seek(self, position: int) -> int:
        """Goes forward."""
        if position < self._stream.tell():
            raise tarfile.ReadError("a damaged header (it points back)")
        self._stream.skip(position - self._stream.tell())
        return self._stream.tell()
