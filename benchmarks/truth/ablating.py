"""Which terms zero-shot accuracy needs, heads replaced by texts, and the removal of a spurious cue by its name."""

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
"""Words for backgrounds in the scenes' captions, as a user would list them to remove backgrounds."""


def terms(evaluated_on: Scenes, moments: clipfast.Moments) -> dict[str, Any]:
    """Accuracy per attribute without MLPs, without the class token's attention to itself, and without first layers."""
    accuracies: dict[str, dict[str, float]] = {}
    for attribute in ATTRIBUTES:
        rows, labels = evaluated_on.labelled(attribute)
        batch = (evaluated_on.contributions.select(rows), labels)
        curve = curves([batch], classifier(evaluated_on.model, attribute), moments)
        layers = {f"attention of layers 0 to {layer}": accuracy for layer, accuracy in enumerate(curve.layers)}
        ablations = {"nothing": curve.baseline, "all MLPs": curve.mlps, "class token to itself": curve.class_token}
        for name, accuracy in (ablations | {"both": curve.both} | layers).items():
            accuracies.setdefault(name, {})[attribute] = accuracy.accuracy
    return {"accuracies": accuracies}


def texts(evaluated_on: Scenes, moments: clipfast.Moments, names: Sequence[str] = POOLS) -> dict[str, Any]:
    """Accuracy with every head of the last four layers projected onto m texts, per pool."""
    model = evaluated_on.model
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    pools: dict[str, list[float]] = {}
    base = 0.0
    for pool in names:
        features = _features(model, pool)
        spans = moments.textspan(features, LONGEST, heads)
        by_attribute = []
        for attribute in ATTRIBUTES:
            rows, labels = evaluated_on.labelled(attribute)
            batch = (evaluated_on.contributions.select(rows), labels)
            by_attribute.append(reconstruction_curve([batch], classifier(model, attribute), spans))
        base = mean([curve.baseline.accuracy for curve in by_attribute])
        sizes = range(min(len(curve.sizes) for curve in by_attribute))
        pools[pool] = [mean([curve.sizes[size].accuracy for curve in by_attribute]) for size in sizes]
    at_mark = {pool: values[min(MARK, len(values) - 1)] for pool, values in pools.items()}
    best = max({"scenes", "general"} & set(names), key=lambda pool: at_mark[pool])
    controls = [(pool, name) for pool, name in CONTROLS.items() if pool in names]
    return {
        "base": base,
        "heads": len(heads),
        "pools": pools,
        "bars": [
            Bar(f"accuracy kept with {MARK} texts in place of each head, pool {best}", at_mark[best] / base, 0.9),
            *(
                Bar(f"the same accuracy minus that with {name} in place of texts", at_mark[best] - at_mark[pool], 0)
                for pool, name in controls
            ),
        ],
    }


def _features(model: clipfast.Model, pool: str) -> Tensor:
    """Features of the pool's texts that fit the context length, or as many random vectors as the general pool has."""
    if pool == "random":
        return descriptions.random_features(len(descriptions.pool("general")), model.tower.embed_dim, 0)
    pool_texts = descriptions.pool(pool)
    long = set(model.too_long(pool_texts))
    return model.encode_text([text for place, text in enumerate(pool_texts) if place not in long])


def spurious(named_from: Scenes, alike: Scenes, evaluated_on: Scenes) -> dict[str, Any]:
    """Accuracy on look-alikes before and after ablating the heads whose texts name backgrounds; uses no labels."""
    model, moments = named_from.model, named_from.moments
    pool = descriptions.pool("scenes")
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    spans = moments.textspan(model.encode_text(pool), TOP, heads)
    chosen = by_texts(spans, matching(pool, WORDS), top=TOP, at_least=AT_LEAST)
    ablated_terms = terms_of(chosen, moments)
    before = Lookalikes(alike).accuracy(alike.contributions.total())
    after = Lookalikes(alike).accuracy(ablate(alike.contributions, ablated_terms, moments))
    names = sorted(
        {f"{scene.objects[0].shape} in {scene.background}" for scene in alike.records}
    )  # in the order of the group numbers
    accuracies = evaluated_on.accuracies(evaluated_on.contributions.total())
    without = evaluated_on.ablated(ablated_terms, moments)
    return {
        "heads": [head[:2] for head in chosen],
        "groups": {name: [before.group_accuracies[at], after.group_accuracies[at]] for at, name in enumerate(names)},
        "worst": [before.worst_group, after.worst_group],
        "average": [before.mean_of_groups, after.mean_of_groups],
        "shapes": [accuracies["shape"], without["shape"]],
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
