"""``clipfast explain --over COLLECTION``: what images and texts both know of each concept, over a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.knowledge import Knowledge
from clipfast.dataset import opening
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.report.shares import rounded

_SHOWN = 12


@dataclass(frozen=True)
class Shared:
    """Mutual information of concepts over a collection.

    Attributes:
        collection: its folder.
        images: how many it has.
        share: how much of what the classes' texts know of the concepts the images know, from 0 to 1.
        texts: the concepts.
        bits: of each, what its presence in an image tells of its presence in the class's text.
        possible: of each, the entropy of its presence in the class's text: the most that there can be.
    """

    collection: Path
    images: int
    share: float
    texts: Sequence[str]
    bits: Sequence[float]
    possible: Sequence[float]

    def title(self) -> str:
        """What the table is about, on one line."""
        return (
            f"bits that images and classes share, over {self.images} images of {self.collection} "
            f"({self.share:.0%} of what the classes' texts know)"
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """The concepts that are shared most: text, bits, bits that there can be."""
        order = sorted(range(len(self.texts)), key=lambda place: -self.bits[place])[:_SHOWN]
        return [(self.texts[place], f"{self.bits[place]:.3f}", f"{self.possible[place]:.3f}") for place in order]

    def to_json(self) -> dict[str, Any]:
        """All concepts, in the order of the pool."""
        return {
            "collection": str(self.collection),
            "images": self.images,
            "share": rounded(self.share),
            "texts": [
                {"text": text, "bits": rounded(bits), "possible": rounded(possible)}
                for text, bits, possible in zip(self.texts, self.bits, self.possible, strict=True)
            ],
        }


HEADERS = ("text", "bits", "of at most")


class Embeddings:
    """The embeddings of a collection.

    Args:
        folder: that ``clipfast collect`` wrote.

    Raises:
        InputError: no such collection, an unfinished one, or one without embeddings.
    """

    def __init__(self, folder: Path) -> None:
        self._data = opening.open(folder)
        if "embeddings" not in self._data.names:
            raise InputError(
                f"{folder} holds no embeddings: collect the images without --no-embeddings and --moments-only"
            )

    def shared(self, model: Model, pool: Tensor, texts: Sequence[str], classifier: Tensor) -> Shared:
        """Counts concepts in every image; its class is the one that the model predicts.

        Args:
            model: that the collection is of.
            pool: ``[T, D]``, text features of the concepts.
            texts: the concepts.
            classifier: ``[C, D]``.

        Raises:
            InputError: a collection of another model.
        """
        data = self._data
        if data.manifest.settings.model["weights"] != model.fingerprint():
            raise InputError(f"{data.folder} is of another model: collect its images with {model.name}, too")
        mean = sum((F.normalize(part, dim=1).sum(0) for part in self._parts()), torch.zeros(pool.shape[1])) / len(data)
        knowledge = Knowledge(pool.float().cpu(), classifier.float().cpu(), mean=mean)
        for part in self._parts():
            knowledge.update(part)
        bits, possible = knowledge.shared().tolist(), knowledge.known_to_texts().tolist()
        return Shared(data.folder, len(data), knowledge.share(), list(texts), bits, possible)

    def _parts(self) -> Iterator[Tensor]:
        """Blocks of embeddings, ``[images, D]`` float32."""
        return (torch.from_numpy(self._data.read("embeddings", rows)).float() for rows in self._data.blocks())
