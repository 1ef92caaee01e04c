"""Zero-shot segmentation: from scores of patches to heat, masks and labels, and how good they are.

The method of arXiv 2310.05916, section 5.3: maps summed over layers and heads without the class token, the map of one
class less the mean over all classes, enlarged to the image, negative values cut off, spread to [0, 1] per image, and
cut at the mean. Ground truth comes from :mod:`.groundtruth`; other methods' scores from :mod:`.relevance`.

``B`` images, ``T`` texts, ``K`` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.contributions import Contributions
from clipfast.errors import InputError

IGNORE: Final = -1
"""The label of pixels that count for nothing."""


# ------------------------------------------------------------------------------------------------- heat, masks, labels


def predicted(contributions: Contributions, text_features: Tensor) -> Tensor:
    """The class every image is taken for, ``[B]``: the text ``[T, D]`` that its whole embedding is nearest to.

    Raises:
        InputError: features of another width.
    """
    width = contributions.embedding.shape[1]
    if text_features.ndim != 2 or text_features.shape[1] != width:
        raise InputError(f"text_features has shape {list(text_features.shape)}, expected [texts, {width}]")
    embedding = contributions.embedding.to(contributions.norm.dtype)
    return (embedding @ text_features.to(embedding).T).argmax(1)


def heat(
    maps: Tensor,
    target: int | Sequence[int] | Tensor,
    image_size: tuple[int, int],
    *,
    contrast: bool = True,
    clip: bool = True,
) -> Tensor:
    """How much every pixel speaks for a class rather than for the classes at large, from 0 to 1 in each image.

    Args:
        maps: ``[B, rows, columns, T]``, :meth:`clipfast.Contributions.patch_maps` summed over layers and heads.
        target: the class, an index of a text: one for all images, or one for each, as :func:`predicted` gives them.
        image_size: height and width of the model's input.
        contrast: subtract the mean over all texts.
        clip: cut off negative values before spreading to [0, 1].

    Returns:
        ``[B, height, width]``.

    Raises:
        InputError: maps of another shape or not finite, no such text, or a mean over one text only.
    """
    maps = _check_maps(maps, contrast)
    images, texts = maps.shape[0], maps.shape[3]
    index = torch.as_tensor(target, device=maps.device)
    if index.is_floating_point() or index.dtype == torch.bool or index.shape not in ((), (images,)):
        raise InputError(f"target is {index.dtype} {list(index.shape)}, expected a text's index, or one for each image")
    wrong = index[(index < 0) | (index >= texts)]
    if len(wrong.view(-1)):
        raise InputError(f"target {int(wrong.view(-1)[0])} does not exist: texts are 0 to {texts - 1}")
    index = index.long().expand(images)
    chosen = maps[torch.arange(images, device=maps.device), :, :, index]
    return normalise(chosen - maps.mean(3) if contrast else chosen, image_size, clip=clip)


def normalise(scores: Tensor, image_size: tuple[int, int], *, clip: bool = True) -> Tensor:
    """Scores of patches as heat: enlarged bilinearly, negative values cut off, spread from 0 to 1 in each image.

    What every method's scores go through, :mod:`.relevance` too. An image whose scores are all alike is 0 throughout.

    Args:
        scores: ``[B, rows, columns]``.
        image_size: height and width of the model's input.
        clip: cut off negative values.

    Returns:
        ``[B, height, width]``.

    Raises:
        InputError: scores of another shape, or not finite.
    """
    if scores.ndim != 3 or not scores.is_floating_point():
        raise InputError(f"scores is {scores.dtype} {list(scores.shape)}, expected floating [images, rows, columns]")
    scores = _check_finite("scores", scores)
    enlarged = _enlarge(scores[:, None], image_size)[:, 0]
    return _spread(enlarged.clamp_min(0) if clip else enlarged)


def masks(heat: Tensor, threshold: float | Literal["mean"] = "mean") -> Tensor:
    """Which pixels are above a threshold, ``[B, height, width]`` bool.

    Args:
        heat: ``[B, height, width]``.
        threshold: a heat from 0 to 1, or ``"mean"``: each image's own mean.

    Raises:
        InputError: heat of another shape, or a threshold that is neither.
    """
    if heat.ndim != 3 or not heat.is_floating_point():
        raise InputError(f"heat is {heat.dtype} {list(heat.shape)}, expected floating point [images, height, width]")
    if threshold == "mean":
        return heat > heat.mean((1, 2), keepdim=True)
    return heat > _check_threshold("threshold", threshold)


def classes(maps: Tensor, image_size: tuple[int, int], background: float | None = None) -> Tensor:
    """The text that speaks most for every pixel, ``[B, height, width]`` int64.

    Args:
        maps: ``[B, rows, columns, T]``, :meth:`clipfast.Contributions.patch_maps` summed over layers and heads.
        image_size: height and width of the model's input.
        background: where the winner's heat (its map less the mean over all texts, spread from 0 to 1 in the image) is
            not above this, the pixel is background, which has the label ``T``. None for no background.

    Raises:
        InputError: maps of another shape or not finite, or a background that is not from 0 to 1.
    """
    maps = _check_maps(maps, contrast=background is not None)
    enlarged = _enlarge(maps.permute(0, 3, 1, 2), image_size)  # [B, T, height, width]
    best, label = enlarged.max(1)
    if background is None:
        return label
    winner = _spread((best - enlarged.mean(1)).clamp_min(0))
    return label.masked_fill(winner <= _check_threshold("background", background), maps.shape[3])


def _enlarge(maps: Tensor, image_size: tuple[int, int]) -> Tensor:
    """``[B, C, rows, columns] → [B, C, height, width]``."""
    return F.interpolate(maps, size=image_size, mode="bilinear", align_corners=False)


def _spread(heat: Tensor) -> Tensor:
    """From 0 to 1 in every image; 0 where it is the same throughout."""
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    span = high - low
    return (heat - low) / torch.where(span > 0, span, 1)


def _check_maps(maps: Tensor, contrast: bool) -> Tensor:
    """Maps ``[B, rows, columns, T]`` in float32 at least, or an :class:`InputError`."""
    if maps.ndim != 4 or not maps.is_floating_point():
        hint = ": sum over layers and heads first" if maps.ndim == 6 else " as Contributions.patch_maps() gives them"
        raise InputError(f"maps is {maps.dtype} {list(maps.shape)}, expected [images, rows, columns, texts]{hint}")
    if not maps.shape[3]:
        raise InputError("maps has no texts")
    if contrast and maps.shape[3] == 1:
        raise InputError("one text less the mean over one text is nothing: give more texts, or no contrast")
    return _check_finite("maps", maps)


def _check_finite(name: str, values: Tensor) -> Tensor:
    """Values in float32 at least, or an :class:`InputError` where one is not finite."""
    if not bool(values.isfinite().all()):
        first = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"{name} has values that are not finite, first in image {first}")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_threshold(name: str, value: float | str) -> float:
    if isinstance(value, str) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}, expected a heat from 0 to 1" + (' or "mean"' * (name == "threshold")))
    return float(value)


# --------------------------------------------------------------------------------------------------------------- scores


@dataclass
class ClassScores:
    """How well labels agree with the truth, over any number of batches.

    Intersections and unions are summed over all images first and divided then, as the field does it; a class in which
    neither labels nor truth have a pixel has no IoU, and no part in the mean.

    Attributes:
        count: how many classes, ``K``.
        ignore: truth of this label is left out.
        confusion: ``[K, K]`` pixels by true class and by predicted class.
    """

    count: int
    ignore: int = IGNORE
    confusion: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.count < 1 or 0 <= self.ignore < self.count:
            raise InputError(f"{self.count} classes with {self.ignore} to ignore: expected classes, and another label")
        self.confusion = torch.zeros(self.count, self.count, dtype=torch.int64)

    def update(self, labels: Tensor, truth: Tensor) -> None:
        """Adds a batch.

        Args:
            labels: ``[B, height, width]``, 0 to ``K − 1``.
            truth: the same, and ``ignore``.

        Raises:
            InputError: shapes that differ, or labels that are none.
        """
        labels, truth = _integers("labels", labels), _integers("truth", truth).to(labels.device)
        if labels.shape != truth.shape:
            raise InputError(f"labels has shape {list(labels.shape)}, truth {list(truth.shape)}")
        kept = truth != self.ignore
        for name, values in (("labels", labels[kept]), ("truth", truth[kept])):
            wrong = values[(values < 0) | (values >= self.count)]
            if len(wrong):
                unknown = sorted({int(value) for value in wrong.unique()[:5]})
                raise InputError(f"{name} has {unknown}: expected 0 to {self.count - 1}, or {self.ignore} to ignore")
        pairs = truth[kept] * self.count + labels[kept]
        self.confusion += torch.bincount(pairs, minlength=self.count**2).view(self.count, self.count).cpu()

    def merge(self, other: "ClassScores") -> None:
        """Adds another's pixels.

        Raises:
            InputError: scores of other classes.
        """
        if (self.count, self.ignore) != (other.count, other.ignore):
            raise InputError(f"scores of {other.count} classes cannot be added to scores of {self.count}")
        self.confusion += other.confusion

    @property
    def iou(self) -> Tensor:
        """Intersection over union of every class, ``[K]`` float64; NaN for a class that never occurs."""
        both = self.confusion.diagonal().double()
        return both / (self.confusion.sum(0) + self.confusion.sum(1) - both)

    @property
    def mean_iou(self) -> float:
        """Mean of :attr:`iou` over the classes that occur; NaN before the first pixel."""
        return float(self.iou.nanmean())

    @property
    def accuracy(self) -> float:
        """Share of pixels that are right; NaN before the first pixel."""
        return float(self.confusion.diagonal().sum().double() / self.confusion.sum())


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Average precision ``Σ_k (R_k − R_{k−1}) P_k`` of a ranking, over its distinct scores from the highest down.

    ``P_k`` and ``R_k`` are precision and recall of all that scores at least the k-th value: what ties enters together,
    so the order of equal scores does not matter.

    Args:
        scores: ``[P]``.
        truth: ``[P]`` bool.

    Returns:
        From 0 to 1; NaN where nothing is true.
    """
    values, order = scores.sort(descending=True)
    last = torch.ones_like(truth)
    last[:-1] = values[1:] != values[:-1]  # the end of a run of equal scores
    ends = last.nonzero()[:, 0]
    hits = truth[order].cumsum(0)[ends].double()  # true ones among the first ends + 1
    gained = hits.diff(prepend=hits.new_zeros(1))
    return float((gained * hits / (ends + 1)).sum() / truth.sum())


@dataclass
class Scores:
    """How well heat finds the foreground, over any number of batches, as the field scores ImageNet-segmentation.

    Accuracy and mIoU are those of :func:`masks`: pixels, intersections and unions are summed over the data set, and the
    mIoU is the mean of the IoU of background and foreground. mAP is the mean over images of the average precision of
    their heat; images without foreground have none and are left out of it.

    Attributes:
        threshold: a heat from 0 to 1, or ``"mean"``: each image's own.
        pixels: background (0) and foreground (1) as :class:`ClassScores`.
        images: images seen.
        ranked: how many of them have an average precision.
    """

    threshold: float | Literal["mean"] = "mean"
    pixels: ClassScores = field(default_factory=lambda: ClassScores(2), init=False)
    images: int = field(default=0, init=False)
    ranked: int = field(default=0, init=False)
    _precision: float = field(default=0.0, init=False, repr=False)
    _both: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.threshold != "mean":
            _check_threshold("threshold", self.threshold)

    def update(self, heat: Tensor, truth: Tensor) -> None:
        """Adds a batch.

        Args:
            heat: ``[B, height, width]`` from 0 to 1.
            truth: ``[B, height, width]`` bool, or integers: 0 background, 1 foreground, :data:`IGNORE` for neither.

        Raises:
            InputError: shapes that differ, heat that is not from 0 to 1, or another label.
        """
        predicted = masks(heat, self.threshold)
        if not bool(((heat >= 0) & (heat <= 1)).all()):
            raise InputError("heat is not from 0 to 1 throughout: give what heat() or normalise() return")
        truth = (truth.long() if truth.dtype == torch.bool else truth).to(heat.device)
        self.pixels.update(predicted.long(), truth)
        self.images += len(heat)
        for scores, labels in zip(heat.double(), truth, strict=True):
            kept = labels != IGNORE
            ranking, foreground = scores[kept], labels[kept] == 1
            if bool(foreground.any()):
                self.ranked += 1
                self._precision += average_precision(ranking, foreground)
                self._both += average_precision(torch.cat([1 - ranking, ranking]), torch.cat([~foreground, foreground]))

    def merge(self, other: "Scores") -> None:
        """Adds another's images.

        Raises:
            InputError: scores at another threshold.
        """
        if self.threshold != other.threshold:
            raise InputError(f"scores at threshold {other.threshold} cannot be added to scores at {self.threshold}")
        self.pixels.merge(other.pixels)
        self.images += other.images
        self.ranked += other.ranked
        self._precision += other._precision
        self._both += other._both

    @property
    def accuracy(self) -> float:
        """Share of pixels whose mask is right; NaN before the first image."""
        return self.pixels.accuracy

    @property
    def mean_iou(self) -> float:
        """Mean of the IoU of background and of foreground; NaN before the first image."""
        return self.pixels.mean_iou

    @property
    def mean_ap(self) -> float:
        """Mean average precision of the heat as a score of the foreground; NaN before the first image."""
        return self._precision / self.ranked if self.ranked else float("nan")

    @property
    def mean_ap_both(self) -> float:
        """The same with both classes in one ranking, background scored ``1 − heat``.

        Tables of ImageNet-segmentation commonly call this mAP. It is mostly far higher than :attr:`mean_ap`, as it also
        rewards background that is cold: compare each with its like.
        """
        return self._both / self.ranked if self.ranked else float("nan")


def _integers(name: str, labels: Tensor) -> Tensor:
    if labels.ndim != 3 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"{name} is {labels.dtype} {list(labels.shape)}, expected integers [images, height, width]")
    return labels.long()
