"""Tests whether the nearest images of a head share the attribute that the head is named after."""

from collections import Counter
from typing import Any

from benchmarks.truth.scenes import Bar, Scenes, mean
from clipfast.analyses.retrieval import Index

COUNT = 5
ATTRIBUTES = ("colour", "shape", "background")


def experiment(scenes: Scenes, named: list[dict[str, Any]], base_heads: list[tuple[int, int]]) -> dict[str, Any]:
    """For every named head, the share of the five nearest scenes that have the query's value of the attribute.

    Queries are all scenes that have one value of the attribute; neighbours are searched among the same scenes.

    Args:
        scenes: scenes to search, disjoint from those the heads were named from.
        named: rows of :func:`benchmarks.truth.naming.experiment`.
        base_heads: all heads, whose sum is the baseline.
    """
    rows = []
    for row in named:
        attribute = row["attribute"]
        positions = [at for at, scene in enumerate(scenes.records) if scene.value_of(attribute) is not None]
        values = [scenes.records[at].value_of(attribute) for at in positions]
        contributions = scenes.contributions.select(positions)
        counts = Counter(values)
        chance = sum((count / len(values)) ** 2 for count in counts.values())
        heads = [(f"L{layer}.H{head}", [(layer, head)]) for layer, head in row["heads"]]
        for name, query_heads in [*heads, ("all of them", row["heads"]), ("every head", base_heads)]:
            index = Index(query_heads)
            index.add(contributions)
            near = index.nearest(range(len(positions)), COUNT).images.tolist()
            hits = [mean([values[at] == value for at in images]) for images, value in zip(near, values, strict=True)]
            rows.append(
                {"attribute": attribute, "heads": name, "queries": len(positions), "chance": chance, "same": mean(hits)}
            )
    bars = []
    for attribute in ATTRIBUTES:
        own = [row for row in rows if row["attribute"] == attribute and row["heads"].startswith("L")]
        best = max(own, key=lambda row: row["same"], default={"heads": "no head", "same": 0.0})
        bars.append(
            Bar(f"share of the {COUNT} nearest images with the same {attribute}, by {best['heads']}", best["same"], 0.8)
        )
    return {"rows": rows, "bars": bars}
