"""What ``clipfast collection export --layout clip_text_span`` writes beside contributions: classes, texts of heads."""

from pathlib import Path

from clipfast.commands import console
from clipfast.commands.collecting import Collected, collect
from clipfast.commands.collection.export.options import TextSpanOptions
from clipfast.commands.heads import chosen_heads
from clipfast.commands.options import InputOptions, PoolOptions
from clipfast.commands.pools import RANDOM, fitting, pool_features, read_pool
from clipfast.commands.zeroshot import read_classes
from clipfast.dataset.collection import Entry
from clipfast.dataset.opening import Dataset
from clipfast.dataset.text_span_export import KINDS, Classifier, Pool, check_free, export_text_span
from clipfast.dataset.text_span_files import Names
from clipfast.errors import InputError


def export(collection: Path, out: Path, options: TextSpanOptions, heads: str | None) -> int:
    """Writes the files; returns the number of images.

    Raises:
        ClipfastError: an option that does not fit, or something that was not kept.
        OSError: the files cannot be written.
    """
    if options.pool == RANDOM:
        raise InputError("--pool random has no texts: give a pool by name, or a file")
    if heads is not None and options.pool is None:
        raise InputError("--heads are those that --pool names: give --pool")
    texts, notes = read_pool(options.pool) if options.pool is not None else ([], [])  # before anything slow
    for note in notes:
        console.warn(note)
    data = Dataset(collection)
    names = Names(options.dataset_name or _stem(collection.resolve().name), options.model_name or _model_name(data))
    labels = sorted({label for rows in data.blocks() for label in data.column("label", rows) if label is not None})
    wants_classifier = options.classifier and (options.zeroshot.is_set() or len(labels) > 1)
    kinds = list(KINDS) if options.arrays is None else [kind.strip() for kind in options.arrays.split(",")]
    check_free(out, [names.array(kind) for kind in kinds])
    collected = None
    if options.pool is not None or wants_classifier:
        collected = collect(InputOptions(images=(collection,), device=options.device), collection)
    classifier = None
    if labels:
        classifier = Classifier(labels)
        if wants_classifier and collected is not None:
            classes = read_classes([Entry(label, label, "", label=label) for label in labels], options.zeroshot)
            classifier = Classifier(classes.labels, classes.classifier(collected.model))
    elif options.zeroshot.is_set():
        raise InputError(f"{collection} has no labels: collect the images again with --labels, or leave classes out")
    pools = [] if options.pool is None or collected is None else [_pool(collected, options, texts, heads)]
    with console.progress("exporting", len(data)) as advance:
        files = export_text_span(
            collection,
            out,
            names,
            kinds=None if options.arrays is None else kinds,
            classifier=classifier,
            pools=pools,
            progress=advance,
        )
    for file in files:
        console.note(str(file))
    return len(data)


def _pool(collected: Collected, options: TextSpanOptions, texts: list[str], heads: str | None) -> Pool:
    """A pool of texts with its features and the texts of heads."""
    name = str(options.pool)
    moments = collected.collection.moments
    chosen = chosen_heads(heads, moments.basis, moments.layers)
    kept = fitting(collected.model, texts, name)
    features = pool_features(collected.model, kept, PoolOptions(pool=name))
    spans = moments.textspan(features, options.size, chosen, rank=options.rank)
    picks = {head: span.picks for head, span in spans.items()}
    return Pool(Path(name).stem, kept, features, options.size, picks)


def _stem(name: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).lstrip(".") or "images"


def _model_name(data: Dataset) -> str:
    return _stem(str(data.manifest.settings.model["name"]).rstrip("/").rpartition("/")[2])
