"""Do a head's nearest images share what the head is called by?"""

from collections import Counter
from typing import Any

from benchmarks.truth.scenes import Bar, Scenes, mean
from clipfast.analyses.retrieval import Index

COUNT = 5
WANTED = ("colour", "shape", "background")


def experiment(scenes: Scenes, named: list[dict[str, Any]], base_heads: list[tuple[int, int]]) -> dict[str, Any]:
    """For every head that is called by an attribute: the share of its five nearest scenes with the query's value.

    Queries are all scenes that have one value of the attribute; the neighbours are looked for among these.

    Args:
        scenes: where to look; other ones than the heads were named from.
        named: rows of :func:`benchmarks.truth.naming.experiment`.
        base_heads: all heads, for the whole sum of heads as a comparison.
    """
    rows = []
    for row in named:
        attribute = row["attribute"]
        places = [at for at, scene in enumerate(scenes.records) if scene.value_of(attribute) is not None]
        values = [scenes.records[at].value_of(attribute) for at in places]
        found = scenes.found.select(places)
        shares = Counter(values)
        chance = sum((times / len(values)) ** 2 for times in shares.values())
        heads = [(f"L{layer}.H{head}", [(layer, head)]) for layer, head in row["heads"]]
        for name, several in [*heads, ("all of them", row["heads"]), ("every head", base_heads)]:
            index = Index(several)
            index.add(found)
            near = index.nearest(range(len(places)), COUNT).images.tolist()
            hits = [mean([values[at] == value for at in images]) for images, value in zip(near, values, strict=True)]
            rows.append(
                {"attribute": attribute, "heads": name, "queries": len(places), "chance": chance, "same": mean(hits)}
            )
    bars = []
    for attribute in WANTED:
        own = [row for row in rows if row["attribute"] == attribute and row["heads"].startswith("L")]
        best = max(own, key=lambda row: row["same"], default={"heads": "no head", "same": 0.0})
        bars.append(
            Bar(f"share of the {COUNT} nearest images with the same {attribute}, by {best['heads']}", best["same"], 0.8)
        )
    return {"rows": rows, "bars": bars}
