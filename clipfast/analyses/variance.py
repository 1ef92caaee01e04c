"""Which terms the variance of the embedding comes from, from one pass over the images.

The embedding, divided by its norm, is the sum of its terms, so its variance is the sum over terms of their covariance
with it: ``share_k = Σ_d Cov(c_kd, y_d) / Σ_d Var(y_d)`` adds up to 1 exactly. A term that works against the others has
a negative share.

``B`` images, ``L`` layers kept, ``D`` embed_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError

_SAME = 1e-12  # a smaller share of the second moment is the rounding of float64 sums


@dataclass(frozen=True)
class Shares:
    """Shares of the variance of ``embedding / norm``; all of them sum to 1.

    Attributes:
        start: of the start of the residual stream.
        layers: the layers that ``attention`` is about.
        attention: of each of those layers' heads together.
        mlps: of every layer's MLP.
        rest: of the attention of layers that were not kept, together.
    """

    start: float
    layers: tuple[int, ...]
    attention: tuple[float, ...]
    mlps: tuple[float, ...]
    rest: float


class TermVariances:
    """Streaming covariance of every layer's attention and MLP with the embedding, summed over dimensions.

    >>> variances = TermVariances()
    >>> for batch in batches:
    ...     variances.update(model.decompose(batch))
    >>> variances.shares().attention

    Attributes:
        count: images seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._layers: tuple[int, ...] = ()
        self._sums: Tensor | None = None  # [K + 1, D] of the terms and the embedding
        self._products = torch.zeros(0, dtype=torch.float64)  # [K + 1] of each with the embedding

    def update(self, contributions: Contributions) -> None:
        """Adds a batch.

        Raises:
            InputError: other layers or another width than before, or values that are not finite.
        """
        if not len(contributions):
            return
        if not bool(contributions.is_finite().all()):
            raise InputError("a contribution is not finite: the image or a weight is not, or an embedding is zero")
        whole = contributions.embedding.double() / contributions.norm.double()[:, None]  # [B, D]
        terms = torch.cat([_terms(contributions), whole[:, None]], 1)  # [B, K + 1, D]
        sums, products = terms.sum(0).cpu(), torch.einsum("bkd,bd->k", terms, whole).cpu()
        if self._sums is None:
            self._layers, self._sums, self._products = contributions.layers, sums, products
        elif contributions.layers != self._layers or sums.shape != self._sums.shape:
            raise InputError("these contributions are of another model or keep other layers than those before")
        else:
            self._sums, self._products = self._sums + sums, self._products + products
        self.count += len(contributions)

    def shares(self) -> Shares:
        """Each term's share.

        Raises:
            InputError: fewer than two images, or images that all have the same embedding.
        """
        if self._sums is None or self.count < 2:
            raise InputError(f"the variance of {self.count} images was asked for: at least 2 are needed")
        covariances = self._products - self._sums @ self._sums[-1] / self.count
        if not float(covariances[-1]) > _SAME * float(self._products[-1]):
            raise InputError("all images have the same embedding: there is no variance to share")
        shares = (covariances[:-1] / covariances[-1]).tolist()
        kept = len(self._layers)
        return Shares(shares[kept + 1], self._layers, tuple(shares[:kept]), tuple(shares[kept + 2 :]), shares[kept])


def _terms(contributions: Contributions) -> Tensor:
    """Attention of the kept layers, the rest, the start, every MLP: ``[B, L + 2 + layers of the model, D]``."""
    basis, layers = contributions.basis, contributions.layers
    with autocast_disabled(contributions.codes):
        scale = 1 / (contributions.std * contributions.norm)
        constants = basis.constants(contributions.mean, contributions.std, layers) * scale[:, None, None]
        attention = [
            contributions.codes[:, position].flatten(1) @ basis.values(layer).flatten(0, 1)
            + basis.heads * constants[:, position]
            for position, layer in enumerate(layers)
        ]
        return torch.stack(
            [*attention, contributions.rest, contributions.start, *contributions.mlps.unbind(1)], 1
        ).double()
