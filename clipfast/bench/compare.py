"""Two result files side by side: the cases in both files, and whether they are comparable."""

from collections.abc import Mapping
from typing import Any

from clipfast.bench.document import Document, Row, rows
from clipfast.bench.table import markdown_table, size

_SHARED = ("image_size", "texts", "device", "threads", "pairs", "warmup", "float32_matmul_precision")
"""Settings that change a figure and are not part of the name of a row."""


def differences(a: Document, b: Document) -> list[str]:
    """One line for each machine, version, setting or commit that differs between the two runs."""
    lines = _differing("machine", a["machine"], b["machine"]) + _differing("version", a["versions"], b["versions"])
    settings = ({key: each["settings"].get(key) for key in _SHARED} for each in (a, b))
    lines += _differing("setting", *settings)
    commits = [_commit(each["code"]) for each in (a, b)]
    return lines + ([f"commit: {commits[0]} in A, {commits[1]} in B"] if commits[0] != commits[1] else [])


def _differing(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*a, *b])
    return [f"{what} {key}: {a.get(key)} in A, {b.get(key)} in B" for key in keys if a.get(key) != b.get(key)]


def _commit(code: Mapping[str, Any]) -> str:
    name = str(code["commit"])[:10] if code["commit"] else "none"
    return f"{name} with local changes" if code["dirty"] else name


def in_both(a: Document, b: Document) -> list[tuple[Row, Row]]:
    """The rows that both files measured."""
    theirs = {row.name: row for row in rows(b) if row.failed is None}
    return [(row, theirs[row.name]) for row in rows(a) if row.failed is None and row.name in theirs]


def _only_in(name: str, own: Document, other: Document) -> list[str]:
    """Rows of one file without a figure in the other, with the reason where there is one."""
    theirs = {row.name: row for row in rows(other)}
    lines = []
    for row in rows(own):
        match = theirs.get(row.name)
        if match is None:
            lines.append(f"- only in {name}: {row.name}" + (f" (not measured: {row.failed})" if row.failed else ""))
        elif row.failed is not None:
            lines.append(f"- not measured in {name}: {row.name} ({row.failed})")
    return lines


def _ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.3f}" if a and b is not None else ""


def _cells(a: Row, b: Row) -> list[str]:
    speeds = [row.images_per_second for row in (a, b)]
    same = a.memory_of == b.memory_of
    peaks = [row.memory_mb for row in (a, b)]
    return [
        a.name,
        *("" if speed is None else f"{speed:.4g}" for speed in speeds),
        _ratio(*speeds),
        *("" if peak is None else size(peak) for peak in peaks),
        _ratio(*peaks) if same else "",
    ]


def markdown(a: Document, b: Document, names: tuple[str, str]) -> str:
    """The comparison as Markdown.

    Args:
        a: the first document.
        b: the second.
        names: what they are called.
    """
    headers = ["case", "A images/s", "B images/s", "B / A", "A memory", "B memory", "B / A"]
    different = differences(a, b)
    unfinished = [name for name, each in zip("AB", (a, b), strict=True) if not each["complete"]]
    lines = [
        f"A: {names[0]}",
        f"B: {names[1]}",
        "",
        *(f"- {line}" for line in different or ["same machine, versions, settings and commit"]),
        *(f"- {name} was interrupted" for name in unfinished),
        "",
        *markdown_table(headers, [_cells(*pair) for pair in in_both(a, b)]),
    ]
    alone = _only_in("A", a, b) + _only_in("B", b, a)
    return "\n".join([*lines, *(["", *alone] if alone else [])])
