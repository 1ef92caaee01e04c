"""``clipfast models``: which models there are, which can be decomposed, and what one of them is."""

import json
from dataclasses import asdict
from pathlib import Path

from clipfast.arguments import default_depth
from clipfast.commands import console
from clipfast.commands.models.options import Options
from clipfast.errors import InputError, UnsupportedTower
from clipfast.files import write_text
from clipfast.kernels import tuning
from clipfast.loading import BUNDLED, load
from clipfast.summary import Summary, summarise
from clipfast.towers import catalogue
from clipfast.towers.catalogue import Entry

CACHE = "models.json"
"""File of the cache folder that keeps what was found of models."""

_POOLINGS = {"cls": "class token", "mean": "mean", "normed_mean": "mean of norms", "attention": "attention"}
_OF_WEIGHTS = ("weights", "values", "texts")
"""Rows of a description that depend on the weights that are loaded."""


def run(options: Options) -> int:
    """Lists models by name, or describes one; returns the exit code.

    Raises:
        ClipfastError: a package that is not installed, or a model that cannot be described.
    """
    missing = [package for package in options.package if package not in catalogue.installed()]
    if missing:
        raise InputError(f"{missing[0]} is not installed: pip install {missing[0]}")
    if options.name is not None:
        if options.name in BUNDLED or Path(options.name).is_dir():
            return _print(load(options.name, device="cpu").describe(), None, options)
        wanted = options.package or catalogue.installed()
        known = [package for package in wanted if options.name in catalogue.source(package).names()]
        if known:
            return describe(known[0], options.name, options)
    return list_models(options)


# ------------------------------------------------------------------------------------------------------------ listing


def list_models(options: Options) -> int:
    """Lists the models whose names contain what is searched for; without ``--all`` those that can be decomposed."""
    parts = [part.lower() for part in (options.name, options.search) if part]
    names = {
        package: [name for name in catalogue.source(package).names() if all(part in name.lower() for part in parts)]
        for package in options.package or catalogue.installed()
    }
    bundled = [] if options.package else [name for name in BUNDLED if all(part in name for part in parts)]
    known = catalogue.Known(tuning.folder() / CACHE)
    with console.progress("reading models", sum(map(len, names.values()))) as advance:
        models = [_bundled(name) for name in bundled] + list(known.entries(names, lambda: advance(1)))
    known.save(write_text)
    shown = models if options.all or parts else [model for model in models if model.decomposes]
    if options.json:
        console.say(json.dumps([asdict(model) for model in shown], indent=2))
        return 0
    rows = [
        [
            f"{model.package} {model.kind}".strip(),
            model.name,
            "yes" if model.decomposes else "no",
            _POOLINGS.get(model.pooling or "", "-"),
            _why_not(model),
            "x".join(map(str, model.image_size or ())) or "-",
            model.size or "-",
            " ".join(model.tags) or "-",
        ]
        for model in shown
    ]
    headers = ["package", "name", "decomposes", "pooling", "why not", "image", "image tower", "pretrained"]
    console.table(headers, rows)
    hidden = len(models) - len(shown)
    console.note(f"{len(shown)} models" + (f"; {hidden} more are refused: --all shows why" if hidden else ""))
    return 0


def _bundled(name: str) -> Entry:
    return Entry("clipfast", name, True, "cls", (), "VisionTransformer", "bundled", (64, 64), ("bundled",))


def _why_not(model: Entry) -> str:
    return "; ".join(model.refusals) or "-"


# --------------------------------------------------------------------------------------------------------- describing


def describe(package: str, name: str, options: Options) -> int:
    """Describes a model that a package knows by name, without its weights; returns the exit code.

    Raises:
        ModelError: the package cannot build it here.
    """
    module, tower = catalogue.read(package, name)
    tags = catalogue.source(package).tags(name)
    if isinstance(tower, UnsupportedTower):
        if options.json:
            console.say(
                json.dumps({"name": name, "package": package, "refusals": tower.reasons, "tags": tags}, indent=2)
            )
            return 0
        rows = [["model", f"{name}, of {package}"], *(["is refused", reason] for reason in tower.reasons)]
        console.table(["what", "value"], rows)
        return 0
    summary = summarise(
        tower, module, name=name, pretrained=None, depth=default_depth(tower), preprocess=None, tokenize=None
    )
    return _print(summary, tags, options)


def _print(summary: Summary, tags: list[str] | None, options: Options) -> int:
    """Prints a description; ``tags`` of a model that is known by name alone, else None."""
    if options.json:
        console.say(json.dumps(summary.as_dict() | ({} if tags is None else {"tags": tags}), indent=2))
        return 0
    rows = [[what, value] for what, value in summary.rows() if tags is None or what not in _OF_WEIGHTS]
    if tags is not None:
        weights = f"{summary.parameters:,} in the image tower, {summary.weight_bytes / 1e6:,.0f} MB in {summary.dtype}"
        rows[1:1] = [["weights", weights], ["pretrained", " ".join(tags) or "no tags"]]
    console.table(["what", "value"], rows)
    return 0
