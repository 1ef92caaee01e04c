"""The images that score highest for each head and text, and random ones beside them, from one pass over the images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from clipfast.analyses.ranking import largest
from clipfast.errors import InputError


@dataclass(frozen=True)
class Shown:
    """An image to show for a head and a text.

    Attributes:
        image: its number in the data set.
        score: of the head along the text.
        name: the name that was pushed with it, if any.
    """

    image: int
    score: float
    name: str | None


class Tops:
    """Streaming, mergeable: the ``count`` images with the largest score per (head, text), and a random sample.

    >>> tops = Tops(10)
    >>> for batch in batches:
    ...     tops.push(head_scores(model.decompose(batch), spans))
    >>> tops.best(0, 2)[0].image, [shown.score for shown in tops.sample(0, 2)]

    The result does not depend on batches, shards or the order in which they are merged: of equal scores the lower image
    comes first, and the sample is the images whose hash with the seed is smallest (bottom-k sampling), uniform without
    replacement. Every image is to be pushed once.

    Args:
        count: best images per head and text.
        random: size of the random sample, the same images for every head and text.
        seed: another seed, another sample.

    Attributes:
        seen: images pushed.
    """

    def __init__(self, count: int = 10, random: int = 10, seed: int = 0) -> None:
        if count < 1 or random < 0:
            raise InputError(f"count is {count} and random is {random}: expected at least 1 and at least 0")
        self.count = count
        self.random = random
        self.seed = seed
        self.seen = 0
        self._scores: Tensor | None = None  # [G, T, ≤ count], largest first
        self._images = torch.zeros(0, dtype=torch.long)  # the same
        self._drawn: dict[int, Tensor] = {}  # image → its scores [G, T], by ascending hash
        self._names: dict[int, str] = {}

    def push(self, scores: Tensor, images: Sequence[int] | None = None, names: Sequence[str] | None = None) -> None:
        """Adds a batch.

        Args:
            scores: ``[B, G, T]``.
            images: the number of each image in the data set; default counted on from those pushed before.
            names: of the images, to be handed back with those kept.

        Raises:
            InputError: shapes or lengths that do not fit, scores that are not finite, or an image that was pushed
                before (noticed only if it is among those kept).
        """
        if scores.ndim != 3 or (self._scores is not None and scores.shape[1:] != self._scores.shape[:2]):
            expected = ["images", "heads", "texts"] if self._scores is None else ["images", *self._scores.shape[:2]]
            raise InputError(f"scores have shape {list(scores.shape)}, expected [{', '.join(map(str, expected))}]")
        numbers = list(range(self.seen, self.seen + len(scores)) if images is None else images)
        if len(numbers) != len(scores) or len(set(numbers)) != len(numbers):
            raise InputError(f"{len(set(numbers))} different images for {len(scores)} rows of scores: give one each")
        if names is not None and len(names) != len(scores):
            raise InputError(f"{len(names)} names for {len(scores)} images: give one per image")
        if not len(scores):
            return
        if not bool(scores.isfinite().all()):
            raise InputError("a score is not finite: the image or a weight is not, or an embedding is zero")
        scores_on_cpu = scores.detach().cpu()
        places = torch.tensor(numbers, dtype=torch.long)
        order = places.argsort()
        values, positions = largest(scores_on_cpu[order].permute(1, 2, 0), self.count)
        self._refuse(numbers)
        self._draw(dict(zip(numbers, scores_on_cpu, strict=True)))
        self._take(values, places[order][positions])
        if names is not None:
            self._names |= dict(zip(numbers, names, strict=True))
        self.seen += len(scores)
        self._forget()

    def merge(self, other: "Tops") -> None:
        """Adds what another collected from other images.

        Raises:
            InputError: other sizes, seed, heads or texts, or an image that both have seen
                (noticed only if it is among those kept).
        """
        if (self.count, self.random, self.seed) != (other.count, other.random, other.seed):
            raise InputError("only tops of the same count, sample size and seed can be merged")
        if other._scores is None:
            return
        if self._scores is not None and self._scores.shape[:2] != other._scores.shape[:2]:
            raise InputError(f"these tops are of {list(other._scores.shape[:2])} heads and texts, not of the same")
        self._refuse(other._kept())
        self._draw(other._drawn)
        self._take(other._scores, other._images)
        self._names |= other._names
        self.seen += other.seen
        self._forget()

    def _kept(self) -> set[int]:
        """Images that are shown somewhere."""
        return {*self._drawn, *self._images.unique().tolist()}

    def _refuse(self, images: Iterable[int]) -> None:
        again = self._kept().intersection(images)
        if again:
            raise InputError(f"image {min(again)} was pushed before: give every image a number of its own")

    def _draw(self, images: dict[int, Tensor]) -> None:
        """Keeps the images with the smallest hashes."""
        best = sorted([*self._drawn, *images], key=lambda image: (self._hash(image), image))[: self.random]
        self._drawn = {image: self._drawn[image] if image in self._drawn else images[image].clone() for image in best}

    def _hash(self, image: int) -> bytes:
        return blake2b(f"{self.seed}:{image}".encode(), digest_size=8).digest()

    def _take(self, scores: Tensor, images: Tensor) -> None:
        """Merges the best, ``[G, T, ·]``, with those kept; of equal scores the lower image stays first."""
        if self._scores is not None:
            scores, images = torch.cat([self._scores.to(scores), scores], 2), torch.cat([self._images, images], 2)
        images, order = images.sort(dim=2)
        self._scores, positions = largest(scores.gather(2, order), self.count)
        self._images = images.gather(2, positions)

    def _forget(self) -> None:
        """Drops the names of images that are shown nowhere."""
        if self._names:
            shown = self._kept()
            self._names = {image: name for image, name in self._names.items() if image in shown}

    @property
    def images(self) -> Tensor:
        """The best images, ``[G, T, k]``, largest score first; k is ``count`` or fewer where fewer were seen."""
        self._expect()
        return self._images

    @property
    def scores(self) -> Tensor:
        """Their scores, ``[G, T, k]``."""
        return self._expect()

    def _expect(self) -> Tensor:
        if self._scores is None:
            raise InputError("no scores were pushed yet")
        return self._scores

    def best(self, head: int, text: int) -> list[Shown]:
        """The best images of a head and a text, by their places in the scores, largest score first.

        Raises:
            InputError: nothing was pushed, or no such head or text.
        """
        self._check(head, text)
        rows = zip(self.images[head, text].tolist(), self.scores[head, text].tolist(), strict=True)
        return [Shown(image, score, self._names.get(image)) for image, score in rows]

    def sample(self, head: int, text: int) -> list[Shown]:
        """The random images with their scores for a head and a text, in random order.

        Raises:
            InputError: nothing was pushed, or no such head or text.
        """
        self._check(head, text)
        rows = ((image, float(scores[head, text])) for image, scores in self._drawn.items())
        return [Shown(image, score, self._names.get(image)) for image, score in rows]

    def _check(self, head: int, text: int) -> None:
        heads, texts = self._expect().shape[:2]
        if not (0 <= head < heads and 0 <= text < texts):
            raise InputError(f"no head {head} and text {text}: there are {heads} heads and {texts} texts")
