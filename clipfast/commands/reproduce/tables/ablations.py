"""Zero-shot accuracy with terms replaced by their mean: experiments 1 and 2 of the paper."""

from clipfast.analyses.ablation import evaluate
from clipfast.analyses.terms import Terms
from clipfast.commands.ablations import Removal, paper, row
from clipfast.commands.reproduce.figures import write_curves
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.report.shares import rounded

PROTOCOL = (
    "Zero-shot: the class whose text features are most similar. A class's features are the mean of the unit features "
    "of its texts, normalised.",
    "Ablated terms are replaced by their mean over these same images, after every term was divided by the norm of its "
    "image's embedding; the sum is not normalised again.",
    "Labels are looked up by the images' names, never by their order.",
    "MLPs are all MLPs; the published code also replaces the start of the stream, which is much the same for all "
    "images. The class token to itself is token 0's own part of every layer's attention. Layers are ablated from the "
    "first on, all heads of each.",
)


def run(bench: Workbench, data: str = "imagenet", table: str = "ablations") -> Result:
    """Measures the table on a data set with labels."""
    test = bench.labelled(data)
    moments = test.collection.moments
    nothing = Removal("nothing", Terms.of(moments.basis))
    chosen = paper(moments)
    accuracies = evaluate(test.batches(), test.classifier, moments, [removal.terms for removal in chosen])
    baseline = accuracies[nothing.terms]
    rows = []
    for removal in (nothing, *chosen):
        accuracy = accuracies[removal.terms]
        rows.append(row(removal, accuracy, ()) | {"change": rounded(accuracy.accuracy - baseline.accuracy)})
    layers = [entry["accuracy"] for entry in rows if entry["name"].startswith("attention of layers")]
    title = f"Accuracy by layers whose attention is ablated, {bench.benchmark(data).name}"
    figure = f"figures/{table}.png"
    levels = {"ablated": [rows[0]["accuracy"], *layers], "chance": [baseline.chance] * (1 + len(layers))}
    ticks = ["none", *(str(layer) for layer in range(len(layers)))]
    write_curves(bench.out / figure, title, "last layer whose attention is ablated", ticks, levels)
    notes = [f"The baseline is near chance ({baseline.chance:.1%}): check labels, names and weights"]
    return Result(
        rows,
        (Column("accuracy", "accuracy"), Column("change", "change", "points"), Column("terms", "terms", "text")),
        PROTOCOL,
        bench.setup(data),
        notes if baseline.near_chance else [],
        [figure],
        test.collection.failed,
        {"chance": rounded(baseline.chance), "near_chance": baseline.near_chance},
    )
