"""``clipfast collection info``: what a collection holds, from its records alone."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from clipfast.commands import console
from clipfast.commands.collection.info.options import Options
from clipfast.commands.quantities import bytes_text, plural
from clipfast.commands.running import read_speed
from clipfast.dataset.arrays import ARRAYS
from clipfast.dataset.images_table import IMAGES
from clipfast.dataset.manifest import MOMENTS, Manifest

FORMAT = "clipfast.collection-info/1"
_KINDS = (*ARRAYS, "table", "moments", "records", "once")


def run(options: Options) -> int:
    """Prints what a collection holds; returns the exit code.

    Raises:
        InputError: no collection, or a damaged one.
    """
    content = describe(options.collection)
    if options.json:
        console.say(json.dumps(content, indent=2))
    else:
        console.table(["what", "value"], _rows(content))
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """Settings, images by status, units and bytes on the disk by kind, one record in memory at a time.

    Raises:
        InputError: no collection, or a damaged one.
    """
    manifest = Manifest(folder)
    statuses: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    finished = read = with_images = 0
    for record in manifest.records():
        finished += 1
        statuses.update(record.statuses)
        if record.problem is not None:
            problems[record.problem["kind"]] += 1
        for name, (size, _) in record.files.items():
            sizes[_kind(name)] += size
        sizes["records"] += manifest.record_path(record.unit).stat().st_size
        read += record.source.get("size") or 0
        with_images += bool(record.count)
    sizes["once"] += sum(
        entry.stat().st_size for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")
    )
    return {
        "format": FORMAT,
        "collection": str(folder),
        "complete": finished == manifest.plan.count,
        "units": manifest.plan.count,
        "units_left": manifest.plan.count - finished,
        "units_not_read_to_the_end": dict(problems),
        "images": statuses.get("ok", 0),
        "failed": sum(statuses.values()) - statuses.get("ok", 0),
        "statuses": dict(statuses),
        "bytes": {kind: sizes[kind] for kind in _KINDS if kind in sizes},
        "bytes_of_shards": read,
        "settings": manifest.settings.to_json(),
        "last_run": read_speed(folder),
    }


def _kind(name: str) -> str:
    """What a file of a unit belongs to."""
    first = name.partition("/")[0]
    if first in ARRAYS:
        return first
    return {IMAGES: "table", MOMENTS: "moments"}.get(first, "records")


def _labels(settings: dict[str, Any]) -> str:
    """Where labels and groups come from, in words."""
    if not settings:
        return "none"
    words = [f"from {settings['origin']}", f"column {settings['label']}"]
    words += [f"groups {', '.join(settings['group'])}"] if settings["group"] else []
    words += [f"where {name} is {value}" for name, value in settings["where"].items()]
    return ", ".join(words)


def _rows(content: dict[str, Any]) -> list[list[str]]:
    """The table: what, and its value in words."""
    settings = content["settings"]
    model, images = settings["model"], settings["images"]
    size = "x".join(map(str, model["image_size"]))
    kept = [f"{name} {dtype}" for name, dtype in settings["kept"].items() if dtype]
    left = plural(content["units_left"], "unit")
    state = "complete" if content["complete"] else f"{left} left: run the command that began it once more"
    total = sum(content["bytes"].values())
    rows = [
        ["state", state],
        ["units", f"{content['units']:,}"],
        ["images", f"{content['images']:,}"],
        *(["failed", f"{count:,} {status}"] for status, count in content["statuses"].items() if status != "ok"),
        *(["units not read to the end", f"{n:,} {kind}"] for kind, n in content["units_not_read_to_the_end"].items()),
        ["inputs", ", ".join(images["names"])],
        ["labels", _labels(settings["labels"])],
        ["model", f"{model['name']}, {model['pretrained'] or 'its own weights'}, {model['dtype']}, images of {size}"],
        ["weights", model["weights"]],
        ["preprocessing", settings["preprocessing"]["mode"]],
        ["kept", ", ".join(kept) or "moments alone"],
        ["batch size", f"{settings['batch_size']}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in settings["versions"].items())],
        ["on disk", bytes_text(total)],
        *([f"on disk, {kind}", bytes_text(size)] for kind, size in content["bytes"].items()),
    ]
    speed = content["last_run"]
    if speed is not None:
        workers = plural(speed["workers"], "worker")
        words = f"{speed['images_per_second']:.4g} images/s, {workers}, {', '.join(speed['devices'])}"
        rows.append(["last run", words])
    return rows
