"""``clipfast textspan``: naming heads by the texts that span their outputs.

``--out`` gets ``textspan.json``: per head its texts in the order they were picked, the share of its variance that each
explains, its rank and what was noticed. Images that are not a collection yet are collected in the same folder first.
With ``--weights`` heads are named by what their weights can write, without images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from clipfast.analyses.textspan import Method, TextSpan, check_method
from clipfast.analyses.weights import weight_textspan
from clipfast.commands import console
from clipfast.commands.collecting import Collected, collect
from clipfast.commands.files import write_json
from clipfast.commands.heads import chosen_heads, span_row
from clipfast.commands.loading import load_model_of
from clipfast.commands.options import MODEL
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.pools import fitting, pool_features, read_pool
from clipfast.commands.quantities import plural
from clipfast.commands.results import prepare_results
from clipfast.commands.textspan.options import Options
from clipfast.errors import InputError

FORMAT = "clipfast.textspan/1"
_SHOWN = 3


def run(options: Options) -> int:
    """Names heads; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    method = check_method(options.method)
    prepare_results(options.out, None if options.weights else options.inputs)
    texts, notes = read_pool(options.naming.pool)  # before anything slow
    for note in notes:
        console.warn(note)
    if not (options.weights or options.inputs.images):
        raise InputError("no images were given: give images, a folder that `clipfast collect` wrote, or --weights")
    if options.weights:
        named = _by_weights(options, texts, method)
    else:
        collected = collect(options.inputs, options.out)
        if not collected.complete:
            return INTERRUPTED
        named = _by_images(options, collected, texts, method)
    result = {
        "format": FORMAT,
        "model": named.model,
        "pretrained": named.pretrained,
        "images": named.images,
        "pool": options.naming.pool,
        "texts": named.count,
        "method": method,
        "heads": [span_row(head, span, named.texts) for head, span in named.spans.items()],
    }
    write_json(options.out / "textspan.json", result)
    if options.json:
        console.say((options.out / "textspan.json").read_text(encoding="utf-8").rstrip())
    else:
        _table(named.spans, named.texts)
    some = f"{options.size} of {plural(named.count, 'text')}"
    console.note(f"{plural(len(named.spans), 'head')} named by {some}; in {options.out}/textspan.json")
    return FAILED if named.failed else 0


@dataclass(frozen=True)
class _Named:
    """Heads with their texts, and what they were named from."""

    spans: dict[tuple[int, int], TextSpan]
    texts: Sequence[str]
    count: int
    model: str
    pretrained: str | None
    images: int | None
    failed: int = 0


def _by_images(options: Options, collected: Collected, texts: Sequence[str], method: Method) -> _Named:
    moments, header = collected.collection.moments, collected.collection.header
    heads = chosen_heads(options.heads, moments.basis, moments.layers)
    pool = options.naming
    kept = fitting(collected.model, texts, pool.pool)
    features = pool_features(collected.model, kept, pool)
    spans = moments.textspan(features, options.size, heads, rank=options.rank, method=method)
    return _Named(spans, kept, len(features), header["model"], header["pretrained"], moments.count, collected.failed)


def _by_weights(options: Options, texts: Sequence[str], method: Method) -> _Named:
    inputs = options.inputs
    if inputs.images:
        raise InputError("--weights names heads without images: leave the images out")
    model = load_model_of(inputs)
    heads = chosen_heads(options.heads, model.basis(), range(model.layers))
    pool = options.naming
    kept = fitting(model, texts, pool.pool)
    features = pool_features(model, kept, pool)
    spans = weight_textspan(model, features, options.size, heads, rank=options.rank, method=method)
    return _Named(spans, kept, len(features), inputs.model or MODEL, inputs.pretrained, None)


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
