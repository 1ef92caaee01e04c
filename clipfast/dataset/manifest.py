"""What a pass over images leaves on disk, and the one place that says how far it has come: its folder's records.

A collection is a folder with

* ``collection.json``: the settings of the pass: everything that its results depend on. Written once.
* ``units.parquet``, ``files.parquet``: the plan (:mod:`clipfast.dataset.plan`). Written once.
* ``basis.safetensors``: the model's part of every contribution. Written once.
* ``units/000012.json``: the record of a finished unit: counts, and name, size and checksum of each of its files. It is
  written last, atomically, and flushed to the disk. A unit without a record has not been computed.
* ``data/000012-1f0c9a5e/``: the files of a unit: ``images.parquet`` (a row per image), ``moments.safetensors``, and a
  Zarr group with what is kept per image (:mod:`clipfast.dataset.arrays`). Files that no record names do not count.
* ``moments.safetensors``: the moments of all units, merged in the order of the plan; made from the units' own.
* ``parts/0003-of-0016/``: a collection with every sixteenth unit, where several jobs share a pass
  (:mod:`clipfast.dataset.combining`). It does not count.

Nothing that a record names is ever changed. A unit that is computed again gets a new folder, and then a new record in
place of the old one. So every state on disk is whole, also when a process was killed or the disk was full.
"""

import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from clipfast import storage
from clipfast.dataset.guard import beginning
from clipfast.dataset.plan import Plan
from clipfast.dataset.samples import Status
from clipfast.errors import InputError
from clipfast.files import write_text

FORMAT = "clipfast.collection/5"
HEADER, LOCK, RUN = "collection.json", ".lock", ".run"
KEPT = ("codes", "class_codes", "terms", "embeddings")
"""What can be kept per image: see :mod:`clipfast.dataset.arrays`."""
RECORDS, DATA, BASIS, MOMENTS = "units", "data", "basis.safetensors", "moments.safetensors"
PARTS = "parts"
_RECORD = re.compile(r"(\d{6,})\.json")
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Settings:
    """What the results of a pass depend on, and what is kept of them. All values are those of JSON.

    Attributes:
        model: ``name``, ``pretrained``, ``weights`` (the fingerprint), ``dtype``, ``image_size``, ``depth``,
            ``layers``, ``heads``.
        preprocessing: ``mode`` (``"exact"`` or ``"fast"``) and ``steps``, what they are.
        kept: ``codes``, ``class_codes``, ``terms``, ``embeddings``: the dtype each is kept in, None where it is not.
        batch_size: images at once; sums round differently for others.
        unit_size: images in a unit that is a range.
        labels: where labels come from: the options that the user gave.
        images: ``names`` (what the user named), ``digest``, ``units``.
        versions: ``clipfast``, ``torch``: what computed.
    """

    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    kept: Mapping[str, Any]
    batch_size: int
    unit_size: int
    labels: Mapping[str, Any]
    images: Mapping[str, Any]
    versions: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: "Settings") -> list[str]:
        """Every reason why a pass with other settings cannot go on here; empty where it can."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        differing = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
        if _NAMED.intersection(differing):  # then it is clear that these differ, too
            differing = [name for name in differing if name not in _FOLLOWING]
        reasons = []
        if bool(self.labels) != bool(other.labels):
            differing = [name for name in differing if not name.startswith("labels.")]
            reasons = ["images collected with labels" if self.labels else "images collected without labels"]
        reasons += [_difference(name, mine.get(name), theirs.get(name)) for name in differing if name not in _FREE]
        return reasons

    def to_json(self) -> dict[str, Any]:
        """As it is in the file."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


_NAMED = frozenset({"model.name", "model.pretrained", "model.image_size", "model.dtype"})
_FOLLOWING = frozenset(
    {f"model.{name}" for name in ("weights", "depth", "layers", "heads", "grid", "prefix_tokens")}
    | {"preprocessing.steps"}
)
_FREE = frozenset({"images.names", "images.units", "versions.torch"})
"""What may differ: names of the same images, and what rounds differently at most."""
_SENTENCES = {
    "model.weights": "images collected with other weights of the model",
    "preprocessing.steps": "images with another preprocessing",
    "images.digest": "a pass over other images",
    "labels.rows": "images with other labels",
}
"""What a collection holds where a setting differs whose value says nothing to a reader."""


_WITH = "images collected with "


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, ``model.name`` and so on."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _difference(name: str, have: object, wanted: object) -> str:
    if name in _SENTENCES:
        return _SENTENCES[name]
    what = name.removesuffix(".name") if name == "model.name" else name.removeprefix("model.").removeprefix("images.")
    return f"{_WITH}{what.replace('.', ' ').replace('_', ' ')} {have!r}, not {wanted!r}"


@dataclass(frozen=True)
class Record:
    """A finished unit.

    Attributes:
        unit: its number in the plan.
        folder: where its files are, in ``data/``.
        statuses: how many of its images have each :class:`~clipfast.dataset.samples.Status`.
        files: bytes and checksum of each of its files, by its path in ``folder``.
        source: ``path``, ``size``, ``version`` and ``checksum`` of the shard or table that was read; empty for a range
            of files.
        problem: why the unit could not be read to its end: ``kind`` and ``reason``; None where it could.
    """

    unit: int
    folder: str
    statuses: Mapping[str, int]
    files: Mapping[str, tuple[int, str]]
    source: Mapping[str, Any] = field(default_factory=dict)
    problem: Mapping[str, str] | None = None

    @property
    def count(self) -> int:
        """Images that are in the statistics."""
        return self.statuses.get(Status.OK, 0)

    @property
    def failed(self) -> int:
        """Images that are not."""
        return sum(self.statuses.values()) - self.count

    def to_json(self) -> str:
        """The text of its file, with its checksum."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({**content, _CHECKSUM: _content_checksum(content)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a record.

        Raises:
            InputError: it is damaged or was edited.
            FileNotFoundError: there is none.
        """
        content = _read_json(path)
        with storage.as_damage(path):
            content["files"] = {name: (size, checksum) for name, (size, checksum) in content["files"].items()}
            return cls(**content)


def _content_checksum(content: Mapping[str, Any]) -> str:
    return storage.checksum(json.dumps(content, sort_keys=True).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object whose checksum is right, without it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it is no JSON object")
    expected = content.pop(_CHECKSUM, None)
    if expected is not None and _content_checksum(content) != expected:
        raise InputError(f"{path} is damaged or was edited: its checksum does not match")
    if expected is None and content.get("format") == FORMAT:
        raise InputError(f"{path} is damaged or was edited: it has no checksum")
    return content


class Manifest:
    """The settings, the plan and the records of a collection.

    Args:
        folder: the collection.

    Attributes:
        folder: the collection.
        settings: of the pass.
        plan: of the pass.

    Raises:
        InputError: no collection, one of another version, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / HEADER
        try:
            content = _read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder} is no collection: it has no {HEADER}, see `clipfast collect`") from None
        form = content.pop("format", None)
        if form != FORMAT:
            hint = "rewrite it with `clipfast collect --upgrade`" if is_old(form) else "collect the images again"
            raise InputError(f"{path} has the format {form!r}, this version of clipfast reads {FORMAT!r}: {hint}")
        with storage.as_damage(path):
            self.settings = Settings(**content)
            self.plan = Plan(folder, self.settings.images["units"], self.settings.images["digest"])

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Self:
        """Writes the settings of a new collection, whose plan and basis are there already.

        Raises:
            OSError: the folder cannot be written.
        """
        for name in (RECORDS, DATA):
            (folder / name).mkdir(exist_ok=True)
        content = {"format": FORMAT, **settings.to_json()}
        write_text(folder / HEADER, json.dumps({**content, _CHECKSUM: _content_checksum(content)}, indent=2) + "\n")
        return cls(folder)

    @property
    def data(self) -> Path:
        """Where the files of units are."""
        return self.folder / DATA

    def finished(self) -> set[int]:
        """Numbers of the units that have a record."""
        return {int(match[1]) for name in os.listdir(self.folder / RECORDS) if (match := _RECORD.fullmatch(name))}

    def unfinished(self) -> list[int]:
        """Numbers of the units that have none, in order."""
        finished = self.finished()
        return [number for number in range(self.plan.count) if number not in finished]

    @property
    def complete(self) -> bool:
        """Whether every unit has a record."""
        return not self.unfinished()

    def record(self, unit: int) -> Record:
        """The record of a finished unit.

        Raises:
            InputError: it is not finished, or its record is damaged.
        """
        path = self.record_path(unit)
        try:
            record = Record.read(path)
        except FileNotFoundError:
            raise InputError(f"{self.folder} has no record of unit {unit}: it is not finished") from None
        if record.unit != unit:
            raise InputError(f"{path} is damaged: it is the record of unit {record.unit}")
        return record

    def records(self) -> Iterator[Record]:
        """The records of all finished units, in the order of the plan."""
        return (self.record(unit) for unit in sorted(self.finished()))

    def record_path(self, unit: int) -> Path:
        """The file of a unit's record."""
        return self.folder / RECORDS / f"{unit:06}.json"

    def write(self, record: Record) -> None:
        """Makes a unit count: replaces its record on disk, last of all its files.

        Raises:
            OSError: it cannot be written.
        """
        write_text(self.record_path(record.unit), record.to_json())

    def new_folder(self, unit: int) -> Path:
        """A new, empty folder for the files of a unit."""
        path = self.data / f"{unit:06}-{secrets.token_hex(4)}"
        path.mkdir()
        return path

    def statuses(self) -> Counter[str]:
        """How many images of all finished units have each status."""
        total: Counter[str] = Counter()
        for record in self.records():
            total.update(record.statuses)
        return total


def is_old(form: object) -> bool:
    """Whether a format is one that ``clipfast collect --upgrade`` can read."""
    return form == "clipfast.collection/4"


def is_collection(folder: Path) -> bool:
    """Whether a folder holds a collection, finished or not, of any version."""
    return (folder / HEADER).is_file()


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Holds the lock of a collection, which the system releases when the process ends, however it ends.

    Yields:
        The name of this run. A worker compares it with :func:`current_run` before it writes a record: one that outlived
        its run, on another machine or for a moment, writes none (:mod:`clipfast.dataset.guard`).

    Raises:
        InputError: another process writes to the folder.
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is being written by another process: wait until it is done, or give another folder"
        ) from None
    try:
        run = secrets.token_hex(8)
        with beginning(folder):
            write_text(folder / RUN, run)
        yield run
    finally:
        lock.release()


def current_run(folder: Path) -> str | None:
    """The name of the last run that took the lock of a collection; None where there was none."""
    try:
        return (folder / RUN).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def refuse_collection(folder: Path) -> None:
    """For commands whose results would overwrite the files of a collection: call it before the first one is written.

    Raises:
        InputError: the folder holds a collection.
    """
    if is_collection(folder):
        raise InputError(f"{folder} holds a collection, and results here would overwrite it: give another --out")


def refuse_other(folder: Path, have: Settings, wanted: Settings) -> None:
    """Refuses to go on with a pass whose settings are others.

    Raises:
        InputError: with every reason.
    """
    reasons = have.differences(wanted)
    if reasons:
        said = "; ".join(reasons).replace(f"; {_WITH}", "; ")  # once is enough
        raise InputError(f"{folder} holds {said}: give another folder, or the options it was made with")


def names_of(files: Sequence[str]) -> str:
    """Some names for a message."""
    return ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
