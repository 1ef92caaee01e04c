"""CSV files that options name."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from clipfast.errors import InputError
from clipfast.inputs import open_regular, printable


def read_rows(file: Path, columns: Sequence[str], contents: str) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file in UTF-8.

    Args:
        file: the file.
        columns: columns that it must have.
        contents: what it holds, for messages.

    Returns:
        For each row its place, ``FILE:LINE``, and the values of these columns, without space around them.

    Raises:
        InputError: the file cannot be read, is no CSV file, or lacks a column.
    """
    name = printable(file)
    rows = []
    try:
        with open_regular(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            header = list(reader.fieldnames or ())
            if not set(columns) <= set(header):
                raise InputError(f"{name} needs the columns {' and '.join(columns)}: it has {', '.join(header)}")
            for row in reader:
                rows.append((f"{name}:{reader.line_num}", {key: (row[key] or "").strip() for key in columns}))
    except OSError as error:
        raise InputError(f"cannot read the {contents} in {name}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the {contents} in {name}: not a CSV file in UTF-8 ({error})") from None
    return rows
