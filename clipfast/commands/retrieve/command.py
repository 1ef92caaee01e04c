"""``clipfast retrieve``: the nearest images by the outputs of heads, or how well each head finds images of one label.

With queries ``--out`` gets ``retrieve.json`` with the neighbours and ``sheets/``, a picture per query. Without queries
it gets, for images with labels, the share of every head's nearest images that have the query's label: a head that
writes colour finds images of the same colour. Images that are not a collection yet are collected in the same folder.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipfast.analyses.retrieval import Engine, Index, import_faiss
from clipfast.commands import console
from clipfast.commands.collecting import Collected, collect
from clipfast.commands.figures import write_panel
from clipfast.commands.files import write_json
from clipfast.commands.heads import chosen_heads
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.quantities import plural
from clipfast.commands.results import prepare_results
from clipfast.commands.retrieve.agreement import Head, LabelQueries, embedding_share, head_shares
from clipfast.commands.retrieve.options import Options
from clipfast.commands.sheets import Tile, sheet
from clipfast.commands.text_features import encode_texts
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection, Entry
from clipfast.dataset.files import Source
from clipfast.errors import ImageError, InputError
from clipfast.images import open_image
from clipfast.report.shares import rounded

FORMAT = "clipfast.retrieve/1"
EMBEDDING = "embedding"
_SHOWN = 12
_COLUMNS = 6


def run(options: Options) -> int:
    """Retrieves or judges; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    options.inputs.check()
    has_queries = bool(options.query or options.text)
    if has_queries and options.heads is None:
        raise InputError("--heads is missing: name the heads to compare images by, such as L11.H3")
    if any(not text.strip() for text in options.text):
        raise InputError("one of --text is empty")
    if options.faiss and not has_queries:
        raise InputError("--faiss searches for queries: give --query or --text")
    if options.faiss:
        import_faiss()  # what is missing is said before anything slow
    prepare_results(options.out, options.inputs)
    collected = collect(options.inputs, options.out)
    if not collected.complete:
        return INTERRUPTED
    moments = collected.collection.moments
    if options.heads is None:
        heads = [(layer, head) for layer in moments.layers for head in range(moments.basis.heads)]
    else:
        heads = chosen_heads(options.heads, moments.basis, moments.layers)
    header = collected.collection.header
    result = {
        "format": FORMAT,
        "complete": True,
        "model": header["model"],
        "pretrained": header["pretrained"],
        "images": len(collected.collection.entries),
        "measure": options.measure,
        "centred": options.centred,
        "top": options.top,
    }
    if has_queries:
        return _retrieve(options, collected, heads, result)
    if not any(entry.label is not None for entry in collected.collection.entries):
        raise InputError("nothing to retrieve: give --query or --text, or --labels to judge heads by")
    return _judge(options, collected, heads, result)


# -------------------------------------------------------------------------------------------------------------- queries


@dataclass(frozen=True)
class _Query:
    """One query.

    Attributes:
        name: what the user calls it.
        kind: ``"image"`` or ``"text"``.
        of: what :meth:`Index.nearest` takes.
        entry: the image of the collection that it is, None for one from elsewhere and for a text.
        picture: the image, None for a text.
    """

    name: str
    kind: str
    of: Sequence[int] | Contributions | Tensor
    entry: Entry | None
    picture: Image.Image | None


def _retrieve(options: Options, collected: Collected, heads: Sequence[Head], result: dict[str, Any]) -> int:
    collection = collected.collection
    places = [find_query(collection.entries, query) for query in options.query]  # all before anything slow
    index = Index(heads)
    for _, part in collection.batches(without_terms=True):
        index.add(part)
    sources = collection.sources()
    engine: Engine = "faiss" if options.faiss else "exact"
    rows: list[dict[str, Any]] = []
    for number, query in enumerate(_queries(options, collected, places, sources)):
        near = index.nearest(query.of, options.top, measure=options.measure, centred=options.centred, engine=engine)
        images, scores = near.images[0].tolist(), near.scores[0].tolist()
        neighbours = [
            {
                "file": collection.entries[image].file,
                "name": collection.entries[image].name,
                "label": collection.entries[image].label,
                "score": rounded(score),
            }
            for image, score in zip(images, scores, strict=True)
        ]
        name = f"sheets/{number:03}-{re.sub(r'[^0-9a-z]+', '-', Path(query.name).stem.casefold()).strip('-')[:40]}.png"
        write_panel(_sheet(query, neighbours, [sources[image] for image in images], index), options.out / name)
        label = None if query.entry is None else query.entry.label
        rows.append({"query": query.name, "kind": query.kind, "label": label, "sheet": name, "neighbours": neighbours})
    result |= {"heads": [f"L{layer}.H{head}" for layer, head in index.heads], "engine": engine, "queries": rows}
    write_json(options.out / "retrieve.json", result)
    if options.json:
        console.say((options.out / "retrieve.json").read_text(encoding="utf-8").rstrip())
    else:
        table = [
            (row["query"], f"{near['score']:+.3f}", near["file"], near["label"] or "")
            for row in rows
            for near in row["neighbours"]
        ]
        console.table(("query", "score", "file", "label"), table)
    queries = plural(len(rows), "query", "queries")
    console.note(f"{queries} among {plural(len(index), 'image')}; results are in {options.out}")
    return FAILED if collected.failed else 0


def find_query(entries: Sequence[Entry], query: str) -> int | None:
    """Where an image stands in a collection, None for a file that is not in it.

    Args:
        entries: the collection's images.
        query: an image's path, what the collection calls it, or the name of its file alone.

    Raises:
        InputError: neither, or a name that several images have.
    """
    path = os.path.abspath(query)
    exact = [entry.file == query or (not entry.key and entry.path == path) for entry in entries]
    named = [query in (entry.name, Path(entry.file).name) for entry in entries]
    for fits in (exact, named):
        places = [place for place, fit in enumerate(fits) if fit]
        if len(places) > 1:
            some = ", ".join(entries[place].file for place in places[:3])
            raise InputError(f"--query {query!r} names {len(places)} images ({some} …): give its path")
        if places:
            return places[0]
        if os.path.isfile(path):
            return None
    raise InputError(f"--query is {query!r}: neither an image of the collection nor a file")


def _queries(
    options: Options, collected: Collected, places: Sequence[int | None], sources: Sequence[Source]
) -> list[_Query]:
    queries = []
    for name, place in zip(options.query, places, strict=True):
        if place is not None:
            entry = collected.collection.entries[place]
            queries.append(_Query(name, "image", [place], entry, _opened(sources[place])))
        else:
            picture = open_image(name)
            queries.append(_Query(name, "image", collected.model.decompose([picture]).cpu(), None, picture))
    if options.text:
        with torch.no_grad():
            features = encode_texts(collected.model, options.text).cpu()
        queries += [_Query(text, "text", features[row : row + 1], None, None) for row, text in enumerate(options.text)]
    return queries


def _opened(source: Source) -> Image.Image | None:
    try:
        return source.open()
    except ImageError as error:
        console.warn(error)
        return None


def _sheet(query: _Query, neighbours: Sequence[dict[str, Any]], sources: Sequence[Source], index: Index) -> Image.Image:
    label = "" if query.entry is None or query.entry.label is None else query.entry.label
    text = query.name if query.kind == "text" else "the image is gone"
    name = query.name if query.kind == "text" else Path(query.name).name
    tiles = [Tile(query.picture, ["query", name, label], marked=True, text=text)]
    for near, source in zip(neighbours, sources, strict=True):
        lines = [f"{near['score']:+.3f}", Path(near["file"]).name, near["label"] or ""]
        tiles.append(Tile(_opened(source), lines))
    heads = ", ".join(f"L{layer}.H{head}" for layer, head in index.heads)
    return sheet(query.name, f"nearest by {heads}", tiles, _COLUMNS)


# ------------------------------------------------------------------------------------------------------------- judging


def _judge(options: Options, collected: Collected, heads: Sequence[Head], result: dict[str, Any]) -> int:
    collection: Collection = collected.collection
    queries = LabelQueries.of(collection, options.top, options.sample)
    rows: list[dict[str, Any]] = []
    whole = embedding_share(collection, queries, options.measure, options.centred)
    complete = False
    try:
        with console.progress("judging heads", len(heads)) as advance:
            for row in head_shares(collection, heads, queries, options.measure, options.centred, advance):
                rows.append(row)
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {len(rows)} of {len(heads)} heads are judged")
    rows.sort(key=lambda row: -row["share"])
    result |= {
        "complete": complete,
        "labels": options.inputs.labels or collection.header["labels"],
        "label_column": options.inputs.label_column if options.inputs.labels else None,
        "labelled": len(queries.labels),
        "queried": len(queries.positions),
        "neighbours": queries.top,
        "chance": rounded(queries.chance),
        EMBEDDING: rounded(whole),
        "heads": rows,
    }
    write_json(options.out / "retrieve.json", result)
    if options.json:
        console.say((options.out / "retrieve.json").read_text(encoding="utf-8").rstrip())
    else:
        shown = [(f"L{row['layer']}.H{row['head']}", f"{row['share']:.1%}") for row in rows[:_SHOWN]]
        counted = f"{len(queries.positions)} of {plural(len(queries.labels), 'image')}"
        counted += f", {plural(len(queries.names), 'label')}"
        title = f"{counted}: how many of the {queries.top} nearest have the same label"
        shown += [("whole embedding", f"{whole:.1%}"), ("chance", f"{queries.chance:.1%}")]
        console.table(("head", "same label"), shown, title=title)
    console.note(f"{plural(len(rows), 'head')} judged; results are in {options.out}/retrieve.json")
    return INTERRUPTED if not complete else FAILED if collected.failed else 0
