"""Zero-shot evaluation of a CLIP on held-out scenes: `python -m clipfast.scenes.evaluate --model DIR`.

Every attribute is classified by its prompts; nothing is fitted. Images are uint8 RGB and go through the
model's own preprocessing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.factory import create_model_from_pretrained, get_tokenizer
from PIL import Image
from torch import Tensor

from clipfast.files import write_text
from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.tokenizer import MERGES_FILE
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES

Preprocess = Callable[[Image.Image], Tensor]

MODEL_DIR: Final = Path(__file__).with_name("model")
"""The bundled model's folder."""

BARS: Final = {
    "shape": 0.90,
    "colour": 0.90,
    "texture": 0.75,
    "count": 0.70,
    "position": 0.75,
    "background": 0.95,
}
"""The least accuracies of the bundled model."""

WORST_GROUP_GAP: Final = 0.15
"""Least difference between the average and the worst look-alike group, so that the model is biased."""

LOOKALIKE_IMAGES: Final = 480
_EDGES: Final = ("left", "right", "top", "bottom")
_BATCH: Final = 128


def load(folder: Path = MODEL_DIR) -> tuple[Any, Any, Preprocess]:
    """(model, tokenizer, preprocess) of a model folder, loaded by open_clip; float32, eval mode."""
    name = f"local-dir:{folder}"
    model, preprocess = create_model_from_pretrained(name, return_transform=True)
    tokenizer = get_tokenizer(name, bpe_path=str(folder / MERGES_FILE))
    return model.eval(), tokenizer, preprocess


@torch.no_grad()
def embed_images(model: Any, preprocess: Preprocess, images: Iterable[NDArray[np.uint8]]) -> Tensor:
    """Unit image embeddings [n, embed] of uint8 RGB pictures [height, width, 3]."""
    tensors = [preprocess(Image.fromarray(image)) for image in images]
    device = next(model.parameters()).device
    parts = torch.split(torch.stack(tensors), _BATCH)
    features = [model.encode_image(part.to(device)).float().cpu() for part in parts]
    return F.normalize(torch.cat(features), dim=-1)


@torch.no_grad()
def class_embeddings(model: Any, tokenizer: Any, attribute: str) -> Tensor:
    """Unit text embeddings [classes, embed]: the mean over the prompts of each class."""
    device = next(model.parameters()).device
    rows = []
    for texts in prompts(attribute).values():
        features = F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)
        rows.append(F.normalize(features.mean(dim=0), dim=-1).cpu())
    return torch.stack(rows)


def classify(images: Tensor, classes: Tensor) -> NDArray[np.int64]:
    """Index of the most similar class of each image, [n]."""
    return (images @ classes.T).argmax(dim=1).numpy()


def evaluate(
    model: Any,
    tokenizer: Any,
    preprocess: Preprocess,
    scenes: int = 2000,
    seed: int = 0,
    split: str = "test",
    lookalikes: int = LOOKALIKE_IMAGES,
) -> dict[str, Any]:
    """Zero-shot accuracies on held-out scenes and on the balanced set of look-alikes.

    Returns:
        "attributes": name to {"scenes", "accuracy", "chance", "bar" (None without a bar)}.
            "shape" covers the eight shapes without a look-alike, "shape (look-alikes)" the others;
            both are ten-way. Accuracies are over scenes with one object; "count" is over scenes with
            one kind of object, "background" and "lighting" over all.
        "lookalikes": {"scenes", "average", "worst", "worst_group", "gap", "groups": name to accuracy},
            for flower against gear.
        "passed": whether every bar is met and the gap is at least WORST_GROUP_GAP.
    """
    records = [sample_scene(seed, split, index) for index in range(scenes)]
    images = embed_images(model, preprocess, (render(scene) for scene in records))
    guesses = {
        name: [values[i] for i in classify(images, class_embeddings(model, tokenizer, name))]
        for name, values in ATTRIBUTES.items()
    }
    rows = _attribute_rows(records, guesses)
    alike = _lookalikes(model, tokenizer, preprocess, lookalikes, seed)
    passed = all(row["accuracy"] >= row["bar"] for row in rows.values() if row["bar"] is not None)
    return {
        "split": split,
        "seed": seed,
        "scenes": scenes,
        "attributes": rows,
        "lookalikes": alike,
        "passed": bool(passed and alike["gap"] >= WORST_GROUP_GAP),
    }


def _attribute_rows(records: Sequence[Scene], guesses: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, values in ATTRIBUTES.items():
        pairs = [
            (truth, guess)
            for scene, guess in zip(records, guesses[name], strict=True)
            if counts(name, scene) and (truth := scene.value_of(name)) is not None
        ]
        if name == "shape":
            lookalikes = [pair for pair in pairs if pair[0] in LOOKALIKES]
            pairs = [pair for pair in pairs if pair[0] not in LOOKALIKES]
            rows[name] = _row(pairs, len(values), BARS.get(name))
            rows["shape (look-alikes)"] = _row(lookalikes, len(values), None)
        elif name == "position":
            rows[name] = _row([p for p in pairs if p[0] in _EDGES], len(values), BARS.get(name))
            rows["position (centre)"] = _row([p for p in pairs if p[0] not in _EDGES], len(values), None)
        else:
            rows[name] = _row(pairs, len(values), BARS.get(name))
    return rows


def counts(attribute: str, scene: Scene) -> bool:
    """Whether a scene counts towards the accuracy of an attribute."""
    if attribute in ("background", "lighting"):
        return True
    if attribute == "count":
        return len(scene.kinds) == 1
    return len(scene.objects) == 1


def _row(pairs: list[tuple[str, str]], classes: int, bar: float | None) -> dict[str, Any]:
    correct = sum(truth == guess for truth, guess in pairs)
    return {
        "scenes": len(pairs),
        "accuracy": correct / len(pairs) if pairs else 0.0,
        "chance": 1 / classes,
        "bar": bar,
    }


def _lookalikes(model: Any, tokenizer: Any, preprocess: Preprocess, count: int, seed: int) -> dict[str, Any]:
    records = [sample_scene(seed, "lookalike", index) for index in range(count // 4 * 4)]
    images = embed_images(model, preprocess, (render(scene) for scene in records))
    shapes = ATTRIBUTES["shape"]
    classes = class_embeddings(model, tokenizer, "shape")[[shapes.index(name) for name in LOOKALIKES]]
    guesses = classify(images, classes)
    groups: dict[str, list[bool]] = {}
    for scene, guess in zip(records, guesses, strict=True):
        shape = scene.objects[0].shape
        groups.setdefault(f"{shape} in {scene.background}", []).append(LOOKALIKES[guess] == shape)
    rates = {name: float(np.mean(hits)) for name, hits in sorted(groups.items())}
    average = float(np.mean(list(rates.values())))
    worst = min(rates, key=lambda name: rates[name])
    return {
        "scenes": len(records),
        "average": average,
        "worst": rates[worst],
        "worst_group": worst,
        "gap": average - rates[worst],
        "groups": rates,
    }


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as plain text."""
    lines = [f"{'attribute':<22}{'scenes':>7}{'accuracy':>10}{'chance':>8}{'bar':>8}"]
    for name, row in result["attributes"].items():
        bar = "" if row["bar"] is None else f"{row['bar']:.0%}"
        lines.append(f"{name:<22}{row['scenes']:>7}{row['accuracy']:>10.1%}{row['chance']:>8.0%}{bar:>8}")
    alike = result["lookalikes"]
    lines += ["", f"{'flower or gear':<22}{'scenes':>7}{'accuracy':>10}{'chance':>8}{'bar':>8}"]
    share = alike["scenes"] // len(alike["groups"])
    lines += [f"{name:<22}{share:>7}{rate:>10.1%}{0.5:>8.0%}" for name, rate in alike["groups"].items()]
    lines.append(f"{'average':<22}{alike['scenes']:>7}{alike['average']:>10.1%}{0.5:>8.0%}")
    lines.append(f"{'worst below average':<22}{'':>7}{alike['gap']:>10.1%}{'':>8}{WORST_GROUP_GAP:>8.0%}")
    lines += ["", f"all bars met: {'yes' if result['passed'] else 'no'}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 if every bar is met, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.scenes.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="model folder that open_clip can load")
    parser.add_argument("--scenes", type=int, default=2000, help="number of held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--split", default="test", choices=("test", "test-unbiased"), help="held-out split")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    result = evaluate(*load(options.model), scenes=options.scenes, seed=options.seed, split=options.split)
    print(table(result))
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
