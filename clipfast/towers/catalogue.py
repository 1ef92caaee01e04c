"""Every model that the packages know by name, and which of them can be decomposed, without weights.

Models are built on the meta device and read, which shows exactly what loading them would. That takes hundredths of a
second each, so what was found can be kept in a file, for as long as neither a package nor this folder changes.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from clipfast.errors import ModelError, UnsupportedTower
from clipfast.towers.packages import classes_of, package_of
from clipfast.towers.tower import Tower


class Source(Protocol):
    """What a file of a package offers of its models."""

    def names(self) -> list[str]:
        """Every name that it knows, as ``clipfast.load`` takes it where it can be loaded by name."""

    def tags(self, name: str) -> list[str]:
        """The pretrained weights that it knows for a name."""

    def unread(self, name: str, *, quick: bool = False) -> nn.Module:
        """A model on the meta device; with ``quick`` one block may stand for all that are like it."""


_FILES = {
    "open_clip": ("open_clip_torch", "clipfast.towers.openclip_models"),
    "openai": ("open_clip_torch", "clipfast.towers.openai_models"),
    "timm": ("timm", "clipfast.towers.timm_models"),
    "transformers": ("transformers", "clipfast.towers.huggingface_models"),
}
"""Package → what it is called on PyPI, and the file here that knows its names."""
_MODULES = {"openai": "open_clip"}

PACKAGES = tuple(_FILES)
"""Names of the packages."""


@dataclass(frozen=True)
class Entry:
    """A model by name.

    Attributes:
        package: one of :data:`PACKAGES`.
        name: as ``clipfast.load`` takes it; of transformers, the class of a folder or repository.
        decomposes: whether it can be decomposed.
        pooling: how its embedding reads the tokens; None where it is refused.
        refusals: every reason why it cannot.
        kind: the class of its image tower.
        size: its image tower in a few words; empty where it is refused.
        image_size: height and width of its images; None where it is refused.
        tags: pretrained weights that its package knows.
    """

    package: str
    name: str
    decomposes: bool
    pooling: str | None
    refusals: tuple[str, ...]
    kind: str
    size: str
    image_size: tuple[int, int] | None
    tags: tuple[str, ...]


def installed() -> tuple[str, ...]:
    """The packages of :data:`PACKAGES` that are installed."""
    return tuple(package for package in PACKAGES if find_spec(_MODULES.get(package, package)) is not None)


def source(package: str) -> Source:
    """The file that knows a package's names."""
    return cast(Source, import_module(_FILES[package][1]))


def read(package: str, name: str, *, quick: bool = False) -> tuple[nn.Module, Tower | UnsupportedTower]:
    """A named model on the meta device, and its tower, or why it has none.

    Args:
        package: one of :data:`PACKAGES`.
        name: a name that it knows.
        quick: let one block stand for all that are like it.

    Raises:
        ModelError: the package cannot build it here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = source(package).unread(name, quick=quick).eval()
        except Exception as error:  # packages raise different types
            text = " ".join(str(error).split())[:160]
            raise ModelError(f"{package} cannot build {name} here: {type(error).__name__}: {text}") from error
        try:
            return module, package_of(module).read(module, ignore_hooks=True)
        except UnsupportedTower as error:
            return module, error


def entry(package: str, name: str) -> Entry:
    """Looks a model up by building it without weights."""
    tags = tuple(source(package).tags(name))
    try:
        module, tower = read(package, name, quick=True)
    except ModelError as error:
        return Entry(package, name, False, None, (str(error),), "", "", None, tags)
    kind = classes_of(module)[-1]
    if isinstance(tower, UnsupportedTower):
        return Entry(package, name, False, None, tuple(tower.reasons), kind, "", None, tags)
    return Entry(package, name, True, tower.pooling, (), kind, _size(tower), tower.image_size, tags)


def _size(tower: Tower) -> str:
    """A tower in a few words; the number of its blocks is not known of one that was built quickly."""
    heads = tower.heads if tower.blocks or tower.pool is None else tower.pool.heads
    patch = "x".join(map(str, dict.fromkeys(tower.patch_size)))
    return f"width {tower.width}, {heads} heads, patch {patch}, embedding {tower.embed_dim}"


class Known:
    """Entries that are kept in a file.

    Args:
        file: where; None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._state = _state()
        self._entries = self._load()
        self._changed = False

    def entries(self, names: Mapping[str, list[str]], done: Callable[[], None]) -> Iterator[Entry]:
        """Looks models up, and keeps what is new.

        Args:
            names: by package.
            done: called after each.
        """
        for package, listed in names.items():
            for name in listed:
                key = f"{package} {name}"
                if key not in self._entries:
                    self._entries[key] = entry(package, name)
                    self._changed = True
                done()
                yield self._entries[key]

    def _load(self) -> dict[str, Entry]:
        """What the file holds; nothing where it is missing, damaged, or of other versions."""
        if self._file is None:
            return {}
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if kept["state"] != self._state:
                return {}
            return {key: _entry(values) for key, values in kept["entries"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def save(self, write: Callable[[Path, str], None]) -> None:
        """Writes what is new; a file that cannot be written is no error.

        Args:
            write: writes a text to a file atomically.
        """
        if self._file is None or not self._changed:
            return
        content = {"state": self._state, "entries": {key: asdict(each) for key, each in self._entries.items()}}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write(self._file, json.dumps(content))
        except OSError:
            return


def _entry(values: dict[str, Any]) -> Entry:
    names = {field.name for field in fields(Entry)}
    if set(values) != names:
        raise ValueError("fields of another version")
    size = values["image_size"]
    lists = {name: tuple(values[name]) for name in ("refusals", "tags")}
    return Entry(**{**values, **lists, "image_size": None if size is None else (int(size[0]), int(size[1]))})


def _state() -> str:
    """A digest of everything that entries depend on: versions of the packages, and this folder's code."""
    digest = sha256()
    for distribution in ("torch", *dict.fromkeys(name for name, _ in _FILES.values())):
        try:
            digest.update(f"{distribution} {metadata.version(distribution)}\n".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{distribution} none\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
