"""What stands beside an image as text: small members of a shard, values of a JSON object, values of a table."""

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

SIDECARS = ("cls", "txt", "json")
MAX_SIDECAR_BYTES = 16 << 20
Columns = dict[str, str | None]


def sidecar_columns(members: Mapping[str, bytes]) -> tuple[Columns, list[str]]:
    """Columns from the members of a sample by their ending, and what is wrong with them.

    ``cls`` and ``txt`` are columns of these names; a key of ``json`` is one too, before them.
    """
    columns: Columns = {}
    row: Columns = {}
    problems = []
    for ending in SIDECARS:
        if ending not in members:
            continue
        try:
            text = members[ending].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            problems.append(f".{ending} members that are not UTF-8 text")
            continue
        if ending != "json":
            columns[ending] = text
            continue
        try:
            row = json_columns(text)
        except ValueError as error:
            problems.append(f".json members that are {error}")
    return {**columns, **row}, problems


def json_columns(text: str) -> Columns:
    """The columns of a JSON object.

    Raises:
        ValueError: it is none; the text says what it is.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("no object with columns as keys")
    return {key: as_text(value) for key, value in row.items() if as_text(key) is not None}


def as_text(value: Any) -> str | None:
    """A value as text, as JSON has it; None for none, for one that is no single value, and for no valid Unicode."""
    if isinstance(value, str):
        return value if is_unicode(value) else None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    return None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
