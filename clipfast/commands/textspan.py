"""``clipfast textspan``: naming heads by the texts that span their outputs.

``--out`` gets ``textspan.json``: per head its texts in the order they were picked, the share of its variance that each
explains, its rank and what was noticed. Images that are not a collection yet are collected in the same folder first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipfast import descriptions
from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms
from clipfast.analyses.textspan import TextSpan, check_method
from clipfast.commands import console
from clipfast.commands.collecting import collect
from clipfast.commands.files import prepare_folder, write_json
from clipfast.commands.loading import encode_texts
from clipfast.commands.options import Collecting
from clipfast.commands.outcome import FAILED, INTERRUPTED, memory_for
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.report.shares import rounded

FORMAT = "clipfast.textspan/1"
RANDOM = "random"
_LATE = 4
_SHOWN = 3


@dataclass(frozen=True)
class Options:
    """What the command line asked for; the names are those of its options."""

    collecting: Collecting
    out: Path
    pool: str = "general"
    size: int = 20
    heads: str | None = None
    method: str = "greedy"
    rank: int | None = None
    seed: int = 0
    json: bool = False


def run(options: Options) -> int:
    """Names heads; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    method = check_method(options.method)
    prepare_folder(options.out)
    texts, notes = read_pool(options.pool)  # before anything slow
    for note in notes:
        console.warn(note)
    found = collect(options.collecting, options.out)
    if not found.complete:
        return INTERRUPTED
    moments = found.collection.moments
    heads = chosen_heads(options.heads, moments)
    features = pool_features(found.model, texts, options.pool, options.seed)
    spans = moments.textspan(features, options.size, heads, rank=options.rank, method=method)
    result = {
        "format": FORMAT,
        "model": found.collection.header["model"],
        "pretrained": found.collection.header["pretrained"],
        "images": moments.count,
        "pool": options.pool,
        "texts": len(texts) or len(features),
        "method": method,
        "heads": [head_row(head, span, texts) for head, span in spans.items()],
    }
    write_json(options.out / "textspan.json", result)
    if options.json:
        console.say((options.out / "textspan.json").read_text(encoding="utf-8").rstrip())
    else:
        _table(spans, texts)
    console.note(f"{len(spans)} heads named by {options.size} of {len(features)} texts; in {options.out}/textspan.json")
    return FAILED if found.failed else 0


def read_pool(pool: str) -> tuple[list[str], list[str]]:
    """Texts of a pool by name or of a file, none for random vectors; and what was noticed in the file.

    Raises:
        InputError: neither a pool nor a readable file of texts.
    """
    if pool == RANDOM:
        return [], []
    if pool in descriptions.POOLS:
        return descriptions.pool(pool), []
    if not Path(pool).exists():
        known = ", ".join([*descriptions.POOLS, RANDOM])
        raise InputError(f"--pool is {pool!r}: neither a file nor one of {known}")
    read = descriptions.read(Path(pool))
    return list(read.texts), list(read.notes)


def pool_features(model: Model, texts: Sequence[str], pool: str, seed: int) -> Tensor:
    """Features of the texts, or as many random unit vectors as the general pool has texts."""
    if pool == RANDOM:
        count = len(descriptions.pool("general"))
        return descriptions.random_features(count, model.tower.embed_dim, seed).to(model.device)
    with memory_for(len(texts), str(model.device), "texts"), console.status("encoding texts"):
        return encode_texts(model, texts)


def chosen_heads(text: str | None, moments: Moments) -> list[tuple[int, int]]:
    """Heads that a text names, those of the last four layers for None.

    Raises:
        InputError: a text that names no head, or terms that are no heads.
    """
    if text is None:
        late = moments.layers[-_LATE:]
        return [(layer, head) for layer, head in moments.heads() if layer in late]
    terms = Terms.parse(text, moments.basis)
    if terms.mlps or terms.class_tokens or not terms.heads:
        raise InputError(f"--heads is {text!r}: name layers or heads, such as L10-L11 or L11.H3")
    return sorted(terms.heads)


def head_row(head: tuple[int, int], span: TextSpan, texts: Sequence[str]) -> dict[str, Any]:
    """What the JSON says of one head."""
    return {
        "layer": head[0],
        "head": head[1],
        "rank": span.rank,
        "variance": rounded(span.variance),
        "picks": list(span.picks),
        "texts": [texts[pick] for pick in span.picks] if texts else None,
        "explained": [rounded(share) for share in span.explained.tolist()],
        "notes": list(span.notes),
    }


def _table(spans: dict[tuple[int, int], TextSpan], texts: Sequence[str]) -> None:
    total = sum(span.variance for span in spans.values()) or 1.0
    rows = [
        (
            f"L{layer}.H{head}",
            f"{span.variance / total:.1%}",
            f"{float(span.explained.sum()):.0%}",
            "; ".join(texts[pick] if texts else f"random vector {pick}" for pick in span.picks[:_SHOWN]),
        )
        for (layer, head), span in spans.items()
    ]
    console.table(("head", "of the variance", "explained", "texts"), rows)
