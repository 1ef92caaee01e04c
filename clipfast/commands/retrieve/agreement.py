"""How often the nearest images have the label of the query: by each head, and by the whole embedding."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.retrieval import Index, Measure, comparable, nearest_rows
from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError
from clipfast.report.shares import rounded

Head = tuple[int, int]
_BYTES = 1 << 30
"""Memory for the outputs of heads that are judged in one pass over a collection."""


@dataclass(frozen=True)
class LabelQueries:
    """The labels of images, and the images whose neighbours are looked up.

    Attributes:
        labels: ``[N]``, as numbers.
        positions: ``[Q]``, of the queries, spread evenly over the images.
        top: neighbours that count.
        chance: the share of neighbours that would have the query's label if they were drawn at random: the mean over
            the queries of (images with the label − 1) / (images − 1).
        names: of the labels.
    """

    labels: Tensor
    positions: Tensor
    top: int
    chance: float
    names: tuple[str, ...]

    @classmethod
    def of(cls, collection: Collection, top: int, most: int) -> "LabelQueries":
        """The labelled images of a collection, at most ``most`` of them as queries.

        Raises:
            InputError: fewer than two labels.
        """
        values = [entry.label for entry in collection.entries if entry.label is not None]
        counts = Counter(values)
        if len(counts) < 2:
            raise InputError(f"all labelled images have the label {values[0]!r}: give labels with two values or more")
        names = tuple(sorted(counts))
        count = min(most, len(values))
        positions = [place * len(values) // count for place in range(count)]
        chance = sum(counts[values[place]] - 1 for place in positions) / (count * (len(values) - 1))
        labels = torch.tensor([names.index(value) for value in values])
        return cls(labels, torch.tensor(positions), min(top, len(values) - 1), chance, names)

    def share(self, neighbours: Tensor) -> float:
        """The share of neighbours ``[Q, k]`` that have their query's label."""
        same = self.labels[neighbours.cpu()] == self.labels[self.positions][:, None]
        return float(same.double().mean())


def labelled_parts(collection: Collection) -> Iterator[Contributions]:
    """The contributions of the labelled images, a file at a time."""
    for entries, contributions in collection.batches(without_terms=True):
        rows = [row for row, entry in enumerate(entries) if entry.label is not None]
        if rows:
            yield contributions if len(rows) == len(entries) else contributions.select(rows)


def embedding_share(collection: Collection, queries: LabelQueries, measure: Measure, centred: bool) -> float:
    """The share for the whole embedding, compared as heads are."""
    rows = torch.cat(
        [F.normalize(contributions.embedding.float(), dim=1) for contributions in labelled_parts(collection)]
    )
    rows = comparable(rows, rows.double().mean(0) if centred else None, measure)
    with autocast_disabled(rows):
        return queries.share(nearest_rows(rows, rows[queries.positions], queries.top, queries.positions)[1])


def head_shares(
    collection: Collection,
    heads: Sequence[Head],
    queries: LabelQueries,
    measure: Measure,
    centred: bool,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """The share of every head on its own, as the JSON has it.

    The collection is read once for as many heads as fit in memory.

    Raises:
        InputError: only moments were kept, or a file is gone or damaged.
    """
    width = next(labelled_parts(collection)).codes.shape[-1] + 3
    together = max(_BYTES // (4 * width * len(queries.labels)), 1)
    for first in range(0, len(heads), together):
        some = heads[first : first + together]
        indices = [Index([head]) for head in some]
        for contributions in labelled_parts(collection):
            for index in indices:
                index.add(contributions)
        while indices:
            index = indices.pop(0)
            near = index.nearest(queries.positions.tolist(), queries.top, measure=measure, centred=centred)
            ((layer, head),) = index.heads
            yield {"layer": layer, "head": head, "share": rounded(queries.share(near.images))}
            advance(1)
