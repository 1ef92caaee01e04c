"""The page of results as Markdown, made from the tables' files alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipfast.commands.quantities import plural
from clipfast.commands.reproduce.options import DATA, TABLES
from clipfast.inputs import printable


def page(head: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        head: ``model``, ``dtype``, ``versions`` and ``status`` by table.
        tables: what the files of the tables that are done say, by name.
    """
    lines = [
        "# The experiments of arXiv 2310.05916",
        "",
        f"Model {_cell(head['model'])}, {head['dtype']}. "
        + ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
        + ".",
        "",
        *_table(
            ("table", "state", "published numbers"),
            [(info.title, head["status"][name], _verdicts(tables.get(name))) for name, info in TABLES.items()],
        ),
        "",
        "A published number is compared where the model, its weights, the data and the texts are those of the "
        "published set-up; the tolerance says how far a faithful run may be off. What differs is named, and "
        "results.json has both values.",
    ]
    for name, table in tables.items():
        lines += ["", f"## {table['title']}", "", *_body(name, table)]
    return "\n".join(lines) + "\n"


def _body(name: str, table: Mapping[str, Any]) -> list[str]:
    columns = table["columns"]
    rows = [
        (row["name"], *(shown(row.get(column["key"]), column["kind"]) for column in columns)) for row in table["rows"]
    ]
    lines = _table(("", *(column["title"] for column in columns)), rows)
    if table["comparisons"]:
        lines += [
            "",
            "### Published numbers",
            "",
            *_table(_COMPARED, [_compared(each, table) for each in _most(table)]),
        ]
    lines += ["", "### Protocol", "", *(f"- {sentence}" for sentence in table["protocol"])]
    if table["setup"]:
        lines.append("- " + "; ".join(f"{key}: {_cell(value)}" for key, value in table["setup"].items()) + ".")
    if table["notes"] or table["failed"]:
        failed = [f"{plural(table['failed'], 'image')} could not be used"] if table["failed"] else []
        lines += ["", "### Notes", "", *(f"- {_cell(note)}." for note in [*table["notes"], *failed])]
    for figure in table["figures"]:
        lines += ["", f"![{name}]({figure})"]
    return lines


_COMPARED = ("what", "published", "measured", "tolerance", "verdict", "published with", "source")


def comparable(name: str, table: Mapping[str, Any]) -> list[Sequence[str]]:
    """What, published, measured, tolerance and verdict of the numbers of a table that are comparable."""
    rows = [_compared(each, table)[:5] for each in table["comparisons"] if each["verdict"] != "not comparable"]
    return [(f"{name}: {what}", *values) for what, *values in rows]


def _most(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(table["comparisons"], key=lambda each: each["verdict"] == "not comparable")


def _compared(each: Mapping[str, Any], table: Mapping[str, Any]) -> Sequence[str]:
    low, high = each["published"]
    kinds = {column["key"]: column["kind"] for column in table["columns"]}
    kind = kinds.get(each["column"], "share")
    published = shown(low, kind) if low == high else f"{shown(low, kind)} to {shown(high, kind)}"
    reasons = f": other {', '.join(each['reasons'])}" if each["reasons"] else ""
    return (
        f"{each['row']}, {each['column']}",
        published,
        shown(each["measured"], kind),
        f"{100 * each['tolerance']:.2g} points",
        f"{each['verdict']}{reasons}",
        each["model"],
        each["source"],
    )


def _verdicts(table: Mapping[str, Any] | None) -> str:
    if table is None:
        return ""
    if not table["comparisons"]:
        return "none"
    verdicts = [each["verdict"] for each in table["comparisons"]]
    return ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))


def shown(value: Any, kind: str) -> str:
    """A value as the page has it."""
    if value is None:
        return ""
    if kind == "share":
        return f"{100 * value:.2f} %"
    if kind == "points":
        return f"{100 * value:+.2f}".replace("-", "−")
    return f"{value:.4g}" if kind == "number" else str(value)


def _cell(text: object) -> str:
    """Text that Markdown does not read as markup."""
    clean = " ".join(printable(str(text)).split())
    return clean.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "'")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [[_cell(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(header), ["---"] * len(header), *body)]


def left_out(name: str) -> str:
    """The state of a table whose data set was not given."""
    return f"left out: {DATA[TABLES[name].data].option} was not given"
