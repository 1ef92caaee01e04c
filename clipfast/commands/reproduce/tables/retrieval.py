"""Retrieval by the output of one head: experiment 5 of the paper, judged by an attribute of CUB-200-2011."""

import os
from dataclasses import replace

from clipfast.analyses.retrieval import Index
from clipfast.commands import console
from clipfast.commands.figures import write_panel
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.commands.retrieve.agreement import LabelQueries, embedding_share, head_shares
from clipfast.commands.sheets import Tile, sheet
from clipfast.dataset.benchmarks.cub import read_attribute
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError
from clipfast.report.shares import rounded

_TOP, _QUERIES, _SHOWN, _DRAWN = 5, 2000, 10, 4
PROTOCOL = (
    f"Every query is one of the images; the {_TOP} others whose output of a head is most similar (cosine, less the "
    "mean over the images) are its neighbours. The table has the share of neighbours with the query's value of the "
    "attribute, by the best heads and by the whole embedding.",
    "Images count that have exactly one value of the attribute of the highest certainty. At most 2,000 images, spread "
    "evenly, are queries. Heads are ranked on these same images.",
    "The published result is pictures (same colour, same count), not a number.",
)


def run(bench: Workbench) -> Result:
    """Measures the table and draws the neighbours of some images."""
    attribute, place = bench.options.attribute, bench.options.data.place("cub")
    assert place is not None
    values = {os.path.realpath(path): value for path, value in read_attribute(place, attribute).items()}
    collection = Collection(bench.collection("cub").folder)
    known = [values.get(os.path.realpath(entry.path)) for entry in collection.entries]
    if not any(known):
        raise InputError(f"no image has exactly one value of {attribute}")
    collection.entries = [
        replace(entry, label=value, group=None) for entry, value in zip(collection.entries, known, strict=True)
    ]
    queries = LabelQueries.of(collection, _TOP, _QUERIES)
    moments = collection.moments
    heads = [(layer, head) for layer in moments.layers for head in range(moments.basis.heads)]
    whole = embedding_share(collection, queries, "cosine", True)
    with console.progress("judging heads", len(heads)) as advance:
        judged = sorted(head_shares(collection, heads, queries, "cosine", True, advance), key=lambda row: -row["share"])
    rows = [{"name": f"L{row['layer']}.H{row['head']}", "share": row["share"]} for row in judged[:_SHOWN]]
    rows.append({"name": "whole embedding", "share": rounded(whole)})
    rows.append({"name": "chance", "share": rounded(queries.chance)})
    best = judged[0]["layer"], judged[0]["head"]
    figure = "figures/retrieval.png"
    _draw(bench, collection, best, figure)
    setup = {"attribute": attribute, "images": len(queries.labels), "queries": len(queries.positions)}
    columns = (Column("share", f"of {_TOP} nearest with the same {attribute}"),)
    failed = bench.collection("cub").failed
    return Result(rows, columns, PROTOCOL, setup, figures=[figure], failed=failed, more={"heads": judged})


def _draw(bench: Workbench, collection: Collection, head: tuple[int, int], figure: str) -> None:
    index = Index([head])
    for _, part in collection.batches(without_terms=True):
        index.add(part)
    count = len(collection.entries)
    chosen = [place * count // _DRAWN for place in range(min(_DRAWN, count))]
    near = index.nearest(chosen, _TOP)
    sources, tiles = collection.sources(), []
    for place, others in zip(chosen, near.images.tolist(), strict=True):
        for position, image in enumerate([place, *others]):
            lines = ["query" if not position else f"{position}.", collection.entries[image].label or ""]
            tiles.append(Tile(sources[image].open(), lines, marked=not position))
    title = f"Nearest by L{head[0]}.H{head[1]}"
    write_panel(sheet(title, f"the query and its {_TOP} neighbours, a row each", tiles, 1 + _TOP), bench.out / figure)
