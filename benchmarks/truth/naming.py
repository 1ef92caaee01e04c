"""Do the names that TEXTSPAN gives heads say what the heads are for?

Heads are named from one set of scenes and judged on another. A head is called by an attribute when at least three of
its first five texts name it, and none is named as often. All heads called by an attribute are mean-ablated together;
the score is what that costs the attribute's own zero-shot accuracy over what it costs the others on average.
Controls: as many random heads of the same layers in place of the named ones, and random vectors in place of the texts.
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
_LEAST = 0.001  # a mean cost below this counts as this: no score is divided by nothing
Head = tuple[int, int]


def called(names: Sequence[str]) -> str | None:
    """The attribute a head is called by, from the attributes that its first texts name, such as ``"shape, size"``."""
    times = Counter(attribute for name in names[:TOP] for attribute in name.split(", ") if attribute)
    best = times.most_common(2)
    if not best or best[0][1] < AT_LEAST or (len(best) > 1 and best[1][1] == best[0][1]):
        return None
    return best[0][0]


def named_heads(moments: clipfast.Moments, features: Any, names: Sequence[str]) -> dict[str, list[Head]]:
    """The heads of the last layers by the attribute they are called by."""
    heads = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    found: dict[str, list[Head]] = {}
    for head, span in moments.textspan(features, TOP, heads).items():
        attribute = called([names[pick] for pick in span.picks])
        if attribute is not None:
            found.setdefault(attribute, []).append(head)
    return found


def costs(scenes: Scenes, heads: Sequence[Head], base: Mapping[str, float], moments: Any) -> dict[str, float]:
    """What ablating heads costs every attribute."""
    after = scenes.ablated(clipfast.Terms.of(scenes.model, heads=heads), moments)
    return {attribute: base[attribute] - after[attribute] for attribute in ATTRIBUTES}


def score(cost: Mapping[str, float], attribute: str) -> dict[str, float]:
    """The attribute's own cost, the mean of the others', and their ratio."""
    return _ratio(cost[attribute], mean([value for name, value in cost.items() if name != attribute]))


def _ratio(own: float, others: float) -> dict[str, float]:
    return {"own": own, "others": others, "ratio": own / max(others, _LEAST)}


def experiment(named_from: Scenes, judged_on: Scenes) -> dict[str, Any]:
    """Names, scores and controls."""
    model, moments = named_from.model, named_from.moments
    kinds = descriptions.categories("scenes")
    texts = list(kinds)
    features = model.encode_text(texts)
    base = judged_on.accuracies(judged_on.found.total())
    named = named_heads(moments, features, list(kinds.values()))
    rows = []
    drawn = random.Random(0)
    every = [head for head in moments.heads() if head[0] in moments.layers[-LAST:]]
    for attribute, heads in sorted(named.items()):
        cost = costs(judged_on, heads, base, moments)
        chance = [
            score(costs(judged_on, drawn.sample(every, len(heads)), base, moments), attribute) for _ in range(_DRAWS)
        ]
        rows.append(
            {
                "attribute": attribute,
                "heads": heads,
                **score(cost, attribute),
                "costs": cost,
                "random_heads": _ratio(*(mean([each[key] for each in chance]) for key in ("own", "others"))),
            }
        )
    vectors = descriptions.random_features(len(texts), model.tower.embed_dim, 0)
    by_chance = named_heads(moments, vectors, list(kinds.values()))
    random_texts = [
        {"attribute": attribute, "heads": heads, **score(costs(judged_on, heads, base, moments), attribute)}
        for attribute, heads in sorted(by_chance.items())
    ]
    kept = sum(row["ratio"] >= 2 and row["own"] > 0 for row in rows)
    return {
        "base": base,
        "heads": len(every),
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
