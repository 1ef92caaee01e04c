"""Deletion and insertion: what happens to a class while patches are removed, or shown, in the order of a heat map.

A map says truly where the model sees a class if the class is lost soon when the hottest patches go first, and found
soon when they come first. The areas under the two curves are the measures of arXiv 1806.07421 (RISE).

``B`` images, ``C`` classes, ``D`` embed_dim, ``S`` steps, ``P`` cells of a map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError

Encode: TypeAlias = Callable[[Tensor], Tensor]
"""Preprocessed images ``[B, 3, height, width]`` → embeddings ``[B, D]``, such as ``model.encode_image``."""

Fill = Literal["mean", "blur"]
_BLUR: Final = 2
"""A blurred image has this many means along each side."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A class of each image over the share of its patches that are removed, or shown.

    Attributes:
        fractions: ``[S + 1]``, the share of cells, from 0 to 1.
        similarities: ``[B, S + 1]``, cosine similarity with the class.
        probabilities: ``[B, S + 1]``, softmax over the classes.
    """

    fractions: Tensor
    similarities: Tensor
    probabilities: Tensor

    def area(self, of: Literal["probabilities", "similarities"] = "probabilities") -> Tensor:
        """The area under the curve of every image by the trapezoidal rule, ``[B]``: its mean height."""
        values = self.probabilities if of == "probabilities" else self.similarities
        return torch.trapezoid(values, self.fractions, dim=1)


def deletion(
    encode: Encode,
    images: Tensor,
    heat: Tensor,
    classifier: Tensor,
    targets: Tensor,
    *,
    scale: float,
    steps: int = 16,
    fill: Fill | Tensor = "mean",
) -> Curve:
    """Removes cells from the hottest to the coldest and watches the class; a small area speaks for the map.

    Args:
        encode: the model, such as ``model.encode_image``; called with ``B`` images for each step.
        images: ``[B, 3, height, width]``, preprocessed.
        heat: ``[B, rows, columns]`` of any method; rows divide the height, columns the width. The first of equal cells
            goes first.
        classifier: ``[C, D]``, unit rows.
        targets: the class to watch in each image, integers ``[B]``.
        scale: what similarities are multiplied by before the softmax: the model's ``logit_scale.exp()``.
        steps: how many times cells are removed, ``S``; at most one for each cell.
        fill: what takes the place of removed cells: ``"mean"``, the image's mean colour; ``"blur"``, the image blurred
            beyond recognition; or pixels that broadcast to the images.

    Raises:
        InputError: shapes that do not fit, heat that is not finite, no such class, or no steps.
    """
    return _curve(encode, images, heat, classifier, targets, scale, steps, fill, inserts=False)


def insertion(
    encode: Encode,
    images: Tensor,
    heat: Tensor,
    classifier: Tensor,
    targets: Tensor,
    *,
    scale: float,
    steps: int = 16,
    fill: Fill | Tensor = "mean",
) -> Curve:
    """Shows cells from the hottest to the coldest, the others filled; a large area speaks for the map.

    Arguments and errors are those of :func:`deletion`.
    """
    return _curve(encode, images, heat, classifier, targets, scale, steps, fill, inserts=True)


def _curve(
    encode: Encode,
    images: Tensor,
    heat: Tensor,
    classifier: Tensor,
    targets: Tensor,
    scale: float,
    steps: int,
    fill: Fill | Tensor,
    *,
    inserts: bool,
) -> Curve:
    _check(images, heat, classifier, targets, steps)
    count, _, height, width = images.shape
    _, rows, columns = heat.shape
    cells = rows * columns
    order = heat.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1).view(count, 1, rows, columns)  # 0 for the hottest cell
    place = place.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3).to(images.device)
    filled = _filled(images, fill)
    first, second = (filled, images) if inserts else (images, filled)
    chosen = targets.to(images.device, torch.long)[:, None]
    sizes = [round(cells * step / min(steps, cells)) for step in range(min(steps, cells) + 1)]
    similarities, probabilities = [], []
    for size in sizes:
        features = F.normalize(encode(torch.where(place < size, second, first)), dim=1)
        scores = features @ classifier.to(features).T  # [B, C]
        similarities.append(scores.gather(1, chosen.to(scores.device)))
        probabilities.append((scale * scores).softmax(1).gather(1, chosen.to(scores.device)))
    similarity = torch.cat(similarities, 1)
    fractions = torch.tensor(sizes, dtype=similarity.dtype, device=similarity.device) / cells
    return Curve(fractions, similarity, torch.cat(probabilities, 1))


def _filled(images: Tensor, fill: Fill | Tensor) -> Tensor:
    if isinstance(fill, Tensor):
        try:
            return fill.to(images).expand_as(images)
        except RuntimeError:
            raise InputError(
                f"fill has shape {list(fill.shape)}, which does not broadcast to {list(images.shape)}"
            ) from None
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if fill == "blur":
        coarse = F.adaptive_avg_pool2d(images, _BLUR)
        return F.interpolate(coarse, size=images.shape[2:], mode="bilinear", align_corners=False)
    raise InputError(f"fill is {fill!r}: choose from {', '.join(get_args(Fill))}, or give pixels")


def _check(images: Tensor, heat: Tensor, classifier: Tensor, targets: Tensor, steps: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images is {images.dtype} {list(images.shape)}, expected floating [B, 3, height, width]")
    count, _, height, width = images.shape
    if heat.ndim != 3 or heat.shape[0] != count:
        raise InputError(f"heat has shape {list(heat.shape)}, expected [{count}, rows, columns]")
    _, rows, columns = heat.shape
    if not rows or not columns or height % rows or width % columns:
        raise InputError(f"{rows} × {columns} cells do not divide images of {height} × {width} pixels evenly")
    if not bool(heat.isfinite().all()):
        raise InputError("heat has values that are not finite")
    if classifier.ndim != 2 or not len(classifier):
        raise InputError(f"the classifier has shape {list(classifier.shape)}, expected [classes, embed_dim]")
    if targets.shape != (count,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise InputError(f"targets is {targets.dtype} {list(targets.shape)}, expected integers [{count}]")
    if count and (int(targets.min()) < 0 or int(targets.max()) >= len(classifier)):
        raise InputError(
            f"targets go from {int(targets.min())} to {int(targets.max())}: there are {len(classifier)} classes"
        )
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1")
