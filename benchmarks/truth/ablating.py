"""What zero-shot accuracy needs, what a few texts per head account for, and a spurious cue removed by its name."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import clipfast
from benchmarks.truth.naming import AT_LEAST, LAST, TOP
from benchmarks.truth.scenes import Bar, Lookalikes, Scenes, classifier, mean
from clipfast import descriptions
from clipfast.analyses.ablation import ablate, curves
from clipfast.analyses.reconstruction import reconstruction_curve
from clipfast.analyses.selection import by_texts, matching, terms_of
from clipfast.scenes.vocabulary import ATTRIBUTES

LONGEST, MARK = 60, 20
POOLS = ("scenes", "general", "common_words", "classes", "random")
CONTROLS = {"random": "random vectors", "common_words": "common words"}
WORDS = (
    *("sea", "ocean", "water", "forest", "trees", "woods", "desert", "dunes", "sand", "night", "stars"),
    *("snow", "snowy", "winter", "city", "town", "buildings"),
)
"""What a user who wants to be rid of backgrounds would write down: the words the scenes' captions have for them."""


def terms(judged_on: Scenes, moments: clipfast.Moments) -> dict[str, Any]:
    """Accuracy without MLPs, without the class token's own attention, and without the first layers, per attribute."""
    found: dict[str, dict[str, float]] = {}
    for attribute in ATTRIBUTES:
        rows, labels = judged_on.judged_by(attribute)
        batch = (judged_on.found.select(rows), labels, None)
        curve = curves([batch], classifier(judged_on.model, attribute), moments)
        layers = {f"attention of layers 0 to {layer}": each for layer, each in enumerate(curve.layers)}
        every = {"nothing": curve.baseline, "all MLPs": curve.mlps, "class token to itself": curve.class_token}
        for name, accuracy in (every | {"both": curve.both} | layers).items():
            found.setdefault(name, {})[attribute] = accuracy.accuracy
    return {"accuracies": found}


def texts(judged_on: Scenes, moments: clipfast.Moments, names: Sequence[str] = POOLS) -> dict[str, Any]:
    """Accuracy with every head of the last four layers replaced by its projection on m texts, per pool."""
    model = judged_on.model
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    pools: dict[str, list[float]] = {}
    base = 0.0
    for pool in names:
        features = _features(model, pool)
        spans = moments.textspan(features, LONGEST, heads)
        by_attribute = []
        for attribute in ATTRIBUTES:
            rows, labels = judged_on.judged_by(attribute)
            batch = (judged_on.found.select(rows), labels, None)
            by_attribute.append(reconstruction_curve([batch], classifier(model, attribute), spans))
        base = mean([each.baseline.accuracy for each in by_attribute])
        sizes = range(min(len(each.sizes) for each in by_attribute))
        pools[pool] = [mean([each.sizes[size].accuracy for each in by_attribute]) for size in sizes]
    at_mark = {pool: values[min(MARK, len(values) - 1)] for pool, values in pools.items()}
    best = max({"scenes", "general"} & set(names), key=lambda pool: at_mark[pool])
    controls = [(pool, what) for pool, what in CONTROLS.items() if pool in names]
    return {
        "base": base,
        "heads": len(heads),
        "pools": pools,
        "bars": [
            Bar(f"accuracy kept with {MARK} texts in place of each head, pool {best}", at_mark[best] / base, 0.9),
            *(
                Bar(f"the same accuracy minus that with {what} in place of texts", at_mark[best] - at_mark[pool], 0)
                for pool, what in controls
            ),
        ],
    }


def _features(model: clipfast.Model, pool: str) -> Tensor:
    """Texts of a pool that the model can read whole, or as many random vectors as the general pool has."""
    if pool == "random":
        return descriptions.random_features(len(descriptions.pool("general")), model.tower.embed_dim, 0)
    every = descriptions.pool(pool)
    long = set(model.too_long(every))
    return model.encode_text([text for place, text in enumerate(every) if place not in long])


def spurious(named_from: Scenes, alike: Scenes, judged_on: Scenes) -> dict[str, Any]:
    """Look-alikes before and after heads are ablated that texts call by backgrounds; no label is looked at."""
    model, moments = named_from.model, named_from.moments
    pool = descriptions.pool("scenes")
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    spans = moments.textspan(model.encode_text(pool), TOP, heads)
    chosen = by_texts(spans, matching(pool, WORDS), top=TOP, at_least=AT_LEAST)
    gone = terms_of(chosen, moments)
    before = Lookalikes(alike).accuracy(alike.found.total())
    after = Lookalikes(alike).accuracy(ablate(alike.found, gone, moments))
    names = sorted(
        {f"{scene.objects[0].shape} in {scene.background}" for scene in alike.records}
    )  # the order in which groups are numbered
    whole, rest = judged_on.accuracies(judged_on.found.total()), judged_on.ablated(gone, moments)
    return {
        "heads": [head[:2] for head in chosen],
        "groups": {name: [before.group_accuracies[at], after.group_accuracies[at]] for at, name in enumerate(names)},
        "worst": [before.worst_group, after.worst_group],
        "average": [before.mean_of_groups, after.mean_of_groups],
        "shapes": [whole["shape"], rest["shape"]],
        "bars": [
            Bar(
                "gain of the worst group without the background heads, points",
                100 * (after.worst_group - before.worst_group),
                15,
                percent=False,
            ),
            Bar(
                "gain of the mean over groups without the background heads, points",
                100 * (after.mean_of_groups - before.mean_of_groups),
                -2,
                percent=False,
            ),
        ],
    }
