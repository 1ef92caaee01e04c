"""Mean and second moment of what every head writes: one pass over the images, TEXTSPAN of any texts afterwards.

Kept per head in code space, ``x = [z, 1, μ, σ] / (σ n)`` (:mod:`clipfast.basis`): what a head writes is ``x @ basis``,
so mean and covariance of it follow exactly, for centring ``"uniform"`` too, from sums of ``x`` and ``x xᵀ``. Sums are
float64, about a centre near the mean so that nothing cancels, and those of shards merge (Chan, Golub & LeVeque 1983).

``G`` heads of all layers kept, ``E`` head_dim, ``D`` embed_dim, ``X = E + 3``.
"""

from collections.abc import Sequence
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from clipfast import storage
from clipfast.analyses import textspan as pursuit
from clipfast.analyses.protocols import HasBasis
from clipfast.analyses.spans import HeadSpans, noise, of_codes
from clipfast.analyses.textspan import Method, TextSpan
from clipfast.basis import Basis, StoredBasis
from clipfast.contributions import Contributions
from clipfast.errors import InputError, NotKept
from clipfast.indices import resolve_heads
from clipfast.kernels import ops

FORMAT = "clipfast.moments/2"
_SHARED = 3  # entries of a code that are the same for every head: 1, μ and σ


class Moments:
    """Streaming, mergeable moments of every head's contributions.

    >>> moments = clipfast.Moments(model)
    >>> for batch in batches:
    ...     moments.update(model.decompose(batch))
    >>> names = moments.textspan(model.encode_text(texts), size=20)
    >>> names[11, 3].picks

    Args:
        model: whose heads, anything with a basis; None to take the basis of the first contributions.
        backend: which kernels compute; default the model's.

    Attributes:
        count: images seen.
        layers: layers whose heads are covered, known after the first update.
    """

    def __init__(self, model: HasBasis | None = None, *, backend: str | None = None) -> None:
        self.backend = backend or ("auto" if model is None else model.backend)
        self.count = 0
        self.layers: tuple[int, ...] = ()
        self._basis: Basis | None = None if model is None else model.basis()
        self._dtype = torch.float32  # that the images were computed in: says what is noise
        self._sums: dict[str, Tensor] = {}
        self._spans: HeadSpans | None = None

    @property
    def basis(self) -> Basis:
        """The model's part of the contributions.

        Raises:
            InputError: no model was given and nothing was seen.
        """
        if self._basis is None:
            raise InputError("these moments are empty: update them with contributions first")
        return self._basis

    @property
    def fingerprint(self) -> str:
        """Of the model's vision weights, 32 hexadecimal digits; raises as :attr:`basis`."""
        return self.basis.fingerprint

    def update(self, contributions: Contributions) -> None:
        """Adds a batch.

        Raises:
            InputError: contributions of another model, of other layers, or with values that are not finite.
        """
        if not len(contributions):
            return
        class_codes = contributions.class_codes if "class_token" in contributions.kept else None
        self._basis = self._basis or contributions.basis
        self._expect(contributions.basis, contributions.layers, class_codes is not None)
        scale = 1 / (contributions.std * contributions.norm)
        shared = torch.stack([scale, contributions.mean * scale, 1 / contributions.norm], 1)  # [B, 3]
        codes = contributions.codes.flatten(1, 2)  # [B, G, E]
        others = torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1).double()  # [B, terms, D]
        if not bool(codes.isfinite().all() and shared.isfinite().all()):
            raise InputError("a contribution is not finite: the image or a weight is not, or an embedding is zero")
        if not self.count:
            self._begin(contributions, codes, shared)
        sums = self._sums
        centre = sums["centre"].to(codes)
        ops.moments(codes, shared, centre, sums["total"], sums["second"], backend=self.backend)
        sums["others"] += others.sum(0)
        if class_codes is not None:
            sums["class"][:, :-_SHARED] += class_codes.flatten(1, 2).double().sum(0)
            sums["class"][:, -_SHARED:] += shared.double().sum(0) / contributions.token_count
        self.count += len(contributions)
        self._spans = None

    def _begin(self, contributions: Contributions, codes: Tensor, shared: Tensor) -> None:
        groups, columns = codes.shape[1], codes.shape[2] + _SHARED
        self.layers = contributions.layers
        self._dtype = contributions.embedding.dtype
        zeros = partial(torch.zeros, dtype=torch.float64, device=codes.device)
        whole = torch.cat([codes, shared[:, None].expand(-1, groups, -1)], 2)
        self._sums = {
            "centre": whole.mean(0).double(),
            "total": zeros(groups, columns),
            "second": zeros(groups, columns, columns),
            "others": zeros(contributions.mlps.shape[1] + 2, contributions.mlps.shape[2]),
        }
        if "class_token" in contributions.kept:
            self._sums["class"] = zeros(groups, columns)

    def _expect(self, basis: Basis, layers: Sequence[int], class_token: bool) -> None:
        if not self.basis.same_as(basis):
            raise InputError("these contributions are of another model, of other weights or of another centring")
        if self.count and tuple(layers) != self.layers:
            raise InputError(f"these contributions keep layers {list(layers)}, the moments {list(self.layers)}")
        if self.count and class_token != ("class" in self._sums):
            raise InputError("the class token's part is kept by some of these images only: decompose all alike")

    def merge(self, other: "Moments") -> None:
        """Adds another's images; in a fixed order the result is the same bits.

        Raises:
            InputError: moments of another model or of other layers.
        """
        if not other.count:
            return
        self._basis = self._basis or other.basis
        self._expect(other.basis, other.layers, "class" in other._sums)
        if not self.count:
            self.layers, self._dtype = other.layers, other._dtype
            self._sums = {name: tensor.clone() for name, tensor in other._sums.items()}
        else:
            mine, theirs = (
                self._sums,
                {name: tensor.to(self._sums["total"].device) for name, tensor in other._sums.items()},
            )
            away = theirs["centre"] - mine["centre"]  # their sums about our centre
            moved = theirs["total"][:, :, None] * away[:, None]
            mine["second"] += theirs["second"] + moved + moved.transpose(1, 2)
            mine["second"] += other.count * away[:, :, None] * away[:, None]
            mine["total"] += theirs["total"] + other.count * away
            mine["others"] += theirs["others"]
            if "class" in mine:
                mine["class"] += theirs["class"]
            if torch.finfo(other._dtype).eps > torch.finfo(self._dtype).eps:
                self._dtype = other._dtype
        self.count += other.count
        self._spans = None

    def means(self) -> Tensor:
        """Mean contribution of every head, ``[L, H, D]``, float64.

        Raises:
            InputError: no images yet.
        """
        return self._expanded(self._mean())

    def class_means(self) -> Tensor:
        """Mean of the class token's own part of every head, ``[L, H, D]``, float64.

        Raises:
            InputError: no images yet.
            NotKept: the images were decomposed without ``class_token=True``.
        """
        self._seen()
        if "class" not in self._sums:
            raise NotKept("the class token was not kept: update with contributions decomposed with class_token=True")
        return self._expanded(self._sums["class"] / self.count)

    def class_token_means(self) -> Tensor:
        """Mean of :meth:`Contributions.class_token`, ``[L, D]``, float64; raises as :meth:`class_means`."""
        return self.class_means().sum(1)

    def residual_means(self) -> tuple[Tensor, Tensor]:
        """Mean of the start of the residual stream and every MLP, ``[1 + layers, D]``, and of the rest, ``[D]``.

        Raises:
            InputError: no images yet.
        """
        self._seen()
        others = self._sums["others"] / self.count
        return others[:-1], others[-1]

    def covariance(self, layer: int, head: int) -> Tensor:
        """Unbiased covariance of what one head writes, ``[D, D]``, float64.

        Raises:
            InputError: no images yet, or no such head.
        """
        [(layer, head)] = self._resolve([(layer, head)])
        folded = self._folded(layer)[head]
        return folded.T @ self._covariances()[self._group(layer, head)] @ folded

    def spans(self, rank: int | None = None) -> HeadSpans:
        """Where every head's outputs vary, heads of a layer together; see :class:`.spans.HeadSpans`.

        Args:
            rank: how many dimensions of the outputs count, the largest first; None for all above rounding.

        Raises:
            InputError: fewer than two images.
        """
        if rank is None and self._spans is not None:
            return self._spans
        mean, covariance = self._mean(), self._covariances()
        moment = covariance * ((self.count - 1) / self.count) + mean[:, :, None] * mean[:, None]  # [G, X, X]
        share = noise(self._dtype)
        parts = [
            of_codes(self._folded(layer), moment[own], covariance[own], share, rank)
            for layer, own in self._by_layer(torch.arange(len(mean)))
        ]
        axes, factor, ranks, notes = zip(*parts, strict=True)
        spans = HeadSpans(
            axes=torch.cat(axes),
            factor=torch.cat(factor),
            mean=self.means().flatten(0, 1),
            ranks=tuple(rank for part in ranks for rank in part),
            notes=tuple(note for part in notes for note in part),
            noise=share,
        )
        if rank is None:
            self._spans = spans
        return spans

    def textspan(
        self,
        text_features: Tensor,
        size: int,
        heads: Sequence[tuple[int, int]] | None = None,
        *,
        rank: int | None = None,
        method: Method = "greedy",
    ) -> dict[tuple[int, int], TextSpan]:
        """The texts that span each head's outputs, for any texts, without the images.

        Args:
            text_features: ``[T, D]``.
            size: how many texts to pick per head.
            heads: (layer, head) pairs, layers negative from the end; all heads for None.
            rank: how many dimensions of the outputs count; default all that stand above rounding.
            method: ``"greedy"`` or ``"omp"``, see :func:`clipfast.textspan`.

        Returns:
            A :class:`TextSpan` per (layer, head), in the order asked for.

        Raises:
            InputError: fewer than two images, texts of another width, no such head, or a method that needs the outputs.
        """
        pursuit.check_texts(text_features, self.basis.columns)
        pursuit.check_size(size)
        if pursuit.check_method(method) == "somp":
            raise InputError(
                "somp sums absolute projections, which moments do not hold: use clipfast.textspan on outputs"
            )
        pairs = self.heads() if heads is None else self._resolve(heads)
        spans = self.spans(rank)
        if heads is not None:
            spans = spans.select([self._group(layer, head) for layer, head in pairs])
        return dict(zip(pairs, pursuit.pursue(spans, text_features, size, method, self.backend), strict=True))

    def heads(self) -> list[tuple[int, int]]:
        """Every (layer, head) covered, in order."""
        self._seen()
        return [(layer, head) for layer in self.layers for head in range(self.basis.heads)]

    def _seen(self, images: int = 1) -> None:
        if self.count < images:
            raise InputError(f"the moments of {self.count} images were asked for: at least {images} are needed")

    def _resolve(self, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(layer, head) pairs with layers counted from 0."""
        self._seen()
        return resolve_heads(heads, self.basis.layers, self.basis.heads, self.layers)

    def _group(self, layer: int, head: int) -> int:
        """Where a resolved head stands among the groups."""
        return self.layers.index(layer) * self.basis.heads + head

    def _by_layer(self, groups: Tensor) -> list[tuple[int, Tensor]]:
        return list(zip(self.layers, groups.unflatten(0, (len(self.layers), -1)), strict=True))

    def _expanded(self, codes: Tensor) -> Tensor:
        """Codes ``[G, X]`` as contributions ``[L, H, D]``."""
        rows = [torch.einsum("hx,hxd->hd", part, self._folded(layer)) for layer, part in self._by_layer(codes)]
        return torch.stack(rows)

    def _folded(self, layer: int) -> Tensor:
        """The basis of a layer's heads with its constant rows, ``[H, X, D]``."""
        values = self.basis.values(layer).double()
        rows = torch.stack([self.basis.biases[layer], self.basis.mean_row, self.basis.std_row]).double()
        return torch.cat([values, rows.expand(len(values), -1, -1)], 1)

    def _mean(self) -> Tensor:
        """``[G, X]``."""
        self._seen()
        return self._sums["centre"] + self._sums["total"] / self.count

    def _covariances(self) -> Tensor:
        """``[G, X, X]``, unbiased."""
        self._seen(2)
        total = self._sums["total"]
        return (self._sums["second"] - total[:, :, None] * total[:, None] / self.count) / (self.count - 1)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes sums and basis to one safetensors file.

        Raises:
            InputError: no images yet.
            OSError: the file cannot be written.
        """
        self._seen()
        header = {
            "format": FORMAT,
            "count": self.count,
            "layers": self.layers,
            "heads": self.basis.heads,
            "centring": self.basis.centring,
            "fingerprint": self.fingerprint,
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        storage.write(path, header, self._sums | self.basis.tensors(self.layers))

    @classmethod
    def load(cls, path: str | PathLike[str], *, backend: str = "auto") -> "Moments":
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: not such a file, or damaged.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, FORMAT, "Moments.save")
        moments = cls(backend=backend)
        with storage.as_damage(path):
            moments.count = header["count"]
            moments.layers = tuple(header["layers"])
            moments._basis = StoredBasis.of(
                tensors, moments.layers, header["heads"], header["centring"], header["fingerprint"]
            )
            moments._dtype = getattr(torch, header["dtype"])
            moments._sums = {name: tensor for name, tensor in tensors.items() if not name.startswith("basis/")}
        return moments
