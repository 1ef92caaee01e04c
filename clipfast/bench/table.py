"""Result files as tables: cells for a terminal, and Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipfast.bench.document import Document, Factor, Row, provenance, rows

_BASELINES = {"plain": "× plain", "plain compiled": "× compiled", "naive": "× naive"}


def duration(seconds: float) -> str:
    """Seconds with a readable unit."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size(megabytes: float) -> str:
    """Megabytes with a readable unit."""
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.2f} GB"


def markdown_table(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; vertical bars in cells are escaped."""
    body = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
    return [f"| {' | '.join(row)} |" for row in (list(headers), ["---"] * len(headers), *body)]


def times(factor: Factor | None) -> str:
    """A factor with its spread: ``1.06 (1.03–1.1)``."""
    return "" if factor is None else f"{factor.median:.3g} ({factor.q10:.3g}–{factor.q90:.3g})"


def factor_over(row: Row, baseline: str) -> Factor | None:
    """Speed-up over a baseline; ``"naive"`` is the naive form that the row was compared with."""
    fitting = (name for name in row.against if name == baseline or (baseline == "naive" and name.startswith("naive ")))
    name = next(fitting, None)
    return None if name is None else row.against[name]


def cells(document: Document) -> tuple[list[str], list[list[str]]]:
    """Headers and rows; empty columns are left out, except the speed-up over plain."""
    measured = rows(document)
    baselines = [name for name in _BASELINES if name == "plain" or any(factor_over(row, name) for row in measured)]
    with_memory = any(row.memory_mb is not None for row in measured)
    with_notes = any(row.failed for row in measured)
    headers = ["case", "output", "images/s", "time", *(_BASELINES[name] for name in baselines)]
    headers += [*(["peak memory"] if with_memory else []), "largest error", *(["not measured"] if with_notes else [])]
    table = []
    for row in measured:
        line = [
            row.case,
            row.output,
            "" if row.images_per_second is None else f"{row.images_per_second:.4g}",
            "" if row.milliseconds is None else duration(row.milliseconds / 1e3),
            *(times(factor_over(row, name)) for name in baselines),
        ]
        line += ["" if row.memory_mb is None else size(row.memory_mb)] if with_memory else []
        line.append("" if row.error is None else f"{row.error:.1e}")
        table.append(line + ([row.failed or ""] if with_notes else []))
    return headers, table


def markdown(document: Document) -> str:
    """A result file as Markdown: provenance, table, and how to read it."""
    settings = document["settings"]
    lines = [
        "# Decomposition throughput",
        "",
        provenance(document),
        "",
        *([] if document["complete"] else ["**Interrupted: not everything that was asked for is here.**", ""]),
        *markdown_table(*cells(document)),
        "",
        f"Medians of {settings['pairs']} interleaved pairs; in brackets the 10 % and 90 % quantiles of the pairs' "
        "ratios. *plain* is the model's own forward, and in its row measured against itself: how much of a factor is "
        "noise. *heads* are every head's contributions; *attention* also keeps attention weights; *maps* also draws "
        f"maps for {settings['texts']} texts{_of_size(settings)}; *tokens* makes every token's part of every head, a "
        "layer at a time. *naive* is the definition written out: with tokens for maps and tokens, without for the "
        "others. The largest error is that of the checks made before the clock ran. Peak memory is that of a whole "
        "fresh process (of the device's allocator on an accelerator).",
    ]
    return "\n".join(lines) + "\n"


def _of_size(settings: Mapping[str, Any]) -> str:
    """The image size, where it is not that of each model."""
    size = settings.get("image_size")
    return f", and images have {size[0]} × {size[1]} pixels" if size else ""
