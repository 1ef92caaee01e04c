"""What storing codes in float16 does to statistics: measured, on units whose exact moments are there as well.

The moments of a unit are sums of the codes as they were computed. The codes on the disk are rounded. Both are of the
same images, so the difference of what follows from them is the error of the rounding, and nothing else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.basis import Basis
from clipfast.dataset.arrays import UnitArrays
from clipfast.dataset.images_table import fine, read_images
from clipfast.dataset.manifest import Manifest, Record
from clipfast.dataset.merging import load_basis, unit_moments

IMAGES = 1000
"""Images that are enough: whole units are taken until there are as many."""
_ROWS = 512
_ZERO = 1e-9
"""A head with a smaller share of all heads' variance is left out: its variance is rounding itself."""


@dataclass(frozen=True)
class Rounding:
    """How far statistics of stored codes are from exact ones.

    Attributes:
        images: that were compared.
        dtype: of the stored codes.
        largest: the largest relative difference of a head's variance.
        layer: of the head that it is of.
        head: that it is of.
    """

    images: int
    dtype: str
    largest: float
    layer: int
    head: int

    def __str__(self) -> str:
        return f"codes in {self.dtype}: heads' variances differ by at most {100 * self.largest:.2g} %"


def rounding_error(manifest: Manifest, images: int = IMAGES) -> Rounding | None:
    """Compares the heads' variances that follow from stored codes with those of the moments of the same units.

    Args:
        manifest: of the collection.
        images: how many are enough.

    Returns:
        None where codes are not kept, or no unit has two images.

    Raises:
        InputError: a file is gone or damaged.
    """
    dtype = manifest.settings.kept.get("codes")
    if dtype is None:
        return None
    basis = load_basis(manifest.folder)
    exact: Moments | None = None
    stored: _Variances | None = None
    for record in _sample(manifest, images):
        moments = unit_moments(manifest, record, basis)
        assert moments is not None  # the record counts images
        if exact is None or stored is None:
            exact, stored = moments, _Variances(basis, moments.layers)
        else:
            exact.merge(moments)
        for codes, mean, std, norm in _rows(manifest, record):
            stored.update(codes, mean, std, norm)
    if exact is None or stored is None:
        return None
    expected = torch.stack([exact.covariance(*head).trace() for head in exact.heads()])
    differences = ((stored.variances().flatten() - expected).abs() / expected).where(
        expected > _ZERO * expected.sum(), torch.zeros_like(expected)
    )
    place = int(differences.argmax())
    return Rounding(exact.count, dtype, float(differences[place]), *exact.heads()[place])


def _sample(manifest: Manifest, images: int) -> Iterator[Record]:
    """Finished units with at least two images, until there are enough images."""
    taken = 0
    for record in manifest.records():
        if taken >= images:
            return
        if record.count > 1:
            taken += record.count
            yield record


def _rows(manifest: Manifest, record: Record) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Codes, μ, σ and norms of a unit's images, some hundred at once."""
    folder = manifest.data / record.folder
    table = fine(read_images(folder, record, ["status", "mean", "std", "norm"]))
    numbers = [torch.tensor(table.column(name).to_pylist(), dtype=torch.float64) for name in ("mean", "std", "norm")]
    arrays = UnitArrays(folder, record)
    for start in range(0, record.count, _ROWS):
        rows = slice(start, min(start + _ROWS, record.count))
        mean, std, norm = (column[rows] for column in numbers)
        yield torch.from_numpy(arrays.read("codes", rows)), mean, std, norm


class _Variances:
    """Variance of what every head adds, from codes, in float64.

    Args:
        basis: of the codes.
        layers: that they are of.
    """

    def __init__(self, basis: Basis, layers: Iterable[int]) -> None:
        self._gram = torch.stack([_gram(basis, layer) for layer in layers])  # [L, H, X, X]
        self._centre: Tensor | None = None
        self._count = 0
        self._total = torch.zeros(self._gram.shape[:3], dtype=torch.float64)
        self._second = torch.zeros_like(self._gram)

    def update(self, codes: Tensor, mean: Tensor, std: Tensor, norm: Tensor) -> None:
        """Adds images: codes ``[B, L, H, E]``, the others ``[B]``."""
        scale = 1 / (std * norm)
        shared = torch.stack([scale, mean * scale, 1 / norm], 1)  # as in clipfast.basis
        columns = torch.cat([codes.double(), shared[:, None, None].expand(*codes.shape[:3], -1)], 3)
        if self._centre is None:
            self._centre = columns.mean(0)
        columns = columns - self._centre
        self._count += len(codes)
        self._total += columns.sum(0)
        self._second += torch.einsum("blhx,blhy->lhxy", columns, columns)

    def variances(self) -> Tensor:
        """``[L, H]``: the trace of the covariance of what each head adds."""
        product = torch.einsum("lhx,lhy->lhxy", self._total, self._total) / self._count
        return ((self._second - product) / (self._count - 1) * self._gram).sum((2, 3))


def _gram(basis: Basis, layer: int) -> Tensor:
    """Inner products of the rows of a layer's basis, ``[H, X, X]``."""
    values = basis.values(layer).double()
    rows = torch.stack([basis.biases[layer], basis.mean_row, basis.std_row]).double()
    folded = torch.cat([values, rows.expand(len(values), -1, -1)], 1)
    return folded @ folded.transpose(1, 2)
