"""The joint decomposition of some images into heads, patches and texts: experiment 8 of the paper."""

import numpy as np

from clipfast.analyses.joint import patch_scores
from clipfast.commands.figures import write_panel
from clipfast.commands.heads import chosen_heads
from clipfast.commands.pools import pool_features
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.commands.sheets import Tile, hot, sheet
from clipfast.errors import InputError
from clipfast.report.palette import enlarged, limit
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import rounded

_IMAGES, _HEADS, _TEXTS = 4, 3, 5
PROTOCOL = (
    f"The {_HEADS} heads of the last four layers whose outputs vary most, each with its first {_TEXTS} texts. For "
    "each image and head: the direction with the largest score, and what each patch adds to it.",
    "The published result is pictures, not numbers. The table has what can be checked: the head's score as the sum "
    "over tokens, its difference from the score of the head's whole output, and the share of the positive scores that "
    "the strongest tenth of the patches holds.",
)


def run(bench: Workbench) -> Result:
    """Measures the table and draws the maps."""
    moments, collection = bench.moments("imagenet"), bench.collection("imagenet")
    naming = bench.options.naming
    texts = bench.pool(naming.pool)
    spans = moments.textspan(
        pool_features(bench.model, texts, naming), _TEXTS, chosen_heads(None, moments.basis, moments.layers)
    )
    heads = sorted(spans, key=lambda head: -spans[head].variance)[:_HEADS]
    heads = [head for head in heads if spans[head].picks]
    if not heads:
        raise InputError("no head of the last four layers varies over these images: there is nothing to decompose")
    sources = collection.sources()
    chosen = [place * len(sources) // _IMAGES for place in range(min(_IMAGES, len(sources)))]
    pixels = bench.model.prepare([sources[place].open() for place in chosen])
    contributions = bench.model.decompose(pixels, tokens=True)
    pictures = Denormalizer(bench.model).pictures(pixels)
    rows, tiles = [], []
    for row, place in enumerate(chosen):
        tiles.append(Tile(pictures[row], [collection.entries[place].name]))
        for layer, head in heads:
            span = spans[layer, head]
            scores = patch_scores(contributions, layer, head, span)[row]  # [N, m]
            whole = contributions.head(layer, head)[row] @ span.directions.to(contributions.codes).T  # [m]
            best = int(scores.sum(0).argmax())
            grid = scores[-contributions.grid[0] * contributions.grid[1] :, best].unflatten(0, contributions.grid)
            positive = grid.flatten().clamp_min(0).sort(descending=True).values
            tenth = positive[: max(1, len(positive) // 10)].sum() / positive.sum().clamp_min(1e-30)
            text = texts[span.picks[best]] if texts else f"random vector {span.picks[best]}"
            rows.append(
                {
                    "name": collection.entries[place].name,
                    "head": f"L{layer}.H{head}",
                    "text": text,
                    "score": rounded(float(scores[:, best].sum())),
                    "difference": rounded(float((scores.sum(0) - whole).abs().max())),
                    "tenth": rounded(float(tenth)),
                }
            )
            values = np.asarray(grid.detach().float().cpu())
            heat = enlarged(values / limit(values), pictures[row].size)
            tiles.append(Tile(hot(pictures[row], heat), [f"L{layer}.H{head}", text], marked=True))
    figure = "figures/joint.png"
    note = "what every patch adds through a head along one of its texts: orange raises the score, blue lowers it"
    write_panel(sheet("Joint decomposition", note, tiles, 1 + len(heads)), bench.out / figure)
    columns = (
        Column("head", "head", "text"),
        Column("text", "text", "text"),
        Column("score", "score", "number"),
        Column("difference", "difference", "number"),
        Column("tenth", "in a tenth of the patches"),
    )
    return Result(rows, columns, PROTOCOL, figures=[figure], failed=collection.failed)
