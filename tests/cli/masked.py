"""Images with masks for the tests of ``clipfast segment``, and slow definitions of its scores."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from commandline import picture
from PIL import Image
from torch import Tensor
from torchvision import transforms

import clipfast as package
from clipfast.commands.options import ClassOptions, InputOptions
from clipfast.commands.segment.command import Options, run

SIZE = 32
KINDS = ("cat", "dog", "owl")
EACH = 2
CLASSES = {"cat": ["a cat", "cats at home"], "dog": ["a dog"], "owl": ["an owl", "a bird at night"]}
VALUES = {"cat": (1, 4), "dog": (2,), "owl": (3,)}
BACKGROUND = ["the sea", "a green field"]
IGNORED = 255


def mask(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Blocks of the values 0 to 4 and of some to be ignored."""
    drawn = np.random.default_rng(seed + 50).choice([0, 0, 1, 2, 3, 4, IGNORED], (5, 6)).astype(np.uint8)
    return Image.fromarray(drawn).resize((width, height), Image.Resampling.NEAREST)


def write_data(root: Path) -> Path:
    """Images, masks, and the files that say what they show."""
    for at, kind in enumerate(KINDS):
        for folder in ("images", "masks"):
            (root / folder / kind).mkdir(parents=True)
        for number in range(EACH):
            seed = EACH * at + number
            picture(seed).save(root / "images" / kind / f"{number}.png")
            mask(seed).save(root / "masks" / kind / f"{number}.{('png', 'tif')[number]}")
    rows = [f"{label},{text}" for label, texts in CLASSES.items() for text in texts]
    (root / "classes.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    rows = [f"{value},{label}" for label, values in VALUES.items() for value in values]
    (root / "values.csv").write_text("\n".join(["value,label", *rows]) + "\n")
    (root / "background.txt").write_text("\n".join(BACKGROUND) + "\n")
    return root


def asked(images: Path, model: Path | None, **given: Any) -> InputOptions:
    """Options of a pass; double precision, so that no pixel's class hangs on the batch it was in."""
    shared = {} if model is None else {"model": str(model), "dtype": "fp64"}
    return InputOptions([images], batch_size=4, **shared, **{"labels": "folder", **given})


def texts_of(data: Path) -> ClassOptions:
    return ClassOptions(classes=data / "classes.csv")


def scored(data: Path, model: Path, out: Path, **given: Any) -> dict[str, Any]:
    collecting = given.pop("collecting", asked(data / "images", model))
    options = {"masks": str(data / "masks"), "zeroshot": texts_of(data), "ignore": IGNORED, **given}
    assert run(Options(collecting, out=out, **options)) == 0
    return written(out)


def written(out: Path) -> dict[str, Any]:
    result = json.loads((out / "segment.json").read_text())
    assert isinstance(result, dict)
    return result


def add(tar: tarfile.TarFile, name: str, content: Path | Image.Image | str) -> None:
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, format="png")
        data = file.getvalue()
    else:
        data = content.read_bytes() if isinstance(content, Path) else content.encode()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------- slow definitions


def features(model: package.Model) -> Tensor:
    return torch.stack([F.normalize(model.encode_text(texts).mean(0), dim=0) for texts in CLASSES.values()])


def patches(model: package.Model, path: Path, texts: Tensor) -> Tensor:
    """The map of one image for each text ``[rows, columns, T]``, from whole contributions of tokens."""
    contributions = model.decompose([path], tokens=True)
    tokens = sum((contributions.tokens(layer).sum(2) for layer in range(model.tower.layers)), torch.zeros(()))
    return (tokens[0, 1:] @ texts.T).unflatten(0, model.tower.grid)


def hot(grid: Tensor) -> Tensor:
    """A map as heat."""
    enlarged = F.interpolate(grid[None, None], size=(SIZE, SIZE), mode="bilinear")[0, 0].clamp_min(0)
    span = enlarged.max() - enlarged.min()
    return (enlarged - enlarged.min()) / span if span > 0 else torch.zeros_like(enlarged)


def moved(drawn: Image.Image) -> Tensor:
    """A mask through the resize and crop of the images."""
    resize = transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.NEAREST)
    return torch.from_numpy(np.array(transforms.CenterCrop(SIZE)(resize(drawn)))).long()


def squashed(drawn: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(drawn.resize((SIZE, SIZE), Image.Resampling.NEAREST))).long()


def share(hits: Tensor, of: Tensor) -> float:
    return float(hits.sum() / of.sum())


def precision(heat: Tensor, true: Tensor) -> tuple[float, float]:
    """Average precision with pixels of equal heat in the worst way and in the best, step by step.

    At the borders pixels are equal but for rounding, and rounding may part them in any way. Those that were cut off are
    exactly 0 and enter together; where none were, 0 is the lowest corner, 4 by 4 pixels.
    """
    low = high = 0.0
    before = hits = 0
    rounded = heat.double().round(decimals=9)
    for value in rounded.unique().flip(0):
        result = true[rounded == value]
        good, every = int(result.sum()), len(result)
        if value == 0 and every > 16:
            low, high = (each + good * (hits + good) / (before + every) for each in (low, high))
        else:
            low += sum((hits + place) / (before + every - good + place) for place in range(1, good + 1))
            high += good * (hits + good) / max(before + good, 1)
        before, hits = before + every, hits + good
    return low / hits, high / hits


def scores_of(truths: list[Tensor], kept: list[Tensor], cuts: list[Tensor]) -> dict[str, float]:
    """Pixels of all images together."""
    cut, true = (torch.cat([each[keep] for each, keep in zip(some, kept, strict=True)]) for some in (cuts, truths))
    return {
        "accuracy": share(cut == true, torch.ones_like(cut)),
        "mIoU": (share(cut & true, cut | true) + share(~cut & ~true, ~cut | ~true)) / 2,
    }


def images_of(data: Path) -> list[tuple[int, Path, Image.Image]]:
    """Class, image and mask."""
    return [
        (at, data / "images" / kind / f"{number}.png", mask(EACH * at + number))
        for at, kind in enumerate(KINDS)
        for number in range(EACH)
    ]
