"""Rendering a report: one HTML file that contains its style sheet, its scripts and its images.

Values from the data cannot become markup: the template escapes every value, and a content security policy allows only
the scripts of the page itself (by hash) and no network access.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfast.errors import MissingExtra
from clipfast.report.canvas import printable
from clipfast.report.html import charts
from clipfast.report.html.content import Ablated, Content, Judged

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise MissingExtra("jinja2", "report", "clipfast report") from None

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Figure:
    """A chart and its numbers."""

    title: str
    chart: Markup
    caption: str
    column: str
    rows: Sequence[Judged]


def render(content: Content) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": charts.percent, "points": points, "score": score, "short": short}
    early, script = (_source(name) for name in ("early.js", "page.js"))
    ablated = content.ablated
    return environment.get_template("page.html.jinja").render(
        page=content,
        policy=_policy(early, script),
        early=early,
        script=script,
        style=_source("page.css"),
        rows=sorted(content.heads, key=lambda head: -head.share),
        widest=max((head.share for head in content.heads), default=0) or 1,
        pictures=any(text.best for head in content.heads for text in head.texts or ()),
        shares=Markup(charts.layer_shares(content.shares)) if content.shares is not None else None,
        ablations=[] if ablated is None else _figures(ablated),
        overlaps=Markup(charts.overlaps(content.overlaps)) if content.overlaps is not None else None,
    )


def points(value: float) -> str:
    """A difference of accuracies in points: ``1.2``, ``−0.4``, ``0.0``."""
    return charts.percent(value).removesuffix(" %")


def score(value: float) -> str:
    """``+0.123``, with a real minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}"


def _source(name: str) -> Markup:
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _policy(*scripts: str) -> str:
    digests = [hashlib.sha256(script.encode("utf-8")).digest() for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)
    allowed = f"img-src data:; style-src 'unsafe-inline'; script-src {hashes}"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _finalized(value: Any) -> Any:
    """Text without control characters and undecodable bytes of file names; trusted markup is not changed."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _figures(ablated: Ablated) -> list[_Figure]:
    baseline = ablated.baseline
    rules = [("chance", ablated.chance)]
    groups = baseline.worst is not None
    levels = [("baseline", baseline.accuracy), *rules]
    caption = "Each image's attention of these layers is replaced by its mean over the images."
    lines = _lines([baseline, *ablated.layers])
    chart = charts.curves(lines, levels, "layers ablated, from the first on", "Accuracy by layers ablated")
    rows = [baseline, *ablated.layers]
    made = [_Figure("Attention ablated layer by layer", Markup(chart), caption, "ablated", rows)]
    rows = [baseline, *ablated.others]
    title, name = "MLPs", "Accuracy with MLPs ablated"
    caption = "MLPs replaced by their mean over the images."
    if len(ablated.others) > 1:
        title, name = "MLPs and the class token", "Accuracy with MLPs and the class token's own attention ablated"
        caption = "MLPs, and the part that the class token reads from itself (CLS→CLS), replaced by their mean over the"
        caption += " images."
    chart = charts.bars(rows, rules, name)
    if groups and ablated.worst_group is not None:
        caption += f" The worst group with nothing ablated: {ablated.worst_group}."
    made.append(_Figure(title, Markup(chart), caption, "ablated", rows))
    if ablated.sizes:
        chart = charts.curves(_lines(ablated.sizes), levels, "texts per head", "Accuracy by texts per head")
        caption = f"{ablated.replaced}, each replaced by its mean plus its projection on its first texts."
        rows = [baseline, *ablated.sizes]
        made.append(_Figure("Heads replaced by their texts", Markup(chart), caption, "texts per head", rows))
    return made


def _lines(rows: Sequence[Judged]) -> list[charts.Line]:
    lines = [charts.Line("all images", [row.accuracy for row in rows])]
    worst = [row.worst for row in rows if row.worst is not None]
    return [*lines, charts.Line("worst group", worst)] if len(worst) == len(rows) else lines
