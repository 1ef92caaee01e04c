"""Tests whether the names that TEXTSPAN gives to heads describe their function.

Heads are named from one set of scenes and evaluated on another. A head is named after an attribute if at least three of
its first five texts name it, more than name any other. All heads of an attribute are mean-ablated together. The score
is the loss in the attribute's zero-shot accuracy over the mean loss of the other attributes. The controls are equally
many random heads of the same layers, and random vectors in place of the texts.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import clipfast
from benchmarks.truth.scenes import Bar, Scenes, mean
from clipfast import descriptions
from clipfast.scenes.vocabulary import ATTRIBUTES

TOP, AT_LEAST, LAST = 5, 3, 4
_DRAWS = 20
_LEAST = 0.001  # lower bound of the mean cost, so that no score is divided by zero
Head = tuple[int, int]


def called(names: Sequence[str]) -> str | None:
    """The attribute a head is named after, from the attributes of its first texts, such as ``"shape, size"``."""
    mentions = Counter(attribute for name in names[:TOP] for attribute in name.split(", ") if attribute)
    best = mentions.most_common(2)
    if not best or best[0][1] < AT_LEAST or (len(best) > 1 and best[1][1] == best[0][1]):
        return None
    return best[0][0]


def named_heads(moments: clipfast.Moments, features: Any, names: Sequence[str]) -> dict[str, list[Head]]:
    """The heads of the last layers, by the attribute they are named after."""
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    named: dict[str, list[Head]] = {}
    for head, span in moments.textspan(features, TOP, heads).items():
        attribute = called([names[pick] for pick in span.picks])
        if attribute is not None:
            named.setdefault(attribute, []).append(head)
    return named


def costs(scenes: Scenes, heads: Sequence[Head], base: Mapping[str, float], moments: Any) -> dict[str, float]:
    """The loss in accuracy of every attribute when heads are ablated."""
    after = scenes.ablated(clipfast.Terms.of(scenes.model, heads=heads), moments)
    return {attribute: base[attribute] - after[attribute] for attribute in ATTRIBUTES}


def score(cost: Mapping[str, float], attribute: str) -> dict[str, float]:
    """The cost of the attribute itself, the mean cost of the others, and their ratio."""
    return _ratio(cost[attribute], mean([value for name, value in cost.items() if name != attribute]))


def _ratio(own: float, others: float) -> dict[str, float]:
    return {"own": own, "others": others, "ratio": own / max(others, _LEAST)}


def experiment(named_from: Scenes, evaluated_on: Scenes) -> dict[str, Any]:
    """Names, scores and controls."""
    model, moments = named_from.model, named_from.moments
    kinds = descriptions.categories("scenes")
    texts = list(kinds)
    features = model.encode_text(texts)
    base = evaluated_on.accuracies(evaluated_on.contributions.total())
    named = named_heads(moments, features, list(kinds.values()))
    rows = []
    generator = random.Random(0)
    last_heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    for attribute, heads in sorted(named.items()):
        cost = costs(evaluated_on, heads, base, moments)
        samples = [generator.sample(last_heads, len(heads)) for _ in range(_DRAWS)]
        controls = [score(costs(evaluated_on, sample, base, moments), attribute) for sample in samples]
        rows.append(
            {
                "attribute": attribute,
                "heads": heads,
                **score(cost, attribute),
                "costs": cost,
                "random_heads": _ratio(*(mean([control[key] for control in controls]) for key in ("own", "others"))),
            }
        )
    vectors = descriptions.random_features(len(texts), model.tower.embed_dim, 0)
    by_chance = named_heads(moments, vectors, list(kinds.values()))
    random_texts = [
        {"attribute": attribute, "heads": heads, **score(costs(evaluated_on, heads, base, moments), attribute)}
        for attribute, heads in sorted(by_chance.items())
    ]
    kept = sum(row["ratio"] >= 2 and row["own"] > 0 for row in rows)
    return {
        "base": base,
        "heads": len(last_heads),
        "named": rows,
        "random_texts": random_texts,
        "bars": [
            Bar(
                "attributes that lose at least 2× as much as others when their own heads are ablated",
                kept,
                4,
                percent=False,
            )
        ],
    }
