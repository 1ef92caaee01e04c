"""``clipfast ablate``: what zero-shot accuracy loses, and gains, without some of the embedding's terms.

Without further options: the paper's ablations (all MLPs, the class token's own attention, both, the attention of layer
after layer from the first). With ``--terms``: these. With ``--words``, ``--contrast`` or ``--greedy``: heads chosen by
their texts, or on other labelled images, never on those they are judged by. With ``--reconstruct``: heads replaced by
what their texts span. Accuracy with nothing ablated comes first. ``--out`` gets ``ablate.json``.
"""

from collections.abc import Sequence
from typing import Any

from clipfast.analyses.ablation import evaluate
from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.moments import Moments
from clipfast.analyses.reconstruction import reconstruction_curve
from clipfast.analyses.terms import Terms
from clipfast.commands import console
from clipfast.commands.ablate.options import Options
from clipfast.commands.ablate.removals import removals
from clipfast.commands.ablations import Removal, paper, row
from clipfast.commands.collecting import collect
from clipfast.commands.files import write_json
from clipfast.commands.heads import chosen_heads
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.pools import fitting, pool_features, read_pool
from clipfast.commands.results import prepare_results
from clipfast.commands.zeroshot import Labelled
from clipfast.dataset.collection import Collection
from clipfast.report.shares import rounded

FORMAT = "clipfast.ablate/1"
_MARKS = (0, 1, 2, 5, 10, 20, 40, 60)


def run(options: Options) -> int:
    """Ablates and judges; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, images without labels, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    prepare_results(options.out, options.inputs)
    texts, notes = read_pool(options.naming.pool)  # before anything slow
    for note in notes:
        console.warn(note)
    collected = collect(options.inputs, options.out)
    if not collected.complete:
        return INTERRUPTED
    test = Labelled.of(collected.collection, collected.model, options.zeroshot)
    texts = fitting(collected.model, texts, options.naming.pool) if needs_texts(options) else []
    means = collected.collection.moments if options.means is None else Collection(options.means).moments
    chosen = [Removal(text, Terms.parse(text, means.basis)) for text in options.terms]
    chosen += removals(options, test, means, texts)
    ablations = chosen or ([] if options.reconstruct else paper(means))
    accuracies = evaluate(test.batches(), test.classifier, means, [removal.terms for removal in ablations])
    nothing = Terms.of(means.basis)
    baseline, groups = accuracies[nothing], test.groups.names
    rows = [row(Removal("nothing", nothing), baseline, groups)]
    rows += [row(removal, accuracies[removal.terms], groups) for removal in ablations]
    result = {
        "format": FORMAT,
        "model": collected.collection.header["model"],
        "pretrained": collected.collection.header["pretrained"],
        "images": baseline.count,
        "means": str(options.means or collected.collection.folder),
        "pool": options.naming.pool,
        "chance": rounded(baseline.chance),
        "near_chance": baseline.near_chance,
        "classes": list(test.classes.labels),
        "groups": list(groups),
        "ablations": rows,
    }
    if not options.json:
        _table(rows, baseline)
    if options.reconstruct is not None:
        result["reconstruction"] = _reconstruct(options, test, means, texts)
    write_json(options.out / "ablate.json", result)
    if options.json:
        console.say((options.out / "ablate.json").read_text(encoding="utf-8").rstrip())
    console.note(f"{len(ablations)} ablations of {baseline.count} images; in {options.out}/ablate.json")
    return FAILED if collected.failed else 0


def needs_texts(options: Options) -> bool:
    """Whether heads are named at all."""
    return bool(options.selection.words) or options.reconstruct is not None


def _table(rows: Sequence[dict[str, Any]], baseline: Accuracy) -> None:
    shown = [key for key in ("accuracy", "worst_group", "mean_of_groups") if key in rows[0]]
    lines = [(entry["name"], *(f"{entry[key]:.1%}" for key in shown), entry["terms"]) for entry in rows]
    headers = ("ablated", *(key.replace("_", " ") for key in shown), "terms")
    console.table(headers, lines, title=f"{baseline.count} images, chance {baseline.chance:.1%}")


def _reconstruct(options: Options, test: Labelled, means: Moments, texts: Sequence[str]) -> dict[str, Any]:
    """Accuracy with heads replaced by what up to ``--reconstruct`` texts each span."""
    heads = chosen_heads(options.selection.heads, means.basis, means.layers)
    features = pool_features(test.model, texts, options.naming)
    spans = means.textspan(features, options.reconstruct or 0, heads)
    ablated = None
    if options.rest_ablated:
        every = Terms.all_mlps(means.basis) | Terms.all_heads(means.basis)
        ablated = every - Terms.of(means.basis, heads=heads)
    curve = reconstruction_curve(test.batches(), test.classifier, spans, moments=means, ablated=ablated)
    accuracies = [accuracy.accuracy for accuracy in curve.sizes]
    if not options.json:
        lines = [(str(size), f"{accuracies[size]:.1%}") for size in _MARKS if size < len(accuracies)]
        where = f"{len(heads)} heads replaced by what their texts span, pool {options.naming.pool}"
        console.table(("texts per head", "accuracy"), [("whole", f"{curve.baseline.accuracy:.1%}"), *lines], where)
    return {
        "heads": [list(head) for head in heads],
        "ablated": None if ablated is None else str(ablated),
        "baseline": rounded(curve.baseline.accuracy),
        "accuracies": [rounded(value) for value in accuracies],
    }
