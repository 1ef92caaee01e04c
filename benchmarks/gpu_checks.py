"""What a forward's result must agree with before it is timed on a GPU: rows of the timed result against float64.

Every error is the norm of a difference over the norm of the right result, per group of entries: per head, per image,
per text. The largest group counts. So results of zeros have an error of 1, however small a head's share of the
embedding is. What is nearly the same everywhere says little when it is right: attention weights of random weights are
all about 1/N, and maps share a constant. Both are compared about their means as well.

The first and the last rows of the timed result itself are compared. The bound is :data:`FACTOR` times the error that
the same decomposition has in the same dtype in plain torch, so it follows from the dtype and the model alone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

import clipfast
from clipfast.bench.inputs import unit
from clipfast.bench.measuring import Check
from clipfast.contributions import Contributions

FACTOR = 2.0
"""How many times the error of plain torch in the same dtype a result may have."""
WITNESSES = 2
"""Rows at the start and rows at the end of a batch that are compared."""
SUM = 2e-2
"""Largest difference of the sum of all terms, of norm 1, from the embedding in 16 bits, as in the tests."""

Parts = Mapping[str, Tensor]
"""Results by name: heads ``[B, L, H, D]``, attention ``[B, L, H, N]``, maps ``[B, N, T]``, embedding ``[B, D]``."""


def rows(batch: int, count: int = WITNESSES) -> list[int]:
    """The first and the last rows of a batch, each once."""
    return sorted({*range(min(count, batch)), *range(max(0, batch - count), batch)})


def grouped(actual: Tensor, expected: Tensor, kept: Sequence[int] = ()) -> float:
    """The largest relative norm of the difference over groups of entries.

    Args:
        actual: the result.
        expected: what it should be, of the same shape.
        kept: axes whose entries are groups of their own; without any, all entries are one group.

    Returns:
        NaN where the shapes differ, a value is not finite, or a group of ``expected`` is zero.
    """
    if actual.shape != expected.shape:
        return float("nan")
    actual, expected = actual.double(), expected.double()
    summed = [axis for axis in range(expected.ndim) if axis not in kept]
    wrong, right = ((part.square().sum(summed)).sqrt() for part in (actual - expected, expected))
    share = wrong / right
    return float(share.max()) if bool(share.isfinite().all()) else float("nan")


def _about(tensor: Tensor, axis: int) -> Tensor:
    return tensor - tensor.mean(axis, keepdim=True)


METRICS: Mapping[str, Mapping[str, Callable[[Tensor, Tensor], float]]] = {
    "heads": {
        "per head": lambda a, e: grouped(a, e, (1, 2)),
        "per image and layer": lambda a, e: grouped(a, e, (0, 1)),
    },
    "attention": {
        "about its mean, per head": lambda a, e: grouped(_about(a, -1), _about(e, -1), (1, 2)),
        "per image and layer": lambda a, e: grouped(a, e, (0, 1)),
    },
    "maps": {
        "per image": lambda a, e: grouped(a, e, (0,)),
        "per text": lambda a, e: grouped(a, e, (2,)),
        "about their mean over tokens, per image": lambda a, e: grouped(_about(a, 1), _about(e, 1), (0,)),
    },
    "embedding": {"per image": lambda a, e: grouped(unit(a.double()), unit(e.double()), (0,))},
}
"""Errors by part: a name and a function of the actual and the expected rows."""


def errors(actual: Parts, expected: Parts) -> dict[tuple[str, str], float]:
    """Every error of the parts that both have, by part and name."""
    return {
        (part, name): error(actual[part].to(expected[part].device), expected[part])
        for part, named in METRICS.items()
        if part in actual and part in expected
        for name, error in named.items()
    }


def parts_of(contributions: Contributions, heads: Tensor | None = None) -> dict[str, Tensor]:
    """A decomposition's results by name.

    Args:
        contributions: the decomposition.
        heads: as they were timed, where they were; formed from the contributions for None.
    """
    parts = {
        "heads": contributions.heads() if heads is None else heads,
        "embedding": contributions.embedding,
    }
    if "attention" in contributions.kept:
        parts["attention"] = contributions.attention
    if "maps" in contributions.kept:
        parts["maps"] = contributions.maps
    return parts


@dataclass(frozen=True)
class Witness:
    """Rows of a batch decomposed in float64, with the bounds that follow from the dtype.

    Attributes:
        rows: which rows of the batch.
        expected: the results of these rows in float64.
        bounds: largest error accepted, by part and name.
    """

    rows: tuple[int, ...]
    expected: Parts
    bounds: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, module: nn.Module, images: Tensor, texts: Tensor) -> "Witness":
        """Decomposes the first and last rows in float64, and in the model's dtype in plain torch.

        Args:
            module: the model as it is timed.
            images: the timed batch, ``[B, 3, height, width]``.
            texts: ``[T, D]``, of the maps.
        """
        chosen = rows(len(images))
        few = images[chosen]
        visual = cast(nn.Module, cast(Any, module).visual)
        double = clipfast.wrap(copy.deepcopy(visual).double(), backend="eager")
        expected = parts_of(_everything(double, few.double(), texts.double()))
        low = parts_of(_everything(clipfast.wrap(visual, backend="eager"), few, texts))
        bounds = {key: FACTOR * error for key, error in errors(low, expected).items()}
        return cls(tuple(chosen), expected, bounds)

    def checks(self, parts: Parts, what: str = "") -> list[Check]:
        """One check per error of the results of the whole batch.

        Args:
            parts: results by name, of all rows of the batch.
            what: whose results, before the names of the checks.
        """
        few = {name: part[list(self.rows)] for name, part in parts.items()}
        return [
            Check(f"{what}{part} against float64, {name}", error, self.bounds[part, name])
            for (part, name), error in errors(few, self.expected).items()
        ]


def _everything(model: clipfast.Model, images: Tensor, texts: Tensor) -> Contributions:
    return model.decompose(images, attention=True, texts=texts, maps="summed")


def check_decomposed(witness: Witness, contributions: Contributions, heads: Tensor | None = None) -> list[Check]:
    """The checks of a decomposition of the timed batch: rows against float64, and the sum of all its terms."""
    return [
        *witness.checks(parts_of(contributions, heads)),
        Check("max_error() of the whole batch", contributions.max_error(), SUM),
    ]


def check_plain(witness: Witness, embedding: Tensor) -> list[Check]:
    """The checks of the plain forward's embedding ``[B, D]``: it is the same sum in the same dtype."""
    return witness.checks({"embedding": embedding}, "plain ")
