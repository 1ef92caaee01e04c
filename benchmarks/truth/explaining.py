"""Are explanations of single choices true? ``python -m benchmarks.truth.explaining [--scenes N] [--out FOLDER]``.

On scenes with one object, of which everything is known, the bundled model chooses a shape. Asked are:

* whether the class is lost soon when patches go in the order of the explanation, beside other orders (deletion), and
  found soon when they come in it (insertion);
* whether the group of patches that the choice rests on is the object, and whether its texts name what the object is;
* whether the first text that image and classes share names the object's shape;
* whether what a concept in the image tells of an attribute's class is told by the texts that name this attribute.

The command writes ``explaining.json`` and ``explaining.md``; its exit code is 1 if a bar is missed.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from benchmarks.results import FOLDER
from benchmarks.truth.scenes import Bar, classifier, mean
from clipfast import descriptions
from clipfast.analyses.curves import Curve, deletion, insertion
from clipfast.analyses.explaining import Explanation, explain_image, logit_scale
from clipfast.analyses.knowledge import Knowledge
from clipfast.analyses.relevance import METHODS
from clipfast.bench import machine
from clipfast.bench.document import provenance
from clipfast.bench.table import markdown_table
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.evaluate import counts
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import ATTRIBUTES, SHAPES

FORMAT = "clipfast.explaining/1"
GROUPS, PATCHES, RANDOM = "groups", "patches", "random"
ORDERS = (GROUPS, PATCHES, "attention", "chefer", RANDOM)
"""Of other methods the simplest, and the best one at segmenting scenes (``segmenting.py``)."""
NAMED = ("shape", "colour", "texture")
STEPS, RESAMPLES = 8, 2000
LESS = 0.2
_BATCH = 40
_OBJECT = 0.5  # a patch is the object's if it covers this share of it


def scenes(count: int) -> list[Scene]:
    """The first scenes of the split ``test-unbiased`` that have one object."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = sample_scene(0, "test-unbiased", index)
        found += [scene] if len(scene.objects) == 1 else []
        index += 1
    return found


def explanations(model: clipfast.Model, images: Tensor, texts: Sequence[str], pool: Tensor) -> list[Explanation]:
    """Why each image is taken for its shape."""
    contributions = model.decompose(images, tokens=True)
    shapes = classifier(model, "shape")
    return [explain_image(one, shapes, SHAPES, pool, texts, scale=logit_scale(model.module)) for one in contributions]


def heat(model: clipfast.Model, images: Tensor, explained: Sequence[Explanation], order: str, draw: int) -> Tensor:
    """The heat map of an order, ``[B, rows, columns]``; every method explains the same direction."""
    if order == GROUPS:
        return torch.stack([explanation.heat() for explanation in explained])
    if order == PATCHES:
        return torch.stack([explanation.visual.scores for explanation in explained])
    if order == RANDOM:
        return torch.rand(len(images), *model.tower.grid, generator=torch.Generator().manual_seed(draw))
    directions = torch.stack([explanation.decision.direction for explanation in explained])
    return METHODS[order](model.tower, images, (logit_scale(model.module) or 1.0) * directions)


def experiment(model: clipfast.Model, count: int, orders: Sequence[str] = ORDERS) -> dict[str, Any]:
    """All figures on ``count`` scenes."""
    kinds = descriptions.categories("scenes")
    texts = list(kinds)
    pool = model.encode_text(texts)
    scale, shapes = logit_scale(model.module) or 1.0, classifier(model, "shape")
    areas: dict[str, dict[str, list[float]]] = {order: {"deletion": [], "insertion": []} for order in orders}
    drawn, rows, features = scenes(count), [], []
    patch = tuple(side // cells for side, cells in zip(model.image_size, model.tower.grid, strict=True))
    for start in range(0, count, _BATCH):
        records = drawn[start : start + _BATCH]
        pictures = [render_with_masks(scene) for scene in records]
        images = model.prepare([Image.fromarray(pixels) for pixels, _ in pictures])
        masks = torch.stack([torch.from_numpy(objects.any(0)) for _, objects in pictures]).double()
        explained = explanations(model, images, texts, pool)
        features.append(model.encode_image(images))
        targets = torch.tensor([explanation.decision.target for explanation in explained])
        for order in orders:
            hot = heat(model, images, explained, order, start)
            for kind, measure in (("deletion", deletion), ("insertion", insertion)):
                curve: Curve = measure(model.encode_image, images, hot, shapes, targets, scale=scale, steps=STEPS)
                areas[order][kind] += curve.area().tolist()
        there = F.avg_pool2d(masks[:, None], patch)[:, 0]
        rows += [
            _found(scene, explanation, share, texts)
            for scene, explanation, share in zip(records, explained, there, strict=True)
        ]
    return {
        "scenes": count,
        "steps": STEPS,
        "curves": {order: {kind: interval(values) for kind, values in both.items()} for order, both in areas.items()},
        "less": {
            other: reduction(areas[GROUPS]["deletion"], areas[other]["deletion"]) for other in orders if other != GROUPS
        },
        "groups": {key: interval([row[key] for row in rows if row[key] is not None]) for key in rows[0]},
        "knowledge": knowledge(model, torch.cat(features), drawn, pool, kinds),
    }


def _found(scene: Scene, explanation: Explanation, there: Tensor, texts: Sequence[str]) -> dict[str, float | None]:
    """How well an explanation agrees with the truth; ``there`` is the share of object in each patch."""
    (item,) = scene.objects
    groups = explanation.visual.groups
    hottest = max(groups, key=lambda group: group.score / group.patches)
    truth = there > _OBJECT
    overlaps = [float((group.mask & truth).sum()) / max(float((group.mask | truth).sum()), 1.0) for group in groups]
    words = [" ".join(texts[text] for text, _ in group.texts).split() for group in groups]
    others = [own for group, own in zip(groups, words, strict=True) if group is not hottest]
    values = {attribute: _words(getattr(item, attribute)) for attribute in NAMED}
    own = words[next(place for place, group in enumerate(groups) if group is hottest)]
    right = explanation.target == item.shape
    first = texts[explanation.texts[0].text].split() if explanation.texts else []
    return {
        "object in the hottest group": float(there[hottest.mask].mean()),
        "object outside of it": float(there[~hottest.mask].mean()),
        "IoU of the best group": max(overlaps),
        "margin": explanation.decision.margin,
        "margin through the hottest group": hottest.score,
        **{f"its texts name the {name}": float(bool(value & set(own))) for name, value in values.items()},
        **{
            f"texts of other groups name the {name}": mean([float(bool(value & set(other))) for other in others])
            for name, value in values.items()
        },
        "first shared text names the shape, where it is chosen rightly": float(bool(values["shape"] & set(first)))
        if right
        else None,
    }


def _words(value: str) -> set[str]:
    """A value of an attribute as captions write it."""
    also = {"plain": {"solid"}, "dotted": {"spotted"}, "checkered": {"chequered"}, "cross": {"crosses"}}
    return {value, f"{value}s"} | also.get(value, set())


def knowledge(
    model: clipfast.Model, features: Tensor, records: Sequence[Scene], pool: Tensor, kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Per attribute, the bits that texts tell of its class: those that name it and no other, and all that do not."""
    rows = {}
    for attribute, values in ATTRIBUTES.items():
        known = [
            place
            for place, scene in enumerate(records)
            if counts(attribute, scene) and scene.value_of(attribute) is not None
        ]
        labels = torch.tensor([values.index(str(records[place].value_of(attribute))) for place in known])
        if len(labels.unique()) < 2:  # the number of objects is one in all of these scenes
            continue
        counted = Knowledge(pool, classifier(model, attribute), mean=features.mean(0))
        counted.update(features[known], labels)
        bits, shared = counted.with_class(), counted.shared()
        own = torch.tensor([kind == attribute for kind in kinds.values()])
        other = torch.tensor([attribute not in kind.split(", ") for kind in kinds.values()])
        rows[attribute] = {
            "own": float(bits[own].mean()),
            "others": float(bits[other].mean()),
            "shared": float(shared[own].mean()),
            "share": counted.share(),
        }
    return rows


def interval(values: Sequence[float]) -> list[float]:
    """The mean, and the ends of its 95 % interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(sample.std()) / len(values) ** 0.5
    middle = float(sample.mean())
    return [middle, middle - half, middle + half]


def reduction(areas: Sequence[float], others: Sequence[float]) -> list[float]:
    """How much smaller the mean of areas is than that of others, on the same images, with a 95 % bootstrap interval."""
    pairs = torch.tensor([areas, others], dtype=torch.float64)  # [2, images]
    drawn = torch.randint(pairs.shape[1], (RESAMPLES, pairs.shape[1]), generator=torch.Generator().manual_seed(0))
    means = pairs[:, drawn].mean(2)
    less = (1 - means[0] / means[1]).sort().values
    ends = [float(less[round(share * (RESAMPLES - 1))]) for share in (0.025, 0.975)]
    return [1 - float(pairs[0].mean() / pairs[1].mean()), *ends]


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """The bars; those of areas are of the lower end of the interval."""
    ratios = [row["own"] / max(row["others"], 0.001) for row in result["knowledge"].values()]
    against = {RANDOM: "random order's", "attention": "raw attention's"}
    return [
        *(
            Bar(f"area under the deletion curve, less than {name}, lower end of 95 %", result["less"][order][1], LESS)
            for order, name in against.items()
        ),
        Bar(
            "share of object in the hottest group minus that outside, points",
            100 * (result["groups"]["object in the hottest group"][0] - result["groups"]["object outside of it"][0]),
            50,
            percent=False,
        ),
        Bar(
            "bits of an attribute's class in texts that name it over those in texts that do not, least attribute",
            min(ratios),
            2,
            percent=False,
        ),
    ]


def page(document: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    result = document["result"]
    curves = [
        [order, _with_interval(both["deletion"], 3), _with_interval(both["insertion"], 3)]
        for order, both in result["curves"].items()
    ]
    less = [[order, *(f"{100 * value:.1f} %" for value in values)] for order, values in result["less"].items()]
    groups = [[name, _with_interval(values, 2)] for name, values in result["groups"].items()]
    known = [
        [attribute, f"{row['own']:.3f}", f"{row['others']:.3f}", f"{row['shared']:.3f}", f"{100 * row['share']:.0f} %"]
        for attribute, row in result["knowledge"].items()
    ]
    return (
        "\n\n".join(
            (
                "## Explanations of single choices",
                f"`python -m benchmarks.truth.explaining`: the choice of a shape in {result['scenes']} scenes with one"
                f" object. {provenance(document)}",
                "\n".join(
                    markdown_table(("what", "measured", "bar"), [list(bar.values())[:3] for bar in result["bars"]])
                ),
                "Mean probability of the chosen shape while patches are replaced by the image's mean colour"
                f" (deletion, {result['steps']} steps: lower is better) and while they are shown (insertion: higher is"
                " better), with 95 % intervals. *Groups* is the order of the explanation, group by group; *patches* the"
                " order of single patches by what they add to the margin.",
                "\n".join(markdown_table(("order", "deletion", "insertion"), curves)),
                "How much smaller the deletion area of *groups* is, with the ends of the 95 % interval:",
                "\n".join(markdown_table(("than that of", "mean", "from", "to"), less)),
                "The groups of patches beside the truth. The hottest group adds most to the margin per patch.",
                "\n".join(markdown_table(("what", "mean, 95 % interval"), groups)),
                "Bits that the presence of a text in the image tells of the class of an attribute: mean over texts that"
                " name this attribute alone, over those that do not name it; the same with the text's presence in the"
                " class's text; and how much of what the classes' texts know of all texts the images know. Presence is"
                " a rank: texts that are rarely among the first tenth of the pool have no bits, whatever is in the"
                " image.",
                "\n".join(markdown_table(("attribute", "named by", "not named by", "shared", "share"), known)),
            )
        )
        + "\n"
    )


def _with_interval(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}–{high})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment, writes and prints the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.truth.explaining", description="Are explanations true?")
    parser.add_argument("--scenes", type=int, default=150, help="number of scenes with one object (150)")
    parser.add_argument("--model", default="scenes", help="folder of another model of scenes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for explaining.json and explaining.md")
    options = parser.parse_args(arguments)
    result = experiment(clipfast.load(options.model), options.scenes)
    promised = bars(result)
    result["bars"] = [
        dict(zip(("name", "value", "bar"), bar.cells(), strict=True)) | {"met": bar.met} for bar in promised
    ]
    document = {
        "format": FORMAT,
        "model": options.model,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "code": machine.code(),
        "cases": {},
        "result": result,
    }
    text = json.dumps(document, indent=1, allow_nan=False)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "explaining.json").write_text(text + "\n", encoding="utf-8")
    markdown = page(json.loads(text))
    (options.out / "explaining.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    return 0 if all(bar.met for bar in promised) else 1


if __name__ == "__main__":
    sys.exit(main())
