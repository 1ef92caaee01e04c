"""One image of a data set on its way through a pass: what a reader gives, and what became of it.

An image is known by its ``id``, which no other image of the data set has; its place among the others means nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from PIL import Image

from clipfast.errors import ClipfastError


class Status(StrEnum):
    """What became of an image."""

    OK = "ok"
    """It is in the statistics, and in the arrays where these are kept."""
    MISSING = "missing"
    """There is no such file."""
    UNREADABLE = "unreadable"
    """It is there and cannot be read: no permission, no regular file, a failed download."""
    NO_IMAGE = "no_image"
    """A sample without an image, or with a file that is no image."""
    DECODE_ERROR = "decode_error"
    """A damaged or truncated image."""
    TOO_LARGE = "too_large"
    """Too many pixels to decode or to resize safely."""
    OUT_OF_MEMORY = "out_of_memory"
    """Memory ran out for this image alone."""
    NOT_FINITE = "not_finite"
    """Its embedding is zero, infinite or not a number."""
    DUPLICATE = "duplicate"
    """Another image of the same unit has its id."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image is not in the results.

    Attributes:
        status: the kind.
        reason: one line for people.
    """

    status: Status
    reason: str

    @classmethod
    def of(cls, error: ClipfastError) -> "Failure":
        """What an error says about an image: its ``status`` where it has one."""
        status = getattr(error, "status", Status.DECODE_ERROR)
        return cls(Status(status), " ".join(str(error).split()))


@dataclass(frozen=True, slots=True)
class Sample:
    """An image as a reader gives it.

    Attributes:
        id: its name in the collection, different for every image.
        path: the local file, from the root of the file system, or the URL: of the image itself, or of the shard or the
            table that it is in.
        member: its name in there: a tar member, ``row 17`` of a table; empty for a file of its own.
        key: its sample's name in a tar shard; else empty.
        folder: the folder that was searched, None for a file that was named itself.
        content: the encoded image, or a decoded one; None where the decoder opens ``path`` itself.
        columns: what stands beside it, as text: members ``cls`` and ``txt`` of a shard, keys of ``json``, columns of a
            table.
        size: bytes of the file at ``path``, None where that is not known.
        modified_ns: when that file was last written, in nanoseconds since 1970; None where that is not known.
        label: its label, None where there is none.
        group: its group, None where there is none.
        failure: why it cannot be read, where the reader knows that already.
    """

    id: str
    path: str
    member: str = ""
    key: str = ""
    folder: str | None = None
    content: bytes | Image.Image | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    size: int | None = None
    modified_ns: int | None = None
    label: str | None = None
    group: str | None = None
    failure: Failure | None = None

    def without_content(self) -> "Sample":
        """The same without the image and its columns: what is kept of it."""
        return replace(self, content=None, columns={})

    def failed(self, failure: Failure) -> "Sample":
        """The same, not readable."""
        return replace(self, content=None, failure=failure)
