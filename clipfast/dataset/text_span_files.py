"""The files that scripts of the paper's package, ``clip_text_span``, write and read: names, writing, reading.

``{dataset}`` and ``{model}`` are names that the user chooses, ``{pool}`` is that of a list of texts:

* ``{dataset}_attn_{model}.npy``: ``[images, layers, heads, embed_dim]``, what every head writes
* ``{dataset}_mlp_{model}.npy``: ``[images, layers + 1, embed_dim]``: the start of the residual stream, then every MLP
* ``{dataset}_cls_attn_{model}.npy``: ``[images, layers, embed_dim]``, the class token's own part, heads summed
* ``{dataset}_classifier_{model}.npy``: ``[embed_dim, classes]``
* ``{dataset}_labels.npy``: ``[images]``, the class of each image, −1 for none; ``{dataset}_classes.txt`` names them
* ``{pool}.txt``, a text per line, and ``{pool}_{model}.npy``: ``[texts, embed_dim]``, their features
* ``{dataset}_completeness_{pool}_top_{m}_heads_{model}.txt``: the texts of every head

Numbers are float32, and contributions are divided by the norm of the image's embedding. Nothing here needs torch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipfast.errors import InputError

Array = NDArray[Any]
Head = tuple[int, int]

_RULE = "-" * 18
_HEAD = re.compile(r"Layer (\d+), Head (\d+)")
_NAME = re.compile(r"[^/\\\0\n]+")


@dataclass(frozen=True)
class Names:
    """Names of the files of one data set and one model.

    Attributes:
        dataset: name of the data set, such as ``"imagenet"``.
        model: name of the model, such as ``"ViT-L-14"``.

    Raises:
        InputError: a name that no file can have.
    """

    dataset: str
    model: str

    def __post_init__(self) -> None:
        for what, name in (("data set", self.dataset), ("model", self.model)):
            check_name(what, name)

    def array(self, kind: str) -> str:
        """Of ``"attn"``, ``"mlp"``, ``"cls_attn"`` or ``"classifier"``."""
        return f"{self.dataset}_{kind}_{self.model}.npy"

    @property
    def labels(self) -> str:
        """Of the labels."""
        return f"{self.dataset}_labels.npy"

    @property
    def classes(self) -> str:
        """Of the classes' names."""
        return f"{self.dataset}_classes.txt"

    def features(self, pool: str) -> str:
        """Of the features of a pool of texts."""
        return f"{pool}_{self.model}.npy"

    def completeness(self, pool: str, size: int) -> str:
        """Of the texts of every head."""
        return f"{self.dataset}_completeness_{pool}_top_{size}_heads_{self.model}.txt"


def check_name(what: str, name: str) -> None:
    """Raises :class:`InputError` unless a name can be part of a file's name."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise InputError(f"the name of the {what} is {name!r}: give one that can be part of a file's name")


# --------------------------------------------------------------------------------------------------------- writing


class ArrayFile:
    """A float32 ``.npy`` file that is written some images at a time, in little memory.

    The disk's space is taken at the beginning, so a full disk is an :class:`OSError` then.

    Args:
        path: the file, which is made.
        shape: of the whole array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._path = path
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        with open(path, "rb+") as file:
            if size := os.fstat(file.fileno()).st_size:
                os.posix_fallocate(file.fileno(), 0, size)

    def open(self) -> Array:
        """The array, mapped; what is written is on its way to the disk when it is no longer referred to."""
        return np.lib.format.open_memmap(self._path, "r+")


def completeness_text(heads: Mapping[Head, Sequence[str]]) -> str:
    """The content of the file of the texts of every head."""
    lines = []
    for (layer, head), texts in heads.items():
        lines += [_RULE, f"Layer {layer}, Head {head}", _RULE, *texts]
    return "".join(f"{line}\n" for line in lines)


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Pool:
    """A list of texts.

    Attributes:
        texts: of the pool.
        features: ``[texts, embed_dim]``.
    """

    texts: tuple[str, ...]
    features: Array


@dataclass(frozen=True)
class TextSpanFolder:
    """The files of one data set and one model, read and checked. Arrays are mapped: their rows are read when used.

    Attributes:
        attn: ``[images, layers, heads, embed_dim]``.
        mlp: ``[images, layers + 1, embed_dim]``.
        cls_attn: ``[images, layers, embed_dim]``; None where the file is not there, as all that follows.
        classifier: ``[embed_dim, classes]``.
        labels: ``[images]``, integers.
        classes: names of the classes.
        pools: pools of texts whose features are there, by name.
        completeness: the texts of every head, by (pool, size) and (layer, head).
    """

    attn: Array
    mlp: Array
    cls_attn: Array | None = None
    classifier: Array | None = None
    labels: Array | None = None
    classes: tuple[str, ...] | None = None
    pools: Mapping[str, Pool] = field(default_factory=dict)
    completeness: Mapping[tuple[str, int], Mapping[Head, tuple[str, ...]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.attn)

    def embeddings(self, rows: slice = slice(None)) -> Array:
        """The sum of all terms: embeddings divided by their norms, ``[images, embed_dim]``."""
        total: Array = self.attn[rows].sum((1, 2)) + self.mlp[rows].sum(1)
        return total


def read_folder(
    path: str | os.PathLike[str], dataset: str, model: str, *, text_dir: str | os.PathLike[str] | None = None
) -> TextSpanFolder:
    """Reads the files that ``clipfast collection export --layout clip_text_span``, or a published script, wrote.

    Args:
        path: the folder.
        dataset: name of the data set in the files' names.
        model: name of the model in the files' names.
        text_dir: where the pools' ``.txt`` files are, where they are not beside their features.

    Raises:
        InputError: a file that is needed is not there, one that is truncated, damaged or of another kind, or files that
            do not belong together.
    """
    folder, names = Path(path), Names(dataset, model)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    attn = _read(folder / names.array("attn"), ("images", "layers", "heads", "embed_dim"))
    images, layers, _, embed_dim = attn.shape
    mlp = _read(folder / names.array("mlp"), (images, layers + 1, embed_dim), like=names.array("attn"))
    others: dict[str, Any] = {}
    if (place := folder / names.array("cls_attn")).exists():
        others["cls_attn"] = _read(place, (images, layers, embed_dim), like=names.array("attn"))
    if (place := folder / names.array("classifier")).exists():
        others["classifier"] = _read(place, (embed_dim, "classes"), like=names.array("attn"))
    count = others["classifier"].shape[1] if "classifier" in others else None
    if (place := folder / names.classes).exists():
        others["classes"] = tuple(_lines(place))
        if count is not None and len(others["classes"]) != count:
            named = f"{place} names {len(others['classes'])} classes"
            raise InputError(f"{named}, and the classifier beside it has {count}")
    if (place := folder / names.labels).exists():
        others["labels"] = _labels(place, images, count)
    pools = dict(_pools(folder, Path(text_dir) if text_dir is not None else folder, names, embed_dim))
    return TextSpanFolder(attn, mlp, pools=pools, completeness=dict(_all_completeness(folder, names)), **others)


def _read(path: Path, shape: Sequence[int | str], *, like: str | None = None, kind: str = "f") -> Array:
    """A mapped array whose axes have these sizes, or any where there is a name."""
    try:
        values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is not there: check the folder and the names of data set and model") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise InputError(f"{path} is truncated, or no array of numbers: write it again") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kind:
        raise InputError(f"{path} holds {getattr(values, 'dtype', 'several arrays')}: expected numbers as float32")
    fits = len(values.shape) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, values.shape, strict=True)
    )
    if not fits:
        expected = f"[{', '.join(map(str, shape))}]" + ("" if like is None else f" as in {like}")
        raise InputError(f"{path} has shape {list(values.shape)}, expected {expected}")
    return values


def _labels(path: Path, images: int, classes: int | None) -> Array:
    labels = _read(path, (images,), like="the other files", kind="iu")
    if labels.size and classes is not None and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        held = f"{path} has labels from {labels.min()} to {labels.max()}"
        raise InputError(f"{held}, and the classifier beside it {classes} classes")
    return labels


def _lines(path: Path) -> list[str]:
    """The lines of a text file; only a newline ends one."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]


def _pools(folder: Path, texts: Path, names: Names, embed_dim: int) -> Iterator[tuple[str, Pool]]:
    """Every pool with both its files."""
    for path in sorted(texts.glob("*.txt")):
        features = folder / names.features(path.stem)
        if not features.exists():
            continue
        lines = _lines(path)
        yield path.stem, Pool(tuple(lines), _read(features, (len(lines), embed_dim), like=f"{path.name} and the terms"))


def _all_completeness(folder: Path, names: Names) -> Iterator[tuple[tuple[str, int], dict[Head, tuple[str, ...]]]]:
    start, end = f"{names.dataset}_completeness_", f"_heads_{names.model}.txt"
    for path in sorted(folder.glob("*.txt")):
        if not (path.name.startswith(start) and path.name.endswith(end)):
            continue
        pool, found, size = path.name[len(start) : -len(end)].rpartition("_top_")
        if found and size.isdigit():
            yield (pool, int(size)), completeness(path)


def completeness(path: str | os.PathLike[str]) -> dict[Head, tuple[str, ...]]:
    """The texts of every head in a file of them; what a published script adds about its accuracy is left out.

    Raises:
        InputError: a file that cannot be read, or with other content.
    """
    place = Path(path)
    lines, heads = _lines(place), {}
    rules = [number for number, line in enumerate(lines) if line == _RULE]
    starts = [
        (number, match)
        for number, after in pairwise(rules)
        if after == number + 2 and (match := _HEAD.fullmatch(lines[number + 1]))
    ]
    if not starts or starts[0][0] != 0:
        raise InputError(f"{place} does not begin with the texts of a head: a line of dashes, then 'Layer i, Head h'")
    ends: Iterable[int] = [number for number, _ in starts[1:]] + [len(lines)]
    for (start, match), end in zip(starts, ends, strict=True):
        texts = lines[start + 3 : end]
        heads[int(match[1]), int(match[2])] = tuple(texts[: texts.index(_RULE)] if _RULE in texts else texts)
    if len(heads) != len(starts):
        raise InputError(f"{place} has a head twice")
    return heads
