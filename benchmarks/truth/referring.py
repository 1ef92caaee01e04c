"""Referring segmentation of scenes of several objects: ``python -m benchmarks.truth.referring [--out FOLDER]``.

Phrases such as ``the red star left of the blue circle`` are true of exactly one object of a scene
(:mod:`clipfast.scenes.referring`). Every method has one threshold, the best one on scenes of another seed by mean IoU;
so is the better of two contrasts for the plain map of the phrase. The command writes ``referring.json`` and
``referring.md``; its exit code is 1 if the bar is missed.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clipfast
from benchmarks.results import FOLDER
from benchmarks.truth.pages import percent
from benchmarks.truth.scenes import Bar
from clipfast.analyses.phrases import Phrase, parse
from clipfast.analyses.referring import Regions, Settings, Vocabulary, regions
from clipfast.analyses.relevance import raw_attention
from clipfast.analyses.segmentation import normalise
from clipfast.bench import machine
from clipfast.bench.document import provenance
from clipfast.bench.table import markdown_table
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.referring import KINDS, Expression, expressions, sample_crowd
from clipfast.scenes.vocabulary import BACKGROUNDS, PLAIN_SHAPES

FORMAT = "clipfast.referring/1"
OURS, WITHOUT, PLAIN, REGION, ATTENTION = (
    "phrase taken apart",
    "the same without relations",
    "map of the phrase",
    "map of the phrase, best region",
    "raw attention",
)
VOCABULARY = Vocabulary(
    nouns=(*PLAIN_SHAPES, *BACKGROUNDS), templates=("a {}", "a photo of a {}", "a picture of a {}", "there is a {}")
)
"""Nouns are the classes of the scenes, as in zero-shot segmentation; templates are those of the model's captions."""
CUTS = (0.2, 0.25, 0.3, 0.35, 0.4)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
VALIDATION_SEED, TEST_SEED = 11, 12
SPLIT = "test-unbiased"
_BATCH = 50


@dataclass
class Drawn:
    """Scenes with phrases, and all that the methods take.

    Attributes:
        expressions: phrases with the index of their scene.
        phrases: the same taken apart.
        truths: masks of their targets, ``[P, 64, 64]`` bool.
        heats: heat of the baselines for every phrase, ``[P, height, width]`` each.
        maps: ``[B, rows, columns, T]``, of the texts of all phrases.
        texts: names of the ``T`` texts.
        image_size: height and width of the model's input.
    """

    expressions: list[tuple[int, Expression]]
    phrases: list[Phrase]
    truths: Tensor
    heats: dict[str, Tensor]
    maps: Tensor
    texts: tuple[str, ...]
    image_size: tuple[int, int]

    @classmethod
    def draw(cls, model: clipfast.Model, count: int, seed: int) -> "Drawn":
        """The first scenes of a seed."""
        scenes = [sample_crowd(seed, SPLIT, index) for index in range(count)]
        pairs = [render_with_masks(scene) for scene in scenes]
        found = [
            (at, expression)
            for at, scene in enumerate(scenes)
            for expression in expressions(scene, np.random.default_rng([seed, at]))
        ]
        phrases = [parse(expression.text) for _, expression in found]
        texts = VOCABULARY.texts(phrases)
        whole = tuple(dict.fromkeys(phrase.text for phrase in phrases))
        features = torch.cat([VOCABULARY.encode(texts, model.encode_text), _encode_whole(model, whole)])
        maps, attention = [], []
        for start in range(0, count, _BATCH):
            images = model.prepare([Image.fromarray(pixels) for pixels, _ in pairs[start : start + _BATCH]])
            maps.append(model.decompose(images, texts=features).patch_maps())
            attention.append(raw_attention(model.tower, images))
        every = torch.cat(maps)
        rows = [at for at, _ in found]
        own = every[rows, :, :, [len(texts) + whole.index(phrase.text) for phrase in phrases]]
        nouns = every[rows][..., [texts.index(noun) for noun in VOCABULARY.nouns]].mean(-1)
        size = model.tower.image_size
        heats = {
            f"{PLAIN} less that of other nouns": normalise(own - nouns, size),
            PLAIN: normalise(own, size),
            ATTENTION: normalise(torch.cat(attention)[rows], size),
        }
        truths = torch.stack([torch.from_numpy(pairs[at][1][expression.target]) for at, expression in found])
        return cls(found, phrases, truths, heats, every[..., : len(texts)], texts, size)

    def regions(self, cut: float) -> list[Regions]:
        """The regions of every scene."""
        return regions(self.maps, self.texts, self.image_size, VOCABULARY, Settings(cut=cut))


@dataclass(frozen=True)
class Scored:
    """Masks against the truth.

    Attributes:
        overlaps: intersections and unions of every phrase in pixels, ``[P, 2]``.
    """

    overlaps: Tensor

    @classmethod
    def of(cls, masks: Tensor, truths: Tensor) -> "Scored":
        """Compares masks ``[P, height, width]``."""
        return cls(torch.stack([(masks & truths).sum((1, 2)), (masks | truths).sum((1, 2))], 1).double())

    @property
    def ious(self) -> Tensor:
        """IoU of every phrase, ``[P]``."""
        return self.overlaps[:, 0] / self.overlaps[:, 1]

    def row(self, drawn: Drawn) -> dict[str, Any]:
        """Mean IoU, overall IoU, precision at 0.5, and mean IoU by kind of phrase."""
        kinds: dict[str, list[float]] = defaultdict(list)
        for (_, expression), iou in zip(drawn.expressions, self.ious.tolist(), strict=True):
            kinds[expression.kind].append(iou)
        both, either = self.overlaps.sum(0).tolist()
        return {
            "mean_iou": float(self.ious.mean()),
            "overall_iou": both / either,
            "precision": float((self.ious > 0.5).double().mean()),
            "kinds": {kind: sum(kinds[kind]) / len(kinds[kind]) for kind in KINDS if kinds[kind]},
        }


Method = Callable[[Drawn, float], Tensor]


def _encode_whole(model: clipfast.Model, phrases: Sequence[str]) -> Tensor:
    """Features of whole phrases, in the templates of the vocabulary without their article."""
    templates = tuple(template.replace("a {}", "{}") for template in VOCABULARY.templates)
    return replace(VOCABULARY, templates=templates).encode(phrases, model.encode_text)


def _ours(relations: bool) -> Method:
    def masks(drawn: Drawn, cut: float) -> Tensor:
        found = drawn.regions(cut)
        phrases = drawn.phrases if relations else [Phrase(phrase.text, phrase.target) for phrase in drawn.phrases]
        pairs = zip(drawn.expressions, phrases, strict=True)
        return torch.stack([found[at].ground(phrase).mask for (at, _), phrase in pairs])

    return masks


def _plain(name: str) -> Method:
    return lambda drawn, threshold: drawn.heats[name] > threshold


def _best_region(name: str) -> Method:
    """The connected part of the mask around the hottest pixel."""

    def masks(drawn: Drawn, threshold: float) -> Tensor:
        heats = drawn.heats[name]
        inside = (heats > threshold).float()[:, None]
        part = (heats == heats.amax((1, 2), keepdim=True)).float()[:, None] * inside
        while not torch.equal(part, grown := torch.nn.functional.max_pool2d(part, 3, 1, 1) * inside):
            part = grown
        return part[:, 0].bool()

    return masks


def experiment(model: clipfast.Model, validation: int, test: int) -> dict[str, Any]:
    """Scores of every method.

    Args:
        model: the bundled model.
        validation: scenes that thresholds are chosen on.
        test: scenes that methods are scored on.
    """
    chosen_on, scored_on = Drawn.draw(model, validation, VALIDATION_SEED), Drawn.draw(model, test, TEST_SEED)
    plain = [name for name in chosen_on.heats if name != ATTENTION]
    ways: dict[str, list[tuple[str, Method, Sequence[float]]]] = {
        OURS: [("", _ours(True), CUTS)],
        WITHOUT: [("", _ours(False), CUTS)],
        PLAIN: [(name, _plain(name), THRESHOLDS) for name in plain],
        REGION: [(name, _best_region(name), THRESHOLDS) for name in plain],
        ATTENTION: [("", _plain(ATTENTION), THRESHOLDS)],
    }
    rows = {}
    for name, options in ways.items():
        scores = {
            (way, threshold): (float(Scored.of(masks(chosen_on, threshold), chosen_on.truths).ious.mean()), masks)
            for way, masks, thresholds in options
            for threshold in thresholds
        }
        way, threshold = max(scores, key=lambda key: scores[key][0])
        score, masks = scores[way, threshold]
        found = Scored.of(masks(scored_on, threshold), scored_on.truths)
        rows[name] = {"way": way, "threshold": threshold, "validation": score, **found.row(scored_on)}
    points = 100 * (rows[OURS]["mean_iou"] - rows[PLAIN]["mean_iou"])
    return {
        "scenes": {"validation": validation, "test": test},
        "phrases": {"validation": len(chosen_on.phrases), "test": len(scored_on.phrases)},
        "image_size": list(scored_on.image_size),
        "methods": rows,
        "bars": [Bar("referring mIoU minus that of the phrase's map, points", points, 10, False)],
    }


def page(document: Mapping[str, Any]) -> str:
    """The table of a document as Markdown."""
    parts = [
        f"`python -m benchmarks.truth.referring`: {document['seconds']} s. {provenance(document)}",
        *(_table(result) for result in document["results"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(result: Mapping[str, Any]) -> str:
    kinds = [kind for kind in KINDS if kind in result["methods"][OURS]["kinds"]]
    rows = [
        [
            name,
            f"{row['threshold']:g}",
            *(percent(row[key]) for key in ("mean_iou", "overall_iou", "precision")),
            *(percent(row["kinds"][kind]) for kind in kinds),
        ]
        for name, row in result["methods"].items()
    ]
    header = ("method", "threshold", "mIoU", "oIoU", "P@0.5", *kinds)
    bars = "; ".join(" ".join(str(cell) for cell in list(bar.values())[:3]) for bar in result["bars"])
    height, width = result["image_size"]
    return (
        f"{result['phrases']['test']} phrases in {result['scenes']['test']} scenes of {height} × {width} pixels, "
        f"thresholds chosen on {result['phrases']['validation']} others. {bars}.\n\n"
        + "\n".join(markdown_table(header, rows))
    )


def _plain_bar(bar: Bar) -> dict[str, Any]:
    return dict(zip(("name", "value", "bar"), bar.cells(), strict=True)) | {"met": bar.met}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment, writes and prints the results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.truth.referring", description="Referring segmentation of scenes.")
    parser.add_argument("--validation", type=int, default=120, help="scenes that thresholds are chosen on (120)")
    parser.add_argument("--test", type=int, default=240, help="scenes to score (240)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for referring.json and referring.md")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    result = experiment(clipfast.load("scenes"), options.validation, options.test)
    result["bars"] = list(map(_plain_bar, result["bars"]))
    document = {
        "format": FORMAT,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "code": machine.code(),
        "seconds": round(time.perf_counter() - start),
        "cases": {},
        "results": [result],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "referring.json").write_text(
        json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    markdown = page(document)
    (options.out / "referring.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    return 0 if all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
