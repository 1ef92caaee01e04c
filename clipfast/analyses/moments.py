"""Mean and second moment of what every head writes: one pass over the images, TEXTSPAN of any texts afterwards.

Kept per head in code space, ``x = [z, 1, μ, σ] / (σ n)`` (:mod:`clipfast.basis`): what a head writes is ``x @ basis``,
so mean and covariance of it follow exactly, for centring ``"uniform"`` too, from sums of ``x`` and ``x xᵀ``. Sums are
float64, about a centre near the mean so that nothing cancels, and those of shards merge (Chan, Golub & LeVeque 1983).

An update on a GPU queues its work and does not wait for it. Whether a batch was finite is then known later: a batch
that was not adds nothing, and the error is raised by the next call that finds out.

``G`` heads of all layers kept, ``E`` head_dim, ``D`` embed_dim, ``X = E + 3``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from clipfast import storage
from clipfast.analyses import textspan as pursuit
from clipfast.analyses.protocols import HasBasis
from clipfast.analyses.spans import HeadSpans, noise, of_codes
from clipfast.analyses.textspan import Method, TextSpan
from clipfast.basis import Basis, Depth, StoredBasis
from clipfast.contributions import Contributions
from clipfast.errors import InputError, NotKept
from clipfast.indices import resolve_heads
from clipfast.kernels import ops

FORMAT = "clipfast.moments/2"
_SHARED = 3  # entries of a code that are the same for every head: 1, μ and σ


@dataclass(frozen=True)
class _Unchecked:
    """A batch that was added on a GPU before it was known to be finite.

    Attributes:
        images: how many.
        finite: bool on the CPU, to be read after the event.
        event: behind the copy to ``finite``; None where nothing is queued.
    """

    images: int
    finite: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, images: int, finite: Tensor) -> "_Unchecked":
        """A batch whose answer is copied from its device without waiting."""
        if not finite.is_cuda:
            return cls(images, finite, None)
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(finite.device))
        return cls(images, host, event)

    def is_known(self, wait: bool) -> bool:
        """Whether ``finite`` can be read; always after waiting."""
        if self.event is None:
            return True
        if wait:
            self.event.synchronize()
        return self.event.query()

    def is_refused(self) -> bool:
        """Whether the batch was not finite; read without torch, which would count it as a wait for the device."""
        return not bool(self.finite.numpy())


@dataclass(frozen=True)
class _State:
    """Everything that images add to, replaced as a whole: an interrupted update leaves the state before it."""

    count: int = 0
    layers: tuple[int, ...] = ()
    basis: Basis | None = None
    dtype: torch.dtype = torch.float32  # of the embeddings: says what is noise
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    unchecked: tuple[_Unchecked, ...] = ()  # batches that count already and turn out later to have added nothing


_NOT_FINITE = "a contribution is not finite: the image or a weight is not, or an embedding is zero"


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
        depth: which of its heads, as for :meth:`clipfast.Model.decompose`; default the model's.
    """

    def __init__(
        self, model: HasBasis | None = None, *, backend: str | None = None, depth: Depth | None = None
    ) -> None:
        self.backend = backend or ("auto" if model is None else model.backend)
        self._latest = _State(basis=None if model is None else model.basis(depth=depth) if depth else model.basis())
        self._spans: tuple[_State, HeadSpans] | None = None

    def __repr__(self) -> str:
        return f"Moments({', '.join(f'{what} {value}' for what, value in self._rows())})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        cells = "".join(f"<tr><th>{what}</th><td>{value}</td></tr>" for what, value in self._rows())
        return f"<p><b>Moments</b> of every head's contributions</p><table>{cells}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        """What the moments hold, without waiting for batches that a GPU still works on."""
        state = self._latest
        rows = [("images", f"{state.count:,}")]
        if state.basis is not None:
            rows.append(("heads per layer", str(state.basis.heads)))
        if state.count:
            rows += [
                ("layers", ", ".join(map(str, state.layers))),
                ("head_dim", str(state.sums["total"].shape[1] - _SHARED)),
            ]
            rows.append(("class token", "kept" if "class" in state.sums else "not kept"))
        return rows

    @property
    def _state(self) -> _State:
        """The state with every batch checked; waits for the batches that a GPU still works on."""
        self._settle(wait=True)
        return self._latest

    def settle(self) -> None:
        """Waits until every batch is known to be finite or left out; nothing to do on the CPU.

        Raises:
            InputError: a batch was not finite and was left out.
        """
        self._settle(wait=True)

    def _settle(self, *, wait: bool) -> None:
        """Takes the batches that were not finite out of the count; their sums never had them.

        Raises:
            InputError: there were such batches; raised once.
        """
        state = self._latest
        known = [batch.is_known(wait) for batch in state.unchecked]
        if not any(known):
            return
        left = tuple(batch for batch, is_known in zip(state.unchecked, known, strict=True) if not is_known)
        refused = [
            batch.images
            for batch, is_known in zip(state.unchecked, known, strict=True)
            if is_known and batch.is_refused()
        ]
        self._latest = replace(state, count=state.count - sum(refused), unchecked=left)
        if refused:
            raise InputError(f"{_NOT_FINITE}; batches of {', '.join(map(str, refused))} images were left out")

    @property
    def count(self) -> int:
        """Images seen; raises as :meth:`update` where a batch on a GPU turns out not to be finite."""
        return self._state.count

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose heads are covered, known after the first update."""
        return self._state.layers

    @property
    def _sums(self) -> Mapping[str, Tensor]:
        return self._state.sums

    @property
    def basis(self) -> Basis:
        """The model's part of the contributions.

        Raises:
            InputError: no model was passed and no images were added.
        """
        if self._state.basis is None:
            raise InputError("these moments are empty: update them with contributions first")
        return self._state.basis

    @property
    def fingerprint(self) -> str:
        """Of the model's vision weights, 32 hexadecimal digits; raises as :attr:`basis`."""
        return self.basis.fingerprint

    def update(self, contributions: Contributions) -> None:
        """Adds a batch; a call that fails or is interrupted adds none of it.

        On a GPU this does not wait for the batch. One that is not finite adds nothing, and the next update or the next
        look at the moments raises the error instead, once.

        Raises:
            InputError: contributions of another model, of other layers, or with values that are not finite.
        """
        self._settle(wait=False)
        if not len(contributions):
            return
        class_codes = contributions.class_codes if "class_token" in contributions.kept else None
        state = self._expect(contributions.basis, contributions.layers, class_codes is not None)
        finite, later = contributions.is_finite().all(), _is_checked_later(contributions.codes.device)
        if not later and not bool(finite):
            raise InputError(_NOT_FINITE)
        scale = 1 / (contributions.std * contributions.norm)
        shared = torch.stack([scale, contributions.mean * scale, 1 / contributions.norm], 1)  # [B, 3]
        codes = contributions.codes.flatten(1, 2)  # [B, G, E]
        others = torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1).double()  # [B, terms, D]
        if not state.count:
            state = _begin(state, contributions, codes, shared, finite if later else None)
        sums = {name: tensor.to(codes.device, copy=True) for name, tensor in state.sums.items()}
        centre = sums["centre"].to(codes)
        ops.moments(codes, shared, centre, sums["total"], sums["second"], backend=self.backend)
        sums["others"] += others.sum(0)
        if class_codes is not None:
            sums["class"][:, :-_SHARED] += class_codes.flatten(1, 2).double().sum(0)
            sums["class"][:, -_SHARED:] += shared.double().sum(0) / contributions.token_count
        unchecked = state.unchecked
        if later:
            sums = {name: torch.where(finite, added, state.sums[name].to(added)) for name, added in sums.items()}
            unchecked = (*unchecked, _Unchecked.of(len(contributions), finite))
        self._latest = replace(state, count=state.count + len(contributions), sums=sums, unchecked=unchecked)

    def _expect(self, basis: Basis, layers: Sequence[int], class_token: bool) -> _State:
        """The state to add images to; raises if they do not belong to it."""
        state = self._latest if self._latest.basis is not None else replace(self._latest, basis=basis)
        assert state.basis is not None
        if not (state.basis is basis or state.basis.same_as(basis)):
            raise InputError(
                "these contributions are of another model, of other weights or of another centring or image size"
            )
        if state.count and tuple(layers) != state.layers:
            raise InputError(f"these contributions keep layers {list(layers)}, the moments {list(state.layers)}")
        if state.count and class_token != ("class" in state.sums):
            raise InputError("the class token's part is kept by some of these images only: decompose all alike")
        return state

    def merge(self, other: "Moments") -> None:
        """Adds another's images; merging in a fixed order gives the same bits every time.

        Raises:
            InputError: moments of another model or of other layers.
        """
        self._settle(wait=True)
        if not other.count:
            return
        state, added = self._expect(other.basis, other.layers, "class" in other._sums), other._state
        if not state.count:
            sums = {name: tensor.clone() for name, tensor in added.sums.items()}
            self._latest = replace(added, basis=state.basis, sums=sums)
            return
        mine = {name: tensor.clone() for name, tensor in state.sums.items()}
        theirs = {name: tensor.to(mine["total"].device) for name, tensor in added.sums.items()}
        shift = theirs["centre"] - mine["centre"]  # their sums about our centre
        moved = theirs["total"][:, :, None] * shift[:, None]
        mine["second"] += theirs["second"] + moved + moved.transpose(1, 2)
        mine["second"] += added.count * shift[:, :, None] * shift[:, None]
        mine["total"] += theirs["total"] + added.count * shift
        mine["others"] += theirs["others"]
        if "class" in mine:
            mine["class"] += theirs["class"]
        dtype = max(state.dtype, added.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        self._latest = replace(state, count=state.count + added.count, dtype=dtype, sums=mine)

    def means(self) -> Tensor:
        """Mean contribution of every head, ``[L, H, D]``, float64.

        Raises:
            InputError: no images yet.
        """
        return self._expanded(self._mean())

    @property
    def has_class_token(self) -> bool:
        """Whether the images were decomposed with ``class_token=True``: whether :meth:`class_means` is known."""
        return "class" in self._sums

    def class_means(self) -> Tensor:
        """Mean of the class token's own part of every head, ``[L, H, D]``, float64.

        Raises:
            InputError: no images yet.
            NotKept: the images were decomposed without ``class_token=True``.
        """
        self._require()
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
        self._require()
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
        if rank is None and self._spans is not None and self._spans[0] is self._state:
            return self._spans[1]
        mean, covariance = self._mean(), self._covariances()
        moment = covariance * ((self.count - 1) / self.count) + mean[:, :, None] * mean[:, None]  # [G, X, X]
        share = noise(self._state.dtype)
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
            self._spans = self._state, spans
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
        self._require()
        return [(layer, head) for layer in self.layers for head in range(self.basis.heads)]

    def _require(self, images: int = 1) -> None:
        if self.count < images:
            raise InputError(f"the moments of {self.count} images were asked for: at least {images} are needed")

    def _resolve(self, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(layer, head) pairs with layers counted from 0."""
        self._require()
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
        self._require()
        return self._sums["centre"] + self._sums["total"] / self.count

    def _covariances(self) -> Tensor:
        """``[G, X, X]``, unbiased."""
        self._require(2)
        total = self._sums["total"]
        return (self._sums["second"] - total[:, :, None] * total[:, None] / self.count) / (self.count - 1)

    def save(self, path: str | PathLike[str], *, with_basis: bool = True) -> None:
        """Writes sums and basis to one safetensors file.

        Args:
            path: the file.
            with_basis: whether the basis, 20 to 80 MB for large models, is written too. Moments without it are read
                with the basis from elsewhere.

        Raises:
            InputError: no images yet.
            OSError: the file cannot be written.
        """
        self._require()
        header = {
            "format": FORMAT,
            "count": self.count,
            "layers": self.layers,
            "dtype": str(self._state.dtype).removeprefix("torch."),
        }
        basis = self.basis.tensors(self.layers) if with_basis else {}
        storage.write(path, header | self.basis.header(), {**self._sums} | basis)

    @classmethod
    def load(cls, path: str | PathLike[str], *, backend: str = "auto", basis: Basis | None = None) -> "Moments":
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            backend: which kernels compute.
            basis: the basis of moments that were saved without it.

        Raises:
            InputError: not such a file, damaged, without a basis where none is given, or of another model than the
                basis that is given.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, FORMAT, "Moments.save")
        moments = cls(backend=backend)
        with storage.as_damage(path):
            layers = tuple(header["layers"])
            if not any(name.startswith("basis/") for name in tensors):
                if basis is None:
                    raise InputError(f"{path} holds no basis: read it with that of its model")
                if basis.fingerprint != header["fingerprint"] or basis.centring != header["centring"]:
                    raise InputError(f"{path} holds moments of another model than the basis that is given")
            moments._latest = _State(
                count=header["count"],
                layers=layers,
                basis=StoredBasis.of(tensors, layers, header) if basis is None else basis,
                dtype=getattr(torch, header["dtype"]),
                sums={name: tensor for name, tensor in tensors.items() if not name.startswith("basis/")},
            )
        return moments


def _is_checked_later(device: torch.device) -> bool:
    """Whether asking now if a batch is finite would have Python wait for the device."""
    return device.type == "cuda"


def _begin(state: _State, contributions: Contributions, codes: Tensor, shared: Tensor, finite: Tensor | None) -> _State:
    """The state before the first images, with sums of the right sizes.

    Args:
        state: the empty state.
        contributions: of the first images.
        codes: ``[B, G, E]``.
        shared: ``[B, 3]``.
        finite: whether they may give the centre, where that is not known yet.
    """
    groups, columns = codes.shape[1], codes.shape[2] + _SHARED
    zeros = partial(torch.zeros, dtype=torch.float64, device=codes.device)
    centre = torch.cat([codes, shared[:, None].expand(-1, groups, -1)], 2).mean(0).double()
    sums = {
        "centre": centre if finite is None else torch.where(finite, centre, 0),
        "total": zeros(groups, columns),
        "second": zeros(groups, columns, columns),
        "others": zeros(contributions.mlps.shape[1] + 2, contributions.mlps.shape[2]),
    }
    if "class_token" in contributions.kept:
        sums["class"] = zeros(groups, columns)
    return replace(state, layers=contributions.layers, dtype=contributions.embedding.dtype, sums=sums)
