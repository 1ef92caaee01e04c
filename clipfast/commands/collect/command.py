"""``clipfast collect``: one pass over a data set, and how much every head's output varies over it.

The folder given as ``--out`` is a collection (:mod:`clipfast.dataset.manifest`), which the other analyses take in place
of the images. ``stats.json`` has every head's share of the variance and its rank, ``last_run.json`` the speed.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipfast.commands import console
from clipfast.commands.collect.options import DataOptions, Options
from clipfast.commands.collecting import labeller_of
from clipfast.commands.files import prepare_folder, write_json
from clipfast.commands.heads import head_rows
from clipfast.commands.loading import load_model
from clipfast.commands.options import DTYPE, MODEL, parse_size
from clipfast.commands.outcome import FAILED
from clipfast.commands.progress import require_log
from clipfast.commands.reopening import keep_options
from clipfast.commands.running import Job, Placed, check_out, read_speed, run_shown
from clipfast.dataset.collection import Collection
from clipfast.dataset.combining import part_folder
from clipfast.dataset.flow.difference import FILE as DIFFERENCE
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.manifest import Manifest, is_collection
from clipfast.dataset.passes import PassOptions, Summary
from clipfast.dataset.plan import Input
from clipfast.dataset.rounding import Rounding, rounding_error
from clipfast.dataset.samples import Status
from clipfast.dataset.upgrading import is_old_collection, upgrade
from clipfast.errors import InputError

FORMAT = "clipfast.stats/1"
_HEADS = 12
_REASONS = 3


def run(options: Options) -> int:
    """Collects the images and summarises them; returns the exit code.

    An unfinished collection that is given in place of images is summarised too, with a warning and exit code 2.

    Raises:
        ClipfastError: options or images that do not fit, or a model that cannot be loaded.
        KeyboardInterrupt: a signal has arrived; what is done is kept.
        OSError: a result that cannot be written.
    """
    options.check()
    folder = options.collection()
    if options.upgrade:
        return _upgrade(Path(options.data.images[0]), options)
    if folder is not None and is_collection(folder):
        if is_old_collection(folder):
            raise InputError(
                f"{folder} is a collection of an earlier version: rewrite it with "
                f"`clipfast collect --upgrade {folder} --out FOLDER`"
            )
        _refuse_settings(folder, options.data)
        return summarise(folder, as_json=options.json)
    return collect(options)


def collect(options: Options, *, folder: Path | None = None, retry_changed: bool = False) -> int:
    """Runs a pass and summarises its collection; returns the exit code.

    Args:
        options: of the pass.
        folder: where the collection is; None for the one that the options say.
        retry_changed: compute units again whose shard, table or files have changed since.

    Raises:
        ClipfastError: options or images that do not fit, or a model that cannot be loaded.
        KeyboardInterrupt: a signal has arrived; what is done is kept.
        OSError: a file cannot be written.
    """
    options.check()
    require_log(options.run.log_to)
    data = replace(options.data, images=[os.fspath(name) for name in options.data.images])
    out = folder or (options.out if options.num_shards is None else part_folder(options.out, *options.shard()))
    check_out(out, data.images)
    prepare_folder(out)
    size = parse_size(data.image_size)  # what is wrong with it is said before anything slow
    placed = Placed.of(options.run, data.device)
    inputs = open_inputs(data.images, skip=out, image_column=data.image_column, id_column=data.id_column)
    labeller = labeller_of(data)
    model = load_model(data.model or MODEL, data.pretrained, placed.load, data.dtype or DTYPE, size)
    how = PassOptions(
        kept=options.kept.kept(),
        batch_size=data.batch_size,
        unit_size=options.unit_size,
        model=data.model or MODEL,
        pretrained=data.pretrained,
        preprocess=options.preprocess,
        columns={"image_column": data.image_column, "id_column": data.id_column},
        shard=options.shard(),
        retry_failed=options.retry_failed,
        retry_changed=retry_changed,
        max_error_rate=options.run.max_error_rate,
    )
    job = Job(out, inputs, labeller, model, how)
    summary = run_shown(job, options.run, placed, lambda: keep_options(options, out))
    problems = _tell(inputs, labeller, summary)
    device = ", ".join(placed.names(model))
    code = summarise(out, as_json=options.json, part=options.num_shards is not None, device=device)
    return FAILED if problems else code


def _upgrade(old: Path, options: Options) -> int:
    """Rewrites a collection of an earlier version."""
    if not is_old_collection(old):
        raise InputError(f"{old} is no collection of an earlier version: --upgrade has nothing to rewrite")
    with console.status("rewriting"):
        count = upgrade(old, options.out, store_dtype=options.kept.store_dtype or "float32")
    console.note(f"{old} is rewritten in {options.out}, {count} images; the old one can be removed")
    summarise(options.out, as_json=options.json)
    return 0  # images that failed did so in the pass that wrote it


def _refuse_settings(folder: Path, data: DataOptions) -> None:
    """A collection has its model and labels already.

    Raises:
        InputError: other ones are given.
    """
    names = ("model", "pretrained", "dtype", "image_size", "labels")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(data, name) is not None]
    if given:
        raise InputError(f"{folder} is a collection, whose images are collected already: leave {given[0]} out")


def _tell(inputs: Iterable[Input], labeller: Labeller | None, summary: Summary) -> int:
    """Says what was passed over, and what could not be read when units were listed; returns how many of the latter."""
    problems = [line for each in inputs for line in getattr(each, "problems", list)()]
    for line in problems:
        console.error(line)
    for line in [*([] if labeller is None else labeller.notes()), *summary.labels.lines()]:
        console.warn(line)
    for line in [*(line for each in inputs for line in getattr(each, "notes", list)()), *summary.notes.lines()]:
        console.note(line)
    return len(problems)


def summarise(folder: Path, *, as_json: bool, part: bool = False, device: str | None = None) -> int:
    """Writes ``stats.json`` and prints it, or its table; returns the exit code.

    Args:
        folder: the collection.
        as_json: print the JSON instead of the table.
        part: whether it is one of several parts of a pass: the others' units are not missing.
        device: where it was computed; None to look it up.

    Raises:
        InputError: no image is in, or a file is gone or damaged.
        OSError: the file cannot be written.
    """
    collection = Collection(folder, unfinished=True)
    manifest = collection.manifest
    moments = collection.moments
    heads = head_rows(moments) if moments.count > 1 else []
    stored = manifest.settings.kept.get("codes") == "float16"
    rounding = rounding_error(manifest) if stored else None
    result = {
        "format": FORMAT,
        "complete": collection.complete,
        "images": moments.count,
        "failed": collection.failed,
        "statuses": dict(collection.statuses),
        "device": device or _device(folder),
        "collection": str(folder),
        "rounding": None if rounding is None else _rounding(rounding),
        "preprocessing": _preprocessing(manifest),
        "heads": heads,
    }
    write_json(folder / "stats.json", result)
    if as_json:
        console.say((folder / "stats.json").read_text(encoding="utf-8").rstrip())
    else:
        rows = sorted(heads, key=lambda row: -row["variance"])[:_HEADS]
        console.table(
            ("head", "share of the heads' variance", "rank"),
            [(f"L{row['layer']}.H{row['head']}", f"{row['share']:.1%}", str(row["rank"])) for row in rows],
            title=f"{moments.count} images, the heads that vary most",
        )
    _tell_failures(collection)
    if not collection.complete:
        units = f"{len(manifest.finished())} of {manifest.plan.count} units"
        if part:
            console.note(f"collected {units} in {folder}: join all parts with `clipfast collection merge`")
        else:
            console.warn(f"{folder} holds an unfinished pass: {units}, {moments.count} images")
    else:
        error = "" if rounding is None else f"; {rounding}"
        console.note(f"collected in {folder}: give that folder to the other analyses{error}")
    return FAILED if collection.failed or not (collection.complete or part) else 0


def _device(folder: Path) -> str | None:
    """Where the last run of a collection computed, if it said so."""
    speed = read_speed(folder)
    return None if speed is None else ", ".join(speed["devices"])


def _preprocessing(manifest: Manifest) -> dict[str, Any]:
    """Which preprocessing there was, and how far a fast one is from the model's own."""
    content = {"mode": manifest.settings.preprocessing["mode"]}
    with contextlib.suppress(OSError, ValueError):  # exact preprocessing leaves no file
        content["difference"] = json.loads((manifest.folder / DIFFERENCE).read_text(encoding="utf-8"))
    return content


def _rounding(rounding: Rounding) -> dict[str, Any]:
    return {
        "dtype": rounding.dtype,
        "images": rounding.images,
        "largest_relative_difference_of_variance": rounding.largest,
        "head": f"L{rounding.layer}.H{rounding.head}",
    }


def _tell_failures(collection: Collection) -> None:
    """How many images failed, by status, with the first reasons."""
    if not collection.failed:
        return
    shown: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {}
    kinds = [status for status in collection.statuses if status != Status.OK]
    for failure in collection.failures():
        status = failure["status"]
        if shown[status] < _REASONS:
            shown[status] += 1
            reasons.setdefault(status, []).append(console.one_line(failure["error"]))
        if all(shown[kind] >= min(_REASONS, collection.statuses[kind]) for kind in kinds):
            break
    for status, lines in reasons.items():
        count = collection.statuses.get(status) or len(lines)
        some = "; ".join(islice(lines, _REASONS))
        console.note(f"{count} {status}: {some}{'; …' if count > len(lines) else ''}")
