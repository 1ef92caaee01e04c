"""Numbers as people write them: ``5B`` images, ``245 TB``, ``1:02:03``."""

import re

from clipfast.errors import InputError

_TIMES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBGT]?)", re.IGNORECASE)


def parse_count(text: str, option: str) -> int:
    """A whole number such as ``1000``, ``100M`` or ``5B``, or ``1.5k``.

    Args:
        text: the number.
        option: that it was given for, for the message.

    Raises:
        InputError: anything else, or less than 1.
    """
    match = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    count = round(float(match[1]) * _TIMES[match[2].upper()]) if match else 0
    if count < 1:
        raise InputError(f"{option} is {text!r}: give a number such as 1000, 100M or 5B")
    return count


def count_text(count: int) -> str:
    """A number of images in few characters: ``5 B``, ``1.5 M``, ``1,000``."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def bytes_text(count: float) -> str:
    """A number of bytes in three digits, in powers of 1000: ``49.2 kB``, ``245 TB``."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def hours_text(seconds: float) -> str:
    """A time in three digits, in the unit that fits: ``42 s``, ``1.5 h``, ``12 days``."""
    for unit, size, least in (("days", 86400, 2), ("h", 3600, 1), ("min", 60, 2)):
        value = seconds / size
        if value >= least:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{seconds:.3g} s"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """``1 worker``, ``2 workers``; ``nouns`` where an s is not enough."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
