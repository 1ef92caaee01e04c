"""Second-order effects of neurons over a data set: mean, variance, first principal direction, and where each fires.

Two streaming passes, both mergeable. The first, :class:`EffectMoments`, is exact without any image being kept: an
effect ``φₙ`` is ``F`` numbers times vectors of the model, so mean and covariance of ``φₙ`` follow from those of the
numbers. The second, :class:`TopImages`, keeps for each neuron the images whose effect lies farthest from the mean of
the first. The paper (arXiv 2406.04341) takes a neuron's direction from these: the first principal component of the
deviations of 100 images; its effects are significant where they lie farther from the mean than the last of these.

Memory, in float64: ``F·M`` numbers for means and ``F²·M`` for covariances, 32 MiB for layer 8 of a ViT-B-16 and 24 MiB
for layer 20 of a ViT-L-14, but 3.3 GiB for layer 0 of the latter. In float32: ``k·F·M`` numbers for ``k`` images.

``B`` images, ``F`` later heads, ``M`` neurons, ``D`` embed_dim, ``k`` images kept per neuron, ``P`` chosen neurons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import storage
from clipfast.analyses.ranking import largest
from clipfast.analyses.second_order import NeuronEffects, Neurons, PathWeights
from clipfast.errors import InputError

MOMENTS_FORMAT = "clipfast.effect_moments/1"
TOP_FORMAT = "clipfast.top_images/1"
_NOT_FINITE = "an effect is not finite: the image or a weight is not, or an embedding is zero"


@dataclass(frozen=True)
class Principal:
    """The direction along which each neuron's effects vary most.

    Attributes:
        directions: ``[P, D]`` of unit length; zero for a neuron whose effects do not vary.
        variances: ``[P]``, of the effects along it.
        shares: ``[P]``, of all their variance; 0 for a neuron whose effects do not vary.
    """

    directions: Tensor
    variances: Tensor
    shares: Tensor


class EffectMoments:
    """Mean and covariance of every neuron's second-order effect: one pass over the images.

    >>> moments = EffectMoments()
    >>> for batch in batches:
    ...     moments.update(*lens.decompose(batch))
    >>> moments.principal(range(10)).shares

    Args:
        covariance: keep covariances, ``F²·M`` numbers; without them there are means and variances along no direction.

    Attributes:
        count: images seen.
    """

    def __init__(self, *, covariance: bool = True) -> None:
        self.covariance = covariance
        self.count = 0
        self._weights: PathWeights | None = None
        self._mean = self._squares = self._shared = torch.zeros(0)

    @property
    def weights(self) -> PathWeights:
        """The model's part; :class:`InputError` before the first images."""
        if self._weights is None:
            raise InputError("these moments are empty: update them with effects first")
        return self._weights

    @property
    def mean(self) -> Tensor:
        """Mean coefficients, ``[F, M]``, float64: what :meth:`.NeuronEffects.norms` and ``ablated`` take."""
        self.weights  # noqa: B018 - raises where there is nothing
        return self._mean

    @property
    def shared(self) -> Tensor:
        """Mean of what belongs to no neuron, ``[D]``, float64."""
        self.weights  # noqa: B018 - raises where there is nothing
        return self._shared

    def update(self, effects: NeuronEffects) -> None:
        """Adds a batch.

        Raises:
            InputError: effects of another model, layer or centring, or with values that are not finite.
        """
        if not effects.is_finite():
            raise InputError(_NOT_FINITE)
        if not len(effects):
            return
        exact = effects.coefficients.double()
        mean = exact.mean(0)
        squares = _outer((exact - mean).permute(2, 1, 0)) if self.covariance else mean.new_zeros(0)
        self._add(effects.weights, len(effects), mean, squares, effects.shared.double().mean(0))

    def merge(self, other: "EffectMoments") -> None:
        """Adds what another collected from other images.

        Raises:
            InputError: of another model, layer or centring, or with and without covariances.
        """
        if other.covariance != self.covariance:
            raise InputError("only one of these moments keeps covariances: collect both alike")
        if other.count:
            self._add(other.weights, other.count, other._mean, other._squares, other._shared)

    def _add(self, weights: PathWeights, count: int, mean: Tensor, squares: Tensor, shared: Tensor) -> None:
        if self._weights is None:
            self._weights, self.count = weights, count
            self._mean, self._squares, self._shared = mean, squares, shared
            return
        if not self._weights.same_as(weights):
            raise InputError("these effects are of another model, layer or centring, or of other weights")
        whole = self.count + count
        difference = mean.to(self._mean) - self._mean  # sums of squares merge as in Chan, Golub & LeVeque 1983
        if self.covariance:
            between = _outer(difference.T[..., None]) * (self.count * count / whole)
            self._squares = self._squares + squares.to(self._squares) + between
        self._mean = self._mean + difference * (count / whole)
        self._shared = self._shared + (shared.to(self._shared) - self._shared) * (count / whole)
        self.count = whole

    def means(self, neurons: Neurons) -> Tensor:
        """Mean effects of some neurons, ``[P, D]``, float64.

        Raises:
            InputError: no images yet, or no such neuron.
        """
        chosen = self.weights.resolve(neurons)
        rows = self.weights.rows(chosen).double()  # [P, F, D]
        return torch.einsum("fp,pfd->pd", self._mean[:, chosen], rows)

    def covariances(self, neurons: Neurons) -> Tensor:
        """Unbiased covariance of the coefficients of some neurons, ``[P, F, F]``, float64.

        Raises:
            InputError: fewer than two images, no covariances kept, or no such neuron.
        """
        chosen = self.weights.resolve(neurons)
        if not self.covariance:
            raise InputError("these moments keep no covariances: collect them with covariance=True")
        if self.count < 2:
            raise InputError(f"a covariance needs two images or more: {self.count} were seen")
        return self._squares[chosen] / (self.count - 1)

    def principal(self, neurons: Neurons | None = None) -> Principal:
        """The first principal direction of the effects of some neurons, over all images.

        It points to the side of the mean effect.

        Args:
            neurons: which; default all.

        Raises:
            InputError: as :meth:`covariances`.
        """
        weights = self.weights
        chosen = weights.resolve(range(weights.neurons) if neurons is None else neurons)
        parts = []
        for part in chosen.split(_together(weights)):
            rows = weights.rows(part).double()
            found = _first(rows, self.covariances(part))
            along = torch.einsum("fp,pfd,pd->p", self._mean[:, part], rows, found.directions)
            parts.append(_turned(found, along < 0))
        return _joined(parts, weights)

    def variance(self) -> Tensor:
        """Variance of every neuron's effect, summed over dimensions, ``[M]``, float64, unbiased.

        Raises:
            InputError: as :meth:`covariances`.
        """
        result = self.mean.new_zeros(self.weights.neurons)
        for part, rows in self.weights.pieces():
            result[part] = (self.covariances(part) * _outer(rows.double())).sum((1, 2))
        return result

    def select(self, count: int) -> Tensor:
        """The neurons whose effects vary most, ``[count]``, largest first.

        Raises:
            InputError: as :meth:`covariances`, or more neurons than there are.
        """
        return _select(self.variance(), count)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes them to one safetensors file, without the model's part.

        Raises:
            InputError: no images yet.
            OSError: the file cannot be written.
        """
        header = {"format": MOMENTS_FORMAT, "count": self.count, "covariance": self.covariance}
        tensors = {"mean": self.mean, "shared": self.shared}
        tensors |= {"squares": self._squares} if self.covariance else {}
        storage.write(path, header | _header(self.weights), tensors)

    @classmethod
    def load(cls, path: str | PathLike[str], weights: PathWeights) -> "EffectMoments":
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            weights: the model's part, of :attr:`.SecondOrder.weights`.

        Raises:
            InputError: not such a file, damaged, or of another model, layer or centring.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, MOMENTS_FORMAT, "EffectMoments.save", weights.read.device)
        with storage.as_damage(path):
            _expect(path, header, weights)
            moments = cls(covariance=header["covariance"])
            moments._weights, moments.count = weights, header["count"]
            moments._mean, moments._shared = tensors["mean"], tensors["shared"]
            moments._squares = tensors["squares"] if moments.covariance else tensors["mean"].new_zeros(0)
        return moments


class TopImages:
    """For every neuron the images where it fires most: whose effect lies farthest from the mean.

    The second pass. The result does not depend on batches or the order in which parts are merged: of equal norms the
    lower image comes first. Every image is to be pushed once.

    >>> top = TopImages(moments, count=100)
    >>> for batch in batches:
    ...     top.update(*lens.decompose(batch))
    >>> top.images[:, 7], top.principal().directions[7]

    Args:
        moments: of the images whose mean counts; None for none, so that effects are measured from 0.
        count: images per neuron, ``k``.

    Attributes:
        seen: images pushed.
        mean: ``[F, M]``, or None.
    """

    def __init__(self, moments: EffectMoments | None = None, count: int = 100) -> None:
        if count < 1:
            raise InputError(f"count is {count}, expected at least 1")
        self.count = count
        self.seen = 0
        self.mean = None if moments is None else moments.mean
        self._weights = None if moments is None else moments.weights
        self._norms: Tensor | None = None  # [≤ k, M], largest first
        self._images = torch.zeros(0, dtype=torch.long)  # the same
        self._deviations = torch.zeros(0)  # [≤ k, F, M]

    @property
    def weights(self) -> PathWeights:
        """The model's part; :class:`InputError` before the first images."""
        if self._weights is None:
            raise InputError("nothing was pushed yet: update with effects first")
        return self._weights

    @property
    def norms(self) -> Tensor:
        """How far from the mean the kept images' effects lie, ``[≤ k, M]``, largest first."""
        if self._norms is None:
            raise InputError("nothing was pushed yet: update with effects first")
        return self._norms

    @property
    def images(self) -> Tensor:
        """Their numbers, ``[≤ k, M]``."""
        self.norms  # noqa: B018 - raises where there is nothing
        return self._images

    def update(self, effects: NeuronEffects, images: Sequence[int] | None = None) -> None:
        """Adds a batch.

        Args:
            effects: of some images.
            images: their numbers in the data set; default counted on from those before.

        Raises:
            InputError: effects of another model, layer or centring, with values that are not finite, not one number
                per image, or an image that was pushed before (noticed only if it is among those kept).
        """
        numbers = list(range(self.seen, self.seen + len(effects)) if images is None else images)
        if len(numbers) != len(effects) or len(set(numbers)) != len(numbers):
            raise InputError(f"{len(set(numbers))} different numbers for {len(effects)} images: give one each")
        if not effects.is_finite():
            raise InputError(_NOT_FINITE)
        if not len(effects):
            return
        norms, device = effects.norms(self.mean), effects.coefficients.device
        deviations = effects.coefficients if self.mean is None else effects.deviations(self.mean)
        places = torch.tensor(numbers, device=device)[:, None].expand_as(norms)
        self._take(effects.weights, norms, places, deviations)
        self.seen += len(effects)

    def merge(self, other: "TopImages") -> None:
        """Adds what another collected from other images with the same mean.

        Raises:
            InputError: of another model, layer, centring, mean or count, or an image that both have kept.
        """
        same = (self.mean is None) == (other.mean is None)
        if self.mean is not None and other.mean is not None:
            same = self.mean.shape == other.mean.shape and torch.equal(self.mean, other.mean.to(self.mean))
        if self.count != other.count or not same:
            raise InputError("only top images of the same count and mean can be merged")
        if other._norms is not None:
            self._take(other.weights, other._norms, other._images, other._deviations)
            self.seen += other.seen

    def _take(self, weights: PathWeights, norms: Tensor, images: Tensor, deviations: Tensor) -> None:
        if self._weights is None:
            self._weights = weights
        elif not self._weights.same_as(weights):
            raise InputError("these effects are of another model, layer or centring, or of other weights")
        if self._norms is not None:
            again = set(self._images.unique().tolist()).intersection(images.unique().tolist())
            if again:
                raise InputError(f"image {min(again)} was pushed before: give every image a number of its own")
            norms = torch.cat([self._norms, norms.to(self._norms)])
            images = torch.cat([self._images, images.to(self._images)])
            deviations = torch.cat([self._deviations, deviations.to(self._deviations)])
        order = images.argsort(0)  # so that of equal norms the lower image comes first
        values, places = largest(norms.gather(0, order).T, self.count)
        kept = order.gather(0, places.T)
        self._norms, self._images = values.T, images.gather(0, kept)
        self._deviations = deviations.gather(0, kept[:, None].expand(-1, deviations.shape[1], -1))

    def thresholds(self) -> Tensor:
        """The distance from the mean of the last image kept, ``[M]``: above it an effect is significant."""
        return self.norms[-1]

    def significant(self, effects: NeuronEffects) -> Tensor:
        """Which effects lie farther from the mean than every neuron's threshold, bool ``[B, M]``.

        The image that is kept last is not significant, however its effect is rounded in another batch.

        Raises:
            InputError: nothing was pushed, or effects of other weights.
        """
        thresholds = self.thresholds()
        if not self.weights.same_as(effects.weights):
            raise InputError("these effects are of another model, layer or centring, or of other weights")
        norms = effects.norms(self.mean)
        return norms > thresholds.to(norms) * (1 + 100 * torch.finfo(norms.dtype).eps)

    def importance(self) -> Tensor:
        """The mean distance of the kept images from the mean, ``[M]``."""
        return self.norms.mean(0)

    def select(self, count: int) -> Tensor:
        """The neurons of the largest :meth:`importance`, ``[count]``, largest first.

        Raises:
            InputError: nothing was pushed, or more neurons than there are.
        """
        return _select(self.importance(), count)

    def principal(self, neurons: Neurons | None = None) -> Principal:
        """The first principal direction of the kept images' deviations from the mean, as the paper takes it.

        They are not centred again. The direction points to the side where more than half of them lie.

        Args:
            neurons: which; default all.

        Raises:
            InputError: nothing was pushed, or no such neuron.
        """
        kept, weights = len(self.norms), self.weights
        chosen = weights.resolve(range(weights.neurons) if neurons is None else neurons)
        parts = []
        for part in chosen.split(_together(weights)):
            rows, deviations = weights.rows(part).double(), self._deviations[:, :, part].double().permute(2, 1, 0)
            found = _first(rows, _outer(deviations) / kept)
            along = torch.einsum("pfk,pfd,pd->kp", deviations, rows, found.directions)
            parts.append(_turned(found, (along > 0).sum(0) <= kept // 2))
        return _joined(parts, weights)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes them to one safetensors file, without the model's part.

        Raises:
            InputError: nothing was pushed.
            OSError: the file cannot be written.
        """
        tensors = {"norms": self.norms, "images": self._images, "deviations": self._deviations}
        tensors |= {} if self.mean is None else {"mean": self.mean}
        header = {"format": TOP_FORMAT, "count": self.count, "seen": self.seen}
        storage.write(path, header | _header(self.weights), tensors)

    @classmethod
    def load(cls, path: str | PathLike[str], weights: PathWeights) -> "TopImages":
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            weights: the model's part, of :attr:`.SecondOrder.weights`.

        Raises:
            InputError: not such a file, damaged, or of another model, layer or centring.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, TOP_FORMAT, "TopImages.save", weights.read.device)
        with storage.as_damage(path):
            _expect(path, header, weights)
            top = cls(count=header["count"])
            top._weights, top.seen, top.mean = weights, header["seen"], tensors.get("mean")
            top._norms, top._images, top._deviations = (tensors[name] for name in ("norms", "images", "deviations"))
        return top


def _header(weights: PathWeights) -> dict[str, Any]:
    """What tells whose effects a file is of."""
    return {"layer": weights.layer, "centring": weights.centring, "fingerprint": weights.fingerprint}


def _expect(path: str | PathLike[str], header: Mapping[str, Any], weights: PathWeights) -> None:
    if any(header[name] != value for name, value in _header(weights).items()):
        raise InputError(
            f"{path} is of layer {header['layer']} of a model {header['fingerprint'][:8]} with centring "
            f"{header['centring']!r}, not of layer {weights.layer} of {weights.fingerprint[:8]}, {weights.centring!r}"
        )


def _outer(x: Tensor) -> Tensor:
    """``x xᵀ``, ``[..., F, K] → [..., F, F]``."""
    return x @ x.mT


def _together(weights: PathWeights) -> int:
    """How many neurons' directions are multiplied out at once: 32 MiB of them in float64."""
    return max(1, 2**22 // (weights.heads * weights.embed_dim))


def _first(rows: Tensor, moment: Tensor) -> Principal:
    """The first principal direction of ``rowsᵀ x`` where ``x`` has a second moment.

    With ``moment = L Lᵀ`` what varies is ``Aᵀ = rowsᵀ L``; ``A Aᵀ`` is as small as the moment, and its eigenvectors
    ``v`` give those of ``Aᵀ A``, ``Aᵀ v``.

    Args:
        rows: ``[P, F, D]``, float64.
        moment: ``[P, F, F]``.
    """
    values, axes = torch.linalg.eigh(moment)
    varying = (axes * values.clamp_min(0).sqrt()[:, None]).mT @ rows  # [P, F, D]
    values, axes = torch.linalg.eigh(_outer(varying))
    total, most = values.clamp_min(0).sum(1), values[:, -1].clamp_min(0)
    directions = F.normalize((axes[:, None, :, -1] @ varying)[:, 0], dim=1)
    varies = total > 0
    return Principal(
        torch.where(varies[:, None], directions, 0), most, torch.where(varies, most / total.where(varies, 1), 0)
    )


def _turned(found: Principal, around: Tensor) -> Principal:
    """The same with some directions turned around."""
    return Principal(torch.where(around[:, None], -found.directions, found.directions), found.variances, found.shares)


def _joined(parts: Sequence[Principal], weights: PathWeights) -> Principal:
    empty = torch.zeros(0, weights.embed_dim, dtype=torch.float64, device=weights.read.device)
    return Principal(
        torch.cat([empty, *(part.directions for part in parts)]),
        torch.cat([empty[:, 0], *(part.variances for part in parts)]),
        torch.cat([empty[:, 0], *(part.shares for part in parts)]),
    )


def _select(amounts: Tensor, count: int) -> Tensor:
    if not 0 <= count <= len(amounts):
        raise InputError(f"count is {count}, expected 0 to {len(amounts)}, the layer's neurons")
    return amounts.argsort(descending=True, stable=True)[:count]
