"""The texts that span each head of the last four layers: experiment 3 of the paper."""

from clipfast.commands.heads import LATE_LAYERS, chosen_heads, span_row
from clipfast.commands.pools import pool_features
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench

_SHOWN = 5
PROTOCOL = (
    "TEXTSPAN (algorithm 1 of the paper) on the covariance of every head's outputs over all images. Texts are "
    "projected on the span of the outputs, whose rank is that of the outputs; the published code keeps 80 dimensions "
    "of heads of width 64, of which the last are rounding and change later picks.",
    "The published result is which texts are found, not a number: heads with one role each, such as shape, colour, "
    "location, counting, texture or animals.",
)


def run(bench: Workbench) -> Result:
    """Measures the table."""
    moments, naming = bench.moments("imagenet"), bench.options.naming
    texts = bench.pool(naming.pool)
    heads = chosen_heads(None, moments.basis, moments.layers)
    spans = moments.textspan(pool_features(bench.model, texts, naming), bench.options.size, heads)
    total = sum(span.variance for span in spans.values()) or 1.0
    rows, full = [], []
    for (layer, head), span in spans.items():
        entry = span_row((layer, head), span, texts)
        full.append(entry)
        named = "; ".join((entry["texts"] or [f"random vector {pick}" for pick in span.picks])[:_SHOWN])
        explained = float(span.explained.sum())
        rows.append(
            {"name": f"L{layer}.H{head}", "share": span.variance / total, "explained": explained, "texts": named}
        )
    columns = (
        Column("share", f"of the variance of the last {LATE_LAYERS} layers"),
        Column("explained", f"explained by {bench.options.size} texts"),
        Column("texts", f"first {_SHOWN} texts", "text"),
    )
    protocol = (*PROTOCOL, f"Pool {naming.pool}, {len(texts)} texts.")
    failed = bench.collection("imagenet").failed
    return Result(rows, columns, protocol, {"pool": naming.pool}, failed=failed, more={"heads": full})
