"""What the image encoder and the text encoder both know: mutual information of concepts over a data set.

A concept is a text. On the image's side it is present in an image whose embedding ranks it among the first of the pool;
on the text's side it is present in a class whose text embedding does. Over a data set both are discrete variables, and
their mutual information says, in bits, how much the presence of a concept in an image tells of the class, or of the
concept's presence in the class's text. The question is that of arXiv 2410.13016; the estimate is this project's own.

``B`` images, ``T`` texts, ``C`` classes, ``D`` embed_dim.
"""

from math import log
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.accuracy import check_integers
from clipfast.analyses.ranking import largest
from clipfast.contributions import Contributions
from clipfast.errors import InputError

TOP: Final = 0.1
"""The share of the pool that is present in an image or a class."""


def presence(features: Tensor, pool: Tensor, top: int, mean: Tensor | None = None) -> Tensor:
    """Which texts are present: the ``top`` of the pool with the highest cosine, ``[B, T]`` bool.

    Args:
        features: ``[B, D]``, of images or of classes.
        pool: ``[T, D]``; texts count less their mean.
        top: how many texts are present, of equal ones the first.
        mean: ``[D]``, taken off the normalised features: their mean over a data set, so that what all of them have in
            common does not count. None for nothing.

    Raises:
        InputError: shapes that do not fit, features that are not finite, or a number that is not between 1 and ``T``.
    """
    if pool.ndim != 2 or features.ndim != 2 or features.shape[1] != pool.shape[1]:
        raise InputError(f"features {list(features.shape)} and pool {list(pool.shape)} do not fit: [B, D] and [T, D]")
    if not 1 <= top <= len(pool):
        raise InputError(f"top is {top}, expected 1 to {len(pool)}: the texts of the pool")
    unit = F.normalize(features.to(torch.float64), dim=1)
    if not bool(unit.isfinite().all()):
        raise InputError("a feature is not finite")
    if mean is not None:
        unit = unit - mean.to(unit)
    texts = pool.to(unit)
    scores = unit @ F.normalize(texts - texts.mean(0), dim=1).T
    present = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return present.scatter_(1, largest(scores, top)[1], True)


class Knowledge:
    """Counts of concepts by class, a batch of images at a time, and what they tell.

    Args:
        pool: ``[T, D]``, unit rows.
        classifier: ``[C, D]``, unit rows of at least two classes.
        top: how many texts are present in an image and in a class; a tenth of the pool for None.
        mean: ``[D]``, the mean of the images' unit embeddings, taken off them; None for nothing. Without it, texts that
            are near to every image are present everywhere, and tell nothing.

    Attributes:
        top: as above.
        in_classes: ``[C, T]`` bool, which concepts are present in the text of each class.

    Raises:
        InputError: shapes that do not fit, fewer than two classes, or a number of texts that is not in the pool.
    """

    def __init__(self, pool: Tensor, classifier: Tensor, top: int | None = None, mean: Tensor | None = None) -> None:
        if classifier.ndim != 2 or len(classifier) < 2:
            raise InputError(f"the classifier has shape {list(classifier.shape)}, expected [classes, embed_dim]")
        self.top = max(1, round(TOP * len(pool))) if top is None else top
        unit = F.normalize(classifier.to(torch.float64), dim=1)
        self.in_classes = presence(unit, pool, self.top, unit.mean(0)).cpu()
        self._pool, self._classifier, self._mean = pool, unit, mean
        self._images = torch.zeros(len(classifier), dtype=torch.long)
        self._present = torch.zeros(len(classifier), len(pool), dtype=torch.long)

    @property
    def count(self) -> int:
        """Images seen."""
        return int(self._images.sum())

    def update(self, images: Contributions | Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            images: contributions, or features ``[B, D]`` of any length.
            labels: integers ``[B]``, the class of each; the predicted class for None.

        Raises:
            InputError: shapes that do not fit, values that are not finite, or a label that is no class.
        """
        features = images.embedding if isinstance(images, Contributions) else images
        present = presence(features, self._pool, self.top, self._mean).cpu()
        if labels is None:
            labels = (features.to(self._classifier) @ self._classifier.T).argmax(1)
        check_integers("labels", labels, len(features))
        labels = labels.cpu().long()
        classes = len(self._images)
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise InputError(f"labels go from {int(labels.min())} to {int(labels.max())}: there are {classes} classes")
        self._images += torch.bincount(labels, minlength=classes)
        self._present.index_add_(0, labels, present.long())

    def merge(self, other: "Knowledge") -> None:
        """Adds the images of another with the same pool and classes.

        Raises:
            InputError: other texts, classes or settings.
        """
        same = self.top == other.top and torch.equal(self.in_classes, other.in_classes)
        if not same or not torch.equal(self._pool, other._pool.to(self._pool)):
            raise InputError("counts of other texts or classes cannot be added")
        self._images += other._images
        self._present += other._present

    def with_class(self, corrected: bool = True) -> Tensor:
        """Bits that the presence of each concept in an image tells of its class, ``[T]`` float64.

        Args:
            corrected: subtract the bias that a finite number of images gives an estimate (Miller and Madow, 1955), so
                that an unrelated concept has 0 on average, and single ones a little less.

        Raises:
            InputError: no images.
        """
        return _information(self._table(), corrected)

    def shared(self, corrected: bool = True) -> Tensor:
        """Bits that the presence of each concept in an image tells of its presence in the class's text, ``[T]``.

        What both encoders know of a concept: 0 where the text's side never or always has it.

        Args:
            corrected: as for :meth:`with_class`.

        Raises:
            InputError: no images.
        """
        return _information(self._on_texts(), corrected)

    def known_to_texts(self) -> Tensor:
        """Bits that there are to know: the entropy of each concept's presence in the class's text, ``[T]`` float64.

        Raises:
            InputError: no images.
        """
        return _entropy(self._on_texts().sum(2).double() / self.count)

    def share(self, corrected: bool = True) -> float:
        """How much of what the texts know the images know, from 0 to 1: :meth:`shared` over :meth:`known_to_texts`.

        Both are summed over concepts. 0 where the texts know nothing.

        Args:
            corrected: as for :meth:`with_class`.

        Raises:
            InputError: no images.
        """
        whole = float(self.known_to_texts().sum())
        return float(self.shared(corrected).sum()) / whole if whole > 0 else 0.0

    def _table(self) -> Tensor:
        """Images by concept, class, and absence or presence in the image, ``[T, C, 2]``."""
        if not self.count:
            raise InputError("no images were counted")
        present = self._present.T
        return torch.stack([self._images - present, present], 2)

    def _on_texts(self) -> Tensor:
        """Images by concept, absence or presence in the class's text and in the image, ``[T, 2, 2]``."""
        table, there = self._table(), self.in_classes.T[:, :, None]
        return torch.stack([(table * ~there).sum(1), (table * there).sum(1)], 1)


def _entropy(shares: Tensor) -> Tensor:
    """Bits, over the last axis."""
    return -torch.special.xlogy(shares, shares).sum(-1) / log(2)


def _information(tables: Tensor, corrected: bool) -> Tensor:
    """Mutual information of rows and columns of tables of counts ``[T, R, S]``, ``[T]`` in bits."""
    count = int(tables[0].sum())
    shares = tables.to(torch.float64) / count
    bits = _entropy(shares.sum(2)) + _entropy(shares.sum(1)) - _entropy(shares.flatten(1))
    if not corrected:
        return bits.clamp_min(0)
    cells = [(part > 0).sum(-1).double() for part in (tables.flatten(1), tables.sum(2), tables.sum(1))]
    return bits - (cells[0] - cells[1] - cells[2] + 1) / (2 * count * log(2))
