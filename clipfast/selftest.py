"""Does a model decompose correctly here? Its own weights, on this device and in this dtype, on a few images.

A backend of torch or a driver that computes wrongly does so without an error: on some devices attention or a product of
matrices gives wrong numbers for some shapes. Every check here compares two results that are computed in different ways
and must agree up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast.basis import Depth
from clipfast.contributions import Contributions
from clipfast.model import Images, Model
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene

SUMS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Absolute differences up to which two sums of contributions, whose whole is about 1, agree, by dtype."""
SCENES = 3
_TEXTS = 2


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: what is compared with what.
        error: the largest difference.
        bound: up to which it counts as rounding.
        where: where the difference begins, if that is known; empty otherwise.
    """

    what: str
    error: float
    bound: float
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether the two agree; not where the difference is not a number."""
        return self.error <= self.bound


@dataclass(frozen=True)
class SelfTest:
    """What a self-test measured.

    Attributes:
        model: what was tested, in one line.
        images: how many images were decomposed.
        checks: every comparison.
    """

    model: str
    images: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.images} images"]
        for check in self.checks:
            result = "ok" if check.ok else f"FAILED{check.where and ': ' + check.where}"
            lines.append(f"{check.what}: {check.error:.1e} (at most {check.bound:.0e}) {result}")
        return "\n".join(lines)


def example_images(height: int, width: int) -> list[Image.Image]:
    """Drawn scenes and one image of noise, the same at every call."""
    pictures = [Image.fromarray(render(sample_scene(0, "test", index))) for index in range(SCENES)]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    drawn = [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures]
    return [*drawn, Image.fromarray(noise)]


def selftest(model: Model, images: Images = ()) -> SelfTest:
    """Tests a model as it is: its weights, device, dtype and backend.

    >>> print(selftest(clipfast.load("scenes")))

    Args:
        model: the model.
        images: images beside those of :func:`example_images`, as for :meth:`clipfast.Model.decompose`.

    Raises:
        ImageError: a file that cannot be read.
        InputError: images that do not fit.
    """
    pixels = model.prepare(example_images(*model.tower.image_size))
    if isinstance(images, Tensor) or not isinstance(images, Sequence) or len(images):
        pixels = torch.cat([pixels, model.prepare(images)])
    depths: list[Depth] = [] if not model.tower.blocks else ["all"]
    depths += [] if model.tower.pooling == "cls" else ["pool"]
    checks = [_embedding(model, pixels)]
    for depth in depths:
        suffix = f", depth={depth!r}" if len(depths) > 1 else ""
        checks += [Check(check.what + suffix, check.error, check.bound) for check in _terms(model, pixels, depth)]
    return SelfTest(repr(model), len(pixels), tuple(checks))


def _embedding(model: Model, pixels: Tensor) -> Check:
    found = model.verify(pixels)
    where = "" if found.first is None else f"first at the {found.first}, {found.parts[found.first]:.1e}"
    worst = max([found.max_error, *found.parts.values()], key=lambda error: (error != error, error))
    return Check("embedding and every layer = those of the module's own forward", worst, found.tolerance, where)


def _terms(model: Model, pixels: Tensor, depth: Depth) -> Iterator[Check]:
    bound = SUMS[model.dtype]
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(_TEXTS, model.tower.embed_dim, generator=generator), dim=-1)
    texts = texts.to(model.device, torch.promote_types(model.dtype, torch.float32))
    summed = model.decompose(pixels, texts=texts, attention=True, depth=depth)
    per_head = model.decompose(pixels, texts=texts, maps="per_head", depth=depth)
    yield Check("sum of all terms = embedding", summed.max_error(), bound)
    yield Check("attention of each head sums to 1", _largest(summed.attention.sum(-1) - 1), bound)
    yield Check("map of a text = score of the heads", _largest(summed.maps.sum(1) - _scores(summed, texts)), bound)
    yield Check("map per head, summed = map", _largest(per_head.maps.sum((1, 2)) - summed.maps), bound)
    heads = per_head.maps.sum(3) - per_head.scores(texts).heads
    yield Check("map of a head = score of the head", _largest(heads), bound)
    if depth == "pool" or model.tower.pool is None:
        last = model.decompose(pixels[:1], tokens=True, layers=[-1], depth=depth)
        yield Check("tokens of a head = the head", _largest(last.tokens(-1).sum(1) - last.heads()[:, 0]), bound)


def _scores(contributions: Contributions, texts: Tensor) -> Tensor:
    """Scores of all kept heads together, ``[B, T]``."""
    return contributions.scores(texts).heads.sum((1, 2))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
