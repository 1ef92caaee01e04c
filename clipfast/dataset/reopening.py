"""Opening the images of a collection again, wherever they were read from."""

import os
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from clipfast.dataset.files import Identity, Source
from clipfast.dataset.inputs.endings import kind_of, uncompressed
from clipfast.dataset.inputs.locations import Naming, fetch, is_url
from clipfast.dataset.inputs.tables import TableInput
from clipfast.dataset.inputs.tars import read_shard
from clipfast.dataset.plan import Unit, UnitError
from clipfast.dataset.samples import Sample
from clipfast.errors import ImageError, InputError
from clipfast.images import as_rgb, decode_image
from clipfast.inputs import printable

_ROW = "row "


@dataclass(frozen=True)
class StoredSource(Source):
    """An image that is no local file and in no uncompressed local shard: it takes longer to open.

    Attributes:
        place: the URL, or the shard or table that the image is in; empty for a data set in memory.
        member: its name in there, ``row 17`` of a table; empty for an image of its own.
        id: what the collection calls it.
    """

    place: str = ""
    member: str = ""
    id: str = ""

    def __str__(self) -> str:
        return self.id

    def identity(self) -> Identity:
        """What identifies it; whether it has changed is not asked."""
        return Identity(self.place, self.member, None, None)

    def open(self) -> Image.Image:
        """The image as RGB. A shard is read up to it, a table at its row.

        Raises:
            ImageError: it is gone, or cannot be read.
        """
        if not self.place:
            raise ImageError(f"{printable(self.id)}: it was in a data set in memory, which cannot be opened again")
        content = fetch(self.place) if not self.member else self._sample().content
        if isinstance(content, Image.Image):
            return as_rgb(content)
        if content is None:
            raise ImageError(f"{printable(self.id)}: it is not there any more")
        return decode_image(BytesIO(content), self.id)

    def _sample(self) -> Sample:
        try:
            if self.member.startswith(_ROW) and kind_of(self.place) == "table":
                row = int(self.member.removeprefix(_ROW))
                reading = TableInput(self.place, self.place, os.getcwd()).read(Unit("table", self.place, row, row + 1))
            else:
                reading = read_shard(Unit("shard", self.place), Naming())
            with closing(reading):
                found = next((sample for sample in reading if sample.member == self.member), None)
        except (UnitError, InputError) as error:
            raise ImageError(str(error)) from None
        if found is None:
            raise ImageError(f"{printable(self.place)}: it holds no image {printable(self.member)} any more")
        if found.failure is not None:
            raise ImageError(found.failure.reason)
        return found


def source_of(file: str, name: str, path: str, *, key: str, member: str, folder: str | None) -> Source:
    """The image of a collection's entry; one in a local shard is to be completed by :func:`.files.found_again`.

    Args:
        file: what the collection calls it.
        name: of its results.
        path: of its file, shard or table, or the URL.
        key: its sample's name in a shard.
        member: its name in the shard or the table.
        folder: the folder that was searched.
    """
    place = None if folder is None else Path(folder)
    is_plain = path and not is_url(path) and (not member or (key and uncompressed(path) == path.lower()))
    if is_plain:
        return Source(Path(path), name, place, key)
    return StoredSource(Path(path), name, place, "", place=path, member=member, id=file)
