"""The experiments as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.truth.ablating import MARK
from clipfast.bench.document import provenance
from clipfast.bench.table import markdown_table

_SIZES = (1, 2, 5, 10, 20, 30, 40, 60)


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f} %"


def page(document: Mapping[str, Any]) -> str:
    """The whole document of :mod:`benchmarks.truth`."""
    experiments = document["experiments"]
    parts = [
        "# Experiments with known truth",
        f"`python -m benchmarks.truth`: {document['seconds']} s. {provenance(document)}",
        "## Bars",
        bars(document),
        *_names(experiments["names"]),
        *_terms(experiments["terms"]),
        *_texts(experiments["texts"]),
        *_spurious(experiments["spurious"]),
        *_retrieval(experiments["retrieval"]),
        *_segmentation(experiments["segmentation"]),
    ]
    return "\n\n".join(parts) + "\n"


def bars(document: Mapping[str, Any]) -> str:
    """The bars of all experiments as a table."""
    rows = [
        list(bar.values())[:3] for experiment in document["experiments"].values() for bar in experiment.get("bars", ())
    ]
    return "\n".join(markdown_table(("what", "measured", "bar"), rows))


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["\n".join(markdown_table(header, rows))]


def _heads(heads: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"L{layer}.H{head}" for layer, head in heads)


def _names(results: Mapping[str, Any]) -> list[str]:
    header = (
        "attribute",
        "heads",
        "loss of the attribute",
        "loss of others",
        "ratio",
        "random heads: own, others, ratio",
    )
    rows = []
    for row in results["named"]:
        chance = row["random_heads"]
        control = f"{percent(chance['own'])}, {percent(chance['others'])}, {chance['ratio']:.1f}"
        own, others = percent(row["own"]), percent(row["others"])
        rows.append([row["attribute"], _heads(row["heads"]), own, others, f"{row['ratio']:.1f}", control])
    control = (
        "; ".join(f"{row['attribute']}: {row['ratio']:.1f}" for row in results["random_texts"]) or "no head is named"
    )
    return [
        "## Names",
        "A head is named after an attribute if at least three of its first five texts name it;"
        f" {results['heads']} heads were tried. The table has the accuracy lost when the heads of an attribute are"
        " mean-ablated.",
        *_lines(header, rows),
        f"Ratio with random vectors in place of texts: {control}.",
    ]


def _terms(results: Mapping[str, Any]) -> list[str]:
    accuracies = results["accuracies"]
    attributes = list(accuracies["nothing"])
    rows = [[name, *(percent(values[attribute]) for attribute in attributes)] for name, values in accuracies.items()]
    return ["## Terms ablated", *_lines(("ablated", *attributes), rows)]


def _texts(results: Mapping[str, Any]) -> list[str]:
    sizes = [size for size in _SIZES if all(size < len(values) for values in results["pools"].values())]
    rows = [[pool, *(percent(values[size]) for size in sizes)] for pool, values in results["pools"].items()]
    return [
        "## Heads replaced by texts",
        f"The {results['heads']} heads of the last four layers are replaced by their projection onto m texts. The table"
        f" has the accuracy, mean over attributes; without replacement it is {percent(results['base'])}. The bar is at"
        f" m = {MARK}.",
        *_lines(("pool", *(f"m = {size}" for size in sizes)), rows),
    ]


def _spurious(results: Mapping[str, Any]) -> list[str]:
    rows = [[name, *(percent(value) for value in values)] for name, values in results["groups"].items()]
    rows += [
        [name, *(percent(value) for value in results[key])] for name, key in (("worst", "worst"), ("mean", "average"))
    ]
    rows.append(["all ten shapes, other scenes", *(percent(value) for value in results["shapes"])])
    return [
        "## A spurious cue removed by its name",
        f"Mean-ablated are the heads whose texts name backgrounds: {_heads(results['heads'])}.",
        *_lines(("flower or gear", "before", "after"), rows),
    ]


def _retrieval(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["attribute"], row["heads"], percent(row["same"]), percent(row["chance"]), str(row["queries"])]
        for row in results["rows"]
    ]
    return ["## Retrieval", *_lines(("attribute", "by", "of the 5 nearest images have it", "chance", "queries"), rows)]


def _segmentation(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, *(percent(scores[key]) for key in ("accuracy", "mean_iou", "mean_ap"))]
        for name, scores in results["methods"].items()
    ]
    return [f"## Segmentation of {results['scenes']} scenes", *_lines(("method", "accuracy", "mIoU", "mAP"), rows)]
