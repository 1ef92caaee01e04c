"""Accuracy with the heads of the last four layers replaced by what their texts span: experiment 4 of the paper."""

from typing import Any

from clipfast.analyses.reconstruction import reconstruction_curve
from clipfast.analyses.terms import Terms
from clipfast.commands.heads import chosen_heads
from clipfast.commands.options import PoolOptions
from clipfast.commands.pools import RANDOM, pool_features
from clipfast.commands.reproduce.figures import write_curves
from clipfast.commands.reproduce.published import NUMBERS
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.descriptions import POOLS
from clipfast.report.shares import rounded

_MARKS = (0, 1, 2, 5, 10, 20, 30, 40, 60, 80, 100)
PROTOCOL = (
    "Every head of the last four layers is replaced by its mean plus its projection on the directions of its first m "
    "texts; all MLPs and the attention of all other layers are replaced by their means. With m = 0 a head is its mean.",
    "Classes and templates as for the ablations. Random vectors are as many as the general pool has texts.",
    "The published descriptions do not ship with clipfast: its pools were composed anew, so published numbers are "
    "comparable only where the published file is given with --pool.",
)


def run(bench: Workbench) -> Result:
    """Measures the table."""
    test, naming = bench.labelled("imagenet"), bench.options.naming
    moments = test.collection.moments
    heads = chosen_heads(None, moments.basis, moments.layers)
    every = Terms.all_mlps(moments.basis) | Terms.all_heads(moments.basis)
    rest = every - Terms.of(moments.basis, heads=heads)
    longest = bench.options.longest
    marks = [mark for mark in _MARKS if mark < longest] + [longest]
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    for pool in dict.fromkeys([naming.pool, *bench.options.pools]):
        features = pool_features(bench.model, bench.pool(pool), PoolOptions(pool=pool, seed=naming.seed))
        spans = moments.textspan(features, longest, heads)
        curve = reconstruction_curve(test.batches(), test.classifier, spans, moments=moments, ablated=rest)
        if not rows:
            base = rounded(curve.baseline.accuracy)
            rows.append({"name": "whole embedding", **{str(mark): base for mark in marks}})
        # a head with fewer directions than asked for is as good as it gets with all of them
        accuracies = [accuracy.accuracy for accuracy in curve.sizes]
        curves[pool] = accuracies
        values = {str(mark): rounded(accuracies[min(mark, len(accuracies) - 1)]) for mark in marks}
        rows.append({"name": pool, **({"role": "descriptions"} if pool == naming.pool else {}), **values})
    figure = "figures/texts.png"
    most = max(map(len, curves.values()))
    lines = {pool: values + values[-1:] * (most - len(values)) for pool, values in curves.items()}
    ticks = [str(size) for size in range(most)]
    write_curves(bench.out / figure, "Accuracy with heads replaced by texts", "texts per head", ticks, lines)
    known = naming.pool in POOLS or naming.pool == RANDOM
    needed = next(number.requires["pool"] for number in NUMBERS if "pool" in number.requires)
    setup = bench.setup("imagenet") | {"pool": naming.pool if known else needed}
    more = {"heads": [list(head) for head in heads], "ablated": str(rest), "accuracies": curves}
    columns = [Column(str(mark), f"m = {mark}") for mark in marks]
    return Result(rows, columns, PROTOCOL, setup, figures=[figure], failed=test.collection.failed, more=more)
