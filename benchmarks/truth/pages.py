"""The experiments as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
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
    found = document["experiments"]
    parts = [
        "# The paper's experiments, where the truth is known",
        f"`python -m benchmarks.truth`: {document['seconds']} s. {provenance(document)}",
        "## Bars",
        *_lines(("what", "found", "bar"), [list(bar.values())[:3] for bar in _bars(found)]),
        *_names(found["names"]),
        *_terms(found["terms"]),
        *_texts(found["texts"]),
        *_spurious(found["spurious"]),
        *_retrieval(found["retrieval"]),
        *_segmentation(found["segmentation"]),
    ]
    return "\n\n".join(parts) + "\n"


def _bars(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for experiment in found.values():
        yield from experiment.get("bars", ())


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["\n".join(markdown_table(header, rows))]


def _heads(heads: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"L{layer}.H{head}" for layer, head in heads)


def _names(found: Mapping[str, Any]) -> list[str]:
    header = ("called", "heads", "costs its own", "costs others", "ratio", "random heads: own, others, ratio")
    rows = []
    for row in found["named"]:
        chance = row["random_heads"]
        control = f"{percent(chance['own'])}, {percent(chance['others'])}, {chance['ratio']:.1f}"
        own, others = percent(row["own"]), percent(row["others"])
        rows.append([row["attribute"], _heads(row["heads"]), own, others, f"{row['ratio']:.1f}", control])
    control = "; ".join(f"{row['attribute']}: {row['ratio']:.1f}" for row in found["random_texts"]) or "none is named"
    return [
        "## Names",
        f"Of {found['heads']} heads, those that at least three of their first five texts call by one attribute.",
        *_lines(header, rows),
        f"Named by random vectors in place of texts, ratio: {control}.",
    ]


def _terms(found: Mapping[str, Any]) -> list[str]:
    accuracies = found["accuracies"]
    attributes = list(accuracies["nothing"])
    rows = [[name, *(percent(each[attribute]) for attribute in attributes)] for name, each in accuracies.items()]
    return ["## Terms ablated", *_lines(("ablated", *attributes), rows)]


def _texts(found: Mapping[str, Any]) -> list[str]:
    sizes = [size for size in _SIZES if all(size < len(values) for values in found["pools"].values())]
    rows = [[pool, *(percent(values[size]) for size in sizes)] for pool, values in found["pools"].items()]
    some = (
        f"{found['heads']} heads of the last four layers replaced by their projection on m texts; accuracy, mean over"
    )
    return [
        "## Heads replaced by texts",
        f"{some} attributes; whole {percent(found['base'])}, a bar at m = {MARK}.",
        *_lines(("pool", *(f"m = {size}" for size in sizes)), rows),
    ]


def _spurious(found: Mapping[str, Any]) -> list[str]:
    rows = [[name, *(percent(value) for value in values)] for name, values in found["groups"].items()]
    rows += [
        [name, *(percent(value) for value in found[key])] for name, key in (("worst", "worst"), ("mean", "average"))
    ]
    rows.append(["all ten shapes, other scenes", *(percent(value) for value in found["shapes"])])
    return [
        "## A spurious cue removed by its name",
        f"Heads with texts of backgrounds, mean-ablated: {_heads(found['heads'])}.",
        *_lines(("flower or gear", "before", "after"), rows),
    ]


def _retrieval(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["attribute"], row["heads"], percent(row["same"]), percent(row["chance"]), str(row["queries"])]
        for row in found["rows"]
    ]
    return ["## Retrieval", *_lines(("attribute", "by", "of the top 5 share it", "chance", "queries"), rows)]


def _segmentation(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, *(percent(each[key]) for key in ("accuracy", "mean_iou", "mean_ap"))]
        for name, each in found["methods"].items()
    ]
    return [f"## Segmentation of {found['scenes']} scenes", *_lines(("method", "accuracy", "mIoU", "mAP"), rows)]
