"""What neuron-head pairs do over a data set: which of them matter, in which direction, and which texts say it.

A pair writes along one direction, ``W_VO[h][n,:]``, so everything about it over a data set follows from the moments and
the extremes of one number per image. The measures are those of arXiv 2509.19943: a pair's importance is the mean norm
of the contributions that lie farthest from its mean, and its sign that of most of these.

``H`` heads, ``C`` neurons, ``D`` embed_dim, ``T`` texts, ``P`` pairs, ``k`` images that are kept as extremes.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.neurons import PairContributions, Pairs, PairWeights, TopPairs, as_pairs, check_features
from clipfast.errors import InputError


class PairMoments:
    """Streaming, mergeable: mean, variance and extremes of every pair over images.

    >>> moments = PairMoments()
    >>> for pixels in model.batches(paths):
    ...     moments.update(neurons.decompose(model, pixels))
    >>> moments.select(0.1)

    Args:
        extremes: how many images count for importance and sign, ``k``.

    Attributes:
        count: images seen.
    """

    def __init__(self, extremes: int = 50) -> None:
        if extremes < 1:
            raise InputError(f"extremes is {extremes}, expected at least 1")
        self.extremes = extremes
        self.count = 0
        self._weights: PairWeights | None = None
        self._mean = self._squares = self._largest = self._smallest = torch.zeros(0)

    @property
    def weights(self) -> PairWeights:
        """The model's part; :class:`InputError` before the first images."""
        if self._weights is None:
            raise InputError("these moments are empty: update them with contributions first")
        return self._weights

    def update(self, contributions: PairContributions) -> None:
        """Adds a batch.

        Raises:
            InputError: contributions of another model, or with values that are not finite.
        """
        amounts = contributions.activations / contributions.norm[:, None, None]
        if not bool(amounts.isfinite().all()):
            raise InputError("a contribution is not finite: the image or a weight is not, or an embedding is zero")
        if not len(amounts):
            return
        exact = amounts.double()
        mean = exact.mean(0)
        squares = (exact - mean).square().sum(0)
        self._add(contributions.weights, len(amounts), mean, squares, amounts, amounts)

    def merge(self, other: "PairMoments") -> None:
        """Adds what another collected from other images.

        Raises:
            InputError: of another model, or with another number of extremes.
        """
        if other.extremes != self.extremes:
            raise InputError(f"extremes are {self.extremes} and {other.extremes}: only equal ones can be merged")
        if other.count:
            self._add(other.weights, other.count, other._mean, other._squares, other._largest, other._smallest)

    def _add(
        self, weights: PairWeights, count: int, mean: Tensor, squares: Tensor, largest: Tensor, smallest: Tensor
    ) -> None:
        if self._weights is None:
            self._weights = weights
            self._mean, self._squares = torch.zeros_like(mean), torch.zeros_like(squares)
            self._largest = self._smallest = largest[:0]
        elif self._weights is not weights and not _same(self._weights, weights):
            raise InputError("these contributions are of another model, or of other weights")
        whole = self.count + count
        difference = mean.to(self._mean) - self._mean  # sums of squares merge as in Chan, Golub & LeVeque 1983
        self._squares = self._squares + squares.to(self._squares) + difference**2 * (self.count * count / whole)
        self._mean = self._mean + difference * (count / whole)
        self._largest = _extremes(self._largest, largest, self.extremes, largest=True)
        self._smallest = _extremes(self._smallest, smallest, self.extremes, largest=False)
        self.count = whole

    @property
    def mean(self) -> Tensor:
        """The mean of ``s[h,n]`` over the embedding's norm, ``[H, C]``, float64."""
        self.weights  # noqa: B018 - raises where there is nothing
        return self._mean

    def variance(self) -> Tensor:
        """Of every pair's contribution, summed over dimensions, ``[H, C]``: ``var(s) ‖W_VO[h][n,:]‖²``, unbiased.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"a variance needs two images or more: {self.count} were seen")
        return self._squares / (self.count - 1) * self.weights.norms.to(self._squares) ** 2

    def importance(self) -> Tensor:
        """The mean norm of the ``k`` contributions of each pair that lie farthest from its mean, ``[H, C]``."""
        return self._deviations().abs().mean(0) * self.weights.norms.to(self._mean)

    def signs(self) -> Tensor:
        """1 where most of those lie on the side of ``W_VO[h][n,:]``, else −1, ``[H, C]``."""
        deviations = self._deviations()
        return torch.where((deviations > 0).sum(0) > len(deviations) // 2, 1.0, -1.0).to(deviations)

    def _deviations(self) -> Tensor:
        """The ``k`` values of each pair that lie farthest from its mean, less the mean, ``[k, H, C]``."""
        self.weights  # noqa: B018 - raises where there is nothing
        others = self._smallest[: max(self.count - self.extremes, 0)]  # the rest are among the largest
        deviations = torch.cat([self._largest, others]).double() - self._mean
        places = deviations.abs().topk(min(self.extremes, self.count), 0).indices
        return deviations.gather(0, places)

    def directions(self, pairs: Pairs) -> Tensor:
        """The unit direction along which each pair varies, ``[P, D]``: its first principal component.

        Raises:
            InputError: no such pair.
        """
        heads, neurons = self.weights.resolve(pairs).unbind(1)
        rows = F.normalize(self.weights.rows(pairs), dim=-1)
        return rows * self.signs()[heads, neurons, None].to(rows)

    def select(self, share: float) -> Tensor:
        """The most important pairs, ``[P, 2]``, most important first.

        Args:
            share: of all pairs, from 0 to 1.

        Raises:
            InputError: another share.
        """
        if not 0 <= share <= 1:
            raise InputError(f"share is {share}, expected 0 to 1")
        importance = self.importance().flatten()
        places = importance.argsort(descending=True, stable=True)[: round(share * len(importance))]
        return as_pairs(places, self.weights.neurons)

    def top_pairs(self, text_features: Tensor, count: int) -> TopPairs:
        """The pairs whose directions lie nearest each text, largest first, ``[T, count]``.

        The paper takes texts less their mean, :func:`centred`.

        Raises:
            InputError: features of another width.
        """
        unit = self.signs() / self.weights.norms.clamp_min(torch.finfo(self.weights.norms.dtype).tiny)
        texts = check_features(text_features, self.weights)
        found = [
            (self.weights.towards(text) * unit).flatten().topk(min(count, unit.numel()))
            for text in F.normalize(texts, dim=-1)
        ]
        pairs = torch.stack([as_pairs(one.indices, self.weights.neurons) for one in found])
        return TopPairs(pairs, torch.stack([one.values for one in found]))

    def ablated(self, contributions: PairContributions, kept: Pairs) -> Tensor:
        """Embeddings over their norms with every pair but some replaced by its mean, ``[B, D]``.

        Raises:
            InputError: no such pair.
        """
        heads, neurons = self.weights.resolve(kept).unbind(1)
        amounts = self.mean.to(contributions.activations).expand_as(contributions.activations).clone()
        own = contributions.activations / contributions.norm[:, None, None]
        amounts[:, heads, neurons] = own[:, heads, neurons]
        return self.weights.sum(amounts) + self.weights.constant / contributions.norm[:, None]

    def kept_share(self, contributions: PairContributions, kept: Pairs) -> float:
        """How much of what all pairs vary is left when the others are replaced by their means.

        Returns:
            ``1 − Σ‖y − y'‖² / Σ‖y − y₀‖²`` over images, where y₀ has all pairs replaced; 1 for all, 0 for none.

        Raises:
            InputError: no such pair, no images, or ones that do not vary.
        """
        whole = contributions.embedding / contributions.norm[:, None]
        none = (whole - self.ablated(contributions, [])).square().sum()
        rounding = 100 * torch.finfo(whole.dtype).eps
        if not float(none) > len(whole) * rounding**2:
            raise InputError("these images do not differ from the mean: give more images")
        return 1 - float((whole - self.ablated(contributions, kept)).square().sum() / none)


def _same(a: PairWeights, b: PairWeights) -> bool:
    pairs = ((a.values, b.values), (a.out, b.out), (a.constant, b.constant))
    return all(x.shape == y.shape and torch.equal(x, y.to(x)) for x, y in pairs)


def _extremes(kept: Tensor, new: Tensor, count: int, *, largest: bool) -> Tensor:
    """The ``count`` largest or smallest of both, ``[≤ count, H, C]``, the most extreme first."""
    both = torch.cat([kept, new.to(kept)])
    return both.topk(min(count, len(both)), 0, largest=largest).values


# ----------------------------------------------------------------------------------------------------------- texts


def centred(text_features: Tensor) -> Tensor:
    """Texts ``[T, D]`` less their mean, of unit length: what distinguishes each from all."""
    return F.normalize(text_features - text_features.mean(0), dim=-1)


@dataclass(frozen=True)
class SparseTexts:
    """Directions as sums of few texts.

    Attributes:
        picks: ``[P, m]``, indices into the texts, in the order they were picked.
        weights: ``[P, m]``, how much of each.
        explained: ``[P, m]``, the share of ``‖d‖²`` that the first ones explain together.
    """

    picks: Tensor
    weights: Tensor
    explained: Tensor


def nearest_texts(directions: Tensor, text_features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The texts whose cosine with each direction is largest.

    Args:
        directions: ``[P, D]``, of :meth:`PairMoments.directions`.
        text_features: ``[T, D]``.
        count: how many per direction.

    Returns:
        Cosines and indices, ``[P, count]``, largest first.

    Raises:
        InputError: shapes that do not fit.
    """
    directions, texts = _unit(directions, text_features)
    found = (directions @ texts.T).topk(min(count, len(texts)))
    return found.values, found.indices


@torch.no_grad()
def sparse_texts(directions: Tensor, text_features: Tensor, size: int) -> SparseTexts:
    """Directions as sums of few texts, by orthogonal matching pursuit, as the paper describes pairs.

    Each step picks the text whose cosine with what is left is largest in size, and fits all picked ones again.

    Args:
        directions: ``[P, D]``.
        text_features: ``[T, D]``; they count with unit length.
        size: how many texts per direction.

    Raises:
        InputError: shapes that do not fit, or a size below one or above the number of texts or dimensions.
    """
    directions, texts = _unit(directions.double(), text_features.double())
    if not 1 <= size <= min(texts.shape):
        raise InputError(f"size is {size}, expected 1 to {min(texts.shape)}: texts, and dimensions of a feature")
    left, picks, explained = directions, directions.new_empty(len(directions), 0, dtype=torch.long), []
    weights = directions.new_empty(len(directions), 0)
    for _ in range(size):
        along = (left @ texts.T).abs().scatter(1, picks, -1.0)
        picks = torch.cat([picks, along.argmax(1, keepdim=True)], 1)
        chosen = texts[picks]  # [P, m, D]
        gram = chosen @ chosen.mT
        weights = (torch.linalg.pinv(gram, hermitian=True) @ chosen @ directions[..., None])[..., 0]
        left = directions - (weights[:, None] @ chosen)[:, 0]
        explained.append(1 - left.square().sum(1))
    return SparseTexts(picks, weights, torch.stack(explained, 1))


def _unit(directions: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both with unit length."""
    if directions.ndim != 2 or text_features.ndim != 2 or directions.shape[1] != text_features.shape[1]:
        raise InputError(
            f"directions have shape {list(directions.shape)} and texts {list(text_features.shape)}, "
            "expected [pairs, embed_dim] and [texts, embed_dim]"
        )
    normed = (F.normalize(x, dim=-1) for x in (directions, text_features.to(directions)))
    return cast(tuple[Tensor, Tensor], tuple(normed))
