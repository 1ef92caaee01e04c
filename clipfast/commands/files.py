"""Output folders, result files in JSON, and files of texts."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipfast.errors import InputError
from clipfast.files import PARTIAL, write_text
from clipfast.inputs import open_regular


def prepare_folder(folder: Path) -> Path:
    """Creates a folder and checks that files can be written in it, before anything slow begins.

    Raises:
        InputError: it is a file, or it cannot be created or written to.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"cannot write to {folder}: it is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL, suffix=".part"):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON with a line per key, and per item of a list of objects.

    Raises:
        OSError: the file cannot be written.
    """
    entries = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            text = json.dumps(value)
        entries.append(f"  {json.dumps(key)}: {text}")
    write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The texts of the command line, then those of a file, one a line; without blank lines and duplicates.

    Only a newline ends a line: U+2028 or U+0085 in a text are part of it.

    Raises:
        InputError: a text of the command line is blank; the file is missing, not UTF-8, or empty.
    """
    if any(not text.strip() for text in texts):
        raise InputError("one of --texts is empty")
    all_texts = list(texts)
    if file is not None:
        try:
            with open_regular(file) as opened:
                lines = opened.read().decode("utf-8-sig").split("\n")
        except OSError as error:
            raise InputError(f"cannot read the texts in {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"cannot read the texts in {file}: not UTF-8 text") from None
        texts_of_file = [line.strip() for line in lines if line.strip()]
        if not texts_of_file:
            raise InputError(f"the texts file {file} is empty")
        all_texts += texts_of_file
    return list(dict.fromkeys(all_texts))
