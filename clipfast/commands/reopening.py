"""The options a collection was made with, kept in it, so that units can be computed again without repeating them.

Nothing depends on this file but ``clipfast collection retry``: the settings of a pass are in ``collection.json``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from clipfast.commands.collect.options import DataOptions, KeptOptions, Options
from clipfast.errors import InputError
from clipfast.files import write_text

ARGUMENTS = "arguments.json"
_OWN = ("preprocess", "unit_size", "num_shards", "shard_index")


def keep_options(options: Options, folder: Path) -> None:
    """Writes the options of a pass, and the folder that relative paths are from, where they are not there yet.

    Raises:
        OSError: the file cannot be written.
    """
    if not (folder / ARGUMENTS).exists():
        _write(folder, Path.cwd(), options)


def _write(folder: Path, base: Path, options: Options) -> None:
    content = {
        "folder": str(base),
        "data": asdict(options.data),
        "kept": asdict(options.kept),
        **{name: getattr(options, name) for name in _OWN},
    }
    write_text(folder / ARGUMENTS, json.dumps(content, indent=2, default=str) + "\n")


def kept_options(folder: Path) -> tuple[Path, Options]:
    """The folder that relative paths are from, and the options that :func:`keep_options` wrote.

    Raises:
        InputError: the file is gone or damaged.
    """
    path = folder / ARGUMENTS
    again = "run the command that made the collection again, with --retry-failed"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        options = Options(
            data=DataOptions(**content["data"]),
            kept=KeptOptions(**content["kept"]),
            **{name: content[name] for name in _OWN},
        )
        base = Path(content["folder"])
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): {again}") from None
    if not base.is_dir():
        raise InputError(f"the paths of {folder} are from {base}, which is gone: {again}")
    return base, options


def for_all(parts: Sequence[Path], folder: Path) -> None:
    """Keeps the options of a pass whose parts were merged; nothing where they were of several passes, or had none.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        kept = [
            (base, replace(options, num_shards=None, shard_index=None)) for base, options in map(kept_options, parts)
        ]
    except InputError:
        return
    if all(each == kept[0] for each in kept):
        _write(folder, *kept[0])
