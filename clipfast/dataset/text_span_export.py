"""A collection as the files of the paper's package, see :mod:`clipfast.dataset.text_span_files`.

Only images that are in the statistics are written, in the order of the plan, a layer of a thousand images at a time.
All files are written beside their folder and moved into it when the last is whole; none is ever replaced.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipfast.basis import Basis
from clipfast.dataset.opening import Dataset
from clipfast.dataset.text_span_files import ArrayFile, Head, Names, check_name, completeness_text
from clipfast.errors import InputError
from clipfast.files import PARTIAL, flush_folder, flush_tree, write_text

KINDS = {"attn": "codes", "mlp": "terms", "cls_attn": "class_codes"}
"""Arrays of contributions → what a collection must hold for them."""


@dataclass(frozen=True)
class Pool:
    """A pool of texts to write.

    Attributes:
        name: of its files.
        texts: one per line.
        features: ``[texts, embed_dim]``.
        size: how many texts were picked for a head.
        heads: which, by head; no file of them where it is empty.
    """

    name: str
    texts: Sequence[str]
    features: Tensor
    size: int = 0
    heads: Mapping[Head, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Classifier:
    """The classes of labelled images.

    Attributes:
        classes: their labels.
        weights: ``[classes, embed_dim]``, unit rows; None for no classifier.
    """

    classes: Sequence[str]
    weights: Tensor | None = None


def export_text_span(
    collection: str | Path,
    out: str | Path,
    names: Names,
    *,
    kinds: Sequence[str] | None = None,
    classifier: Classifier | None = None,
    pools: Sequence[Pool] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Writes a finished collection as the files of ``clip_text_span``.

    Args:
        collection: its folder.
        out: where they are written: a new folder, or one that has none of the files yet.
        names: of data set and model.
        kinds: ``"attn"``, ``"mlp"``, ``"cls_attn"``: which contributions; None for all that the model has.
        classifier: of labelled images: for the labels, names of classes and classifier.
        pools: texts with their features, and the texts of heads.
        progress: called with a number of images when these are written.

    Returns:
        The files.

    Raises:
        NotKept: what a file needs was not kept; says which option of ``clipfast collect`` keeps it.
        InputError: a file that exists; an unfinished or damaged collection; or one whose terms the files cannot hold.
        OSError: the files cannot be written; nothing is left then.
    """
    data = Dataset(Path(collection))
    model = data.manifest.settings.model
    if kinds is None:  # without a class token there is nothing to keep
        kinds = [kind for kind in KINDS if kind != "cls_attn" or model["prefix_tokens"]]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"there is no array {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if "cls_attn" in kinds and not model["prefix_tokens"]:
        raise InputError(f"{data.folder} is of a model without a class token: leave cls_attn out")
    for kind in kinds:
        data.labels(KINDS[kind])  # before anything is written
    basis = data.basis.to(torch.device("cpu"), torch.float32)
    if basis.kind == "upstream" or basis.centring != "uniform":
        what = "blocks before an attention pool" if basis.kind == "upstream" else f"centring {basis.centring}"
        raise InputError(f"{data.folder} was collected with {what}: terms of clip_text_span have no place for that")
    taken = {names.labels, names.classes, *(names.array(kind) for kind in (*KINDS, "classifier"))}
    for pool in pools:
        check_name("pool", pool.name)
        own = {names.features(pool.name), f"{pool.name}.txt"}
        if own & taken:
            raise InputError(f"the pool {pool.name!r} would have the file {min(own & taken)}: rename the pool")
        taken |= own
    check_free(Path(out), [names.array(kind) for kind in kinds])
    files: list[Path] = []
    with _moved_into(Path(out), files) as folder:
        _write_texts(folder, names, pools)
        if classifier is not None:
            _write_classes(folder, names, data, classifier)
        check_free(Path(out), os.listdir(folder))
        _write_arrays(folder, names, data, basis, kinds, progress)
    return files


def check_free(out: Path, names: Sequence[str]) -> None:
    """Raises :class:`InputError` where one of these names is taken in a folder, or the folder cannot be one."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out} exists and is no folder: give a new name")
    for name in sorted(names):
        if os.path.lexists(out / name):
            raise InputError(f"{out / name} exists: nothing is replaced, give another folder or other names")


def _write_arrays(
    folder: Path, names: Names, data: Dataset, basis: Basis, kinds: Sequence[str], progress: Callable[[int], None]
) -> None:
    model = data.manifest.settings.model
    layers, heads, width = model["layers"], basis.heads, basis.columns
    shapes = {"attn": (layers, heads, width), "mlp": (layers + 1, width), "cls_attn": (layers, width)}
    files = {kind: ArrayFile(folder / names.array(kind), (len(data), *shapes[kind])) for kind in kinds}
    tokens = model["prefix_tokens"] + model["grid"][0] * model["grid"][1]
    for rows in data.blocks():
        arrays = {kind: file.open() for kind, file in files.items()}  # anew: the last block's pages can leave memory
        if "mlp" in arrays:
            arrays["mlp"][rows] = data.read("terms", rows)[:, :-1]
        mean, std, norm = (torch.from_numpy(data.column(name, rows)).float() for name in ("mean", "std", "norm"))
        for layer in range(layers):
            constants = basis.constants(mean, std, [layer])[:, 0] / (std * norm)[:, None]  # [images, embed]
            values = basis.values(layer)  # [heads, code, embed]
            if "attn" in arrays:
                part = torch.einsum("bhe,hec->bhc", _codes(data, "codes", rows, layer), values) + constants[:, None]
                arrays["attn"][rows, layer] = part.numpy()
            if "cls_attn" in arrays:
                own = _codes(data, "class_codes", rows, layer).flatten(1) @ values.flatten(0, 1)
                arrays["cls_attn"][rows, layer] = (own + constants * (heads / tokens)).numpy()
        del arrays
        progress(rows.stop - rows.start)


def _codes(data: Dataset, name: str, rows: slice, layer: int) -> Tensor:
    """Codes of one layer, ``[images, heads, code]``."""
    return torch.from_numpy(data.read(name, rows, [layer])[:, 0]).float()


def _write_classes(folder: Path, names: Names, data: Dataset, classifier: Classifier) -> None:
    numbers = {label: number for number, label in enumerate(classifier.classes)}
    labels = np.full(len(data), -1, np.int64)
    for rows in data.blocks():
        labels[rows] = [-1 if label is None else numbers[label] for label in data.column("label", rows)]
    np.save(folder / names.labels, labels)
    _write_lines(folder / names.classes, classifier.classes)
    if classifier.weights is not None:
        np.save(folder / names.array("classifier"), classifier.weights.float().cpu().numpy().T.copy())


def _write_texts(folder: Path, names: Names, pools: Sequence[Pool]) -> None:
    for pool in pools:
        _write_lines(folder / f"{pool.name}.txt", pool.texts)
        np.save(folder / names.features(pool.name), pool.features.float().cpu().numpy())
        if pool.heads:
            picked = {head: [pool.texts[pick] for pick in picks] for head, picks in pool.heads.items()}
            write_text(folder / names.completeness(pool.name, pool.size), completeness_text(picked))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    broken = [line for line in lines if "\n" in line]
    if broken:
        raise InputError(f"{broken[0]!r} has a line break, which {path.name} has no place for")
    write_text(path, "".join(f"{line}\n" for line in lines))


@contextmanager
def _moved_into(out: Path, files: list[Path]) -> Iterator[Path]:
    """Yields a folder beside ``out`` whose files move there at the end, all or none; they are appended to ``files``."""
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it first")
    partial = out.with_name(f"{PARTIAL}{secrets.token_hex(8)}.part")
    partial.mkdir()
    try:
        yield partial
        flush_tree(partial)
        made = sorted(os.listdir(partial))
        check_free(out, made)
        out.mkdir(exist_ok=True)
        try:
            for name in made:
                (partial / name).rename(out / name)
                files.append(out / name)
        except BaseException:
            for path in files:
                path.unlink(missing_ok=True)
            raise
        flush_folder(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
