"""Second-order effects of neurons: what an MLP's neuron gives the embedding through the attention of all later layers.

Neuron ``n`` of layer ``l`` adds its activation times one vector, ``aₙ[i] · wₙ``, to every token ``i``. Each head ``h``
of each later layer ``l'`` reads it and writes to the pooled row. With attention and LayerNorms frozen this is linear::

    φₙ       = Σ_{l'>l} Σ_h s[l',h,n] · d[l',h,n]
    s[l',h,n] = Σᵢ α[l',h,i] aₙ[i] / σ_{l'}[i] / (σ ‖y‖)                                    per image, a number
    d[l',h,n] = (wₙ ∘ γ_{l'}) W_V^{l',h} W_O^{l',h} γP                                       per model, [D]

``α`` is the pooled row's attention, ``γ_{l'}`` and ``σ_{l'}[i]`` are weight and standard deviation of the norm before
the attention of ``l'``, those without an index belong to the final norm; ``wₙ`` and ``W_O`` have their layer scales in
them. As everywhere here effects are divided by the embedding's norm ``‖y‖``. Source: arXiv 2406.04341, whose formula
leaves the norms out; its code freezes them as above.

What belongs to no neuron is :attr:`NeuronEffects.shared`, one vector per image: biases of the MLP, of norms, values and
outputs, and means. Means are split as everywhere: with centring ``"uniform"``, the paper's code, a norm's mean is split
evenly over the terms it reads, and a neuron's path has none of it; with ``"termwise"`` every path is centred where a
norm centres it, and only standard deviations are frozen. The paper's code gives each of the layer's ``M`` neurons a
part ``shared / M`` (``even=True`` here). All neurons and ``shared`` add up to the second-order effect of the whole MLP.

No tensor of tokens, neurons and dimensions is formed. Per image there are ``F·M`` numbers, the sums ``s``; ``d`` stays
in two factors, and is multiplied out for some neurons at a time.

``B`` images, ``N`` tokens, ``W`` width, ``M`` neurons of a layer, ``H`` heads, ``E`` head_dim, ``D`` embed_dim, ``T``
texts, ``P`` chosen neurons, ``F`` later heads: those of layer ``l + 1`` first, ``H`` of each layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from clipfast.analyses.gradients import check_images
from clipfast.basis import Centring, autocast_disabled
from clipfast.errors import InputError
from clipfast.fingerprint import Weights, fingerprint
from clipfast.forward.blocks import attend, mlp_in, mlp_out, normalise, project_in, project_out, statistics
from clipfast.forward.embedding import embed
from clipfast.forward.pooling import pool, read_row
from clipfast.kernels import ops
from clipfast.towers.tower import Block, LayerNorm, Tower

Neurons: TypeAlias = Sequence[int] | Tensor
"""Neurons of a layer, ``[P]``."""

_TOGETHER = 2**23  # numbers of directions that are multiplied out at once: 32 MiB in float32


class HasTower(Protocol):
    """A model with a vision transformer that takes images."""

    backend: str

    @property
    def tower(self) -> Tower:
        """The vision tower."""

    def prepare(self, images: Any) -> Tensor:
        """Preprocessed images, ``[B, 3, height, width]``."""


# ------------------------------------------------------------------------------------------------- the model's part


@dataclass(frozen=True)
class _Reads:
    """How the heads of one later layer read, write and are read, all norms' weights and layer scales folded in.

    Attributes:
        value: ``[H, E, W]``, W_V.
        value_bias: ``[H, E]``.
        gamma: ``[W]``, of the norm before the attention.
        beta: ``[W]``.
        out: ``[H, E, W]``, W_O.
        out_bias: ``[W]``.
    """

    value: Tensor
    value_bias: Tensor
    gamma: Tensor
    beta: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def of(cls, block: Block, heads: int, dtype: torch.dtype) -> "_Reads":
        value = block.query_key_value()[2]
        out, out_bias = block.out_weight.to(dtype), block.out_bias.to(dtype)
        if block.attention_scale is not None:
            scale = block.attention_scale.to(dtype)
            out, out_bias = out * scale[:, None], out_bias * scale
        weight = value.weight.to(dtype)
        bias = weight.new_zeros(len(weight)) if value.bias is None else value.bias.to(dtype)
        gamma, beta = _affine(block.ln_1, dtype)
        by_head = (heads, -1)
        return cls(
            weight.unflatten(0, by_head), bias.unflatten(0, by_head), gamma, beta, out.T.unflatten(0, by_head), out_bias
        )


def _affine(norm: LayerNorm | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert norm is not None  # see check_images
    return norm.weight.to(dtype), norm.bias.to(dtype)


class PathWeights:
    """The model's part of every neuron's second-order effect, ``d[l',h,n]``, in two factors.

    Attributes:
        layer: whose neurons.
        read: ``[F, E, M]``, ``W_V (γ ∘ wₙ)`` of every later head.
        write: ``[F, E, D]``, ``W_O γP`` of the same.
        centring: how means are split.
        fingerprint: of the tower, :func:`clipfast.fingerprint.fingerprint`.

    Args:
        tower: a tower that :func:`.gradients.check_images` accepts.
        layer: whose neurons, from 0; not the last layer.
        centring: ``"uniform"`` or ``"termwise"``.
        digest: the tower's fingerprint, where it is known.
    """

    @torch.no_grad()
    def __init__(self, tower: Tower, layer: int, centring: Centring = "uniform", digest: str | None = None) -> None:
        dtype = torch.promote_types(tower.dtype, torch.float32)
        self.layer = layer
        self.fingerprint = fingerprint(tower) if digest is None else digest
        self.centring: Centring = centring
        self.later = tuple(range(layer + 1, tower.layers))
        block, centres = tower.blocks[layer], centring == "termwise"
        weight, bias = block.mlp_out_weight.to(dtype), block.mlp_out_bias.to(dtype)
        if block.mlp_scale is not None:
            scale = block.mlp_scale.to(dtype)
            weight, bias = weight * scale[:, None], bias * scale
        if centres:
            weight, bias = weight - weight.mean(0), bias - bias.mean()
        gamma, self._beta = _affine(tower.ln_post, dtype)
        self._projection = None if tower.projection is None else tower.projection.to(dtype)
        self._final_gamma, self._mlp_bias, self._terms = gamma, bias, tower.terms
        self._reads = [_Reads.of(tower.blocks[later], tower.heads, dtype) for later in self.later]
        self.read = torch.cat([(reads.value * reads.gamma) @ weight for reads in self._reads])
        self.write = torch.cat([self._to_embedding(reads.out) for reads in self._reads])

    @property
    def heads(self) -> int:
        """All later heads, ``F``."""
        return self.read.shape[0]

    @property
    def neurons(self) -> int:
        """Neurons of the layer, ``M``."""
        return self.read.shape[2]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding, ``D``."""
        return self.write.shape[2]

    def _to_embedding(self, rows: Tensor) -> Tensor:
        """Rows of the last residual stream through the final norm and the projection, without σ and β."""
        if self.centring == "termwise":
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * self._final_gamma
        return rows if self._projection is None else rows @ self._projection

    def towards(self, directions: Tensor) -> Tensor:
        """``⟨d[l',h,n], t⟩`` for directions ``[..., D]``, such as texts: ``[..., F, M]``."""
        return torch.einsum("fed,...d,fem->...fm", self.write, directions.to(self.write), self.read)

    def rows(self, neurons: Neurons) -> Tensor:
        """``d[l',h,n]`` of some neurons, ``[P, F, D]``: ``F·D`` numbers each.

        Raises:
            InputError: no such neuron.
        """
        return self._rows(self.resolve(neurons))

    def _rows(self, neurons: Tensor) -> Tensor:
        return (self.read[:, :, neurons].transpose(1, 2) @ self.write).transpose(0, 1)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All neurons, some at a time: their numbers ``[P]`` and ``d``, ``[P, F, D]``."""
        count = max(1, _TOGETHER // (self.heads * self.embed_dim))
        for part in torch.arange(self.neurons, device=self.read.device).split(count):
            yield part, self._rows(part)

    def expand(self, amounts: Tensor, neurons: Neurons) -> Tensor:
        """``Σ amounts[l',h,n] · d[l',h,n]`` over heads, ``[B, F, P] → [B, P, D]``.

        Raises:
            InputError: no such neuron.
        """
        chosen = self.resolve(neurons)
        count = max(1, _TOGETHER // (self.heads * self.embed_dim))
        parts = [
            torch.einsum("bfp,pfd->bpd", of.to(self.write), self._rows(part))
            for part, of in zip(chosen.split(count), amounts.split(count, 2), strict=True)
        ]
        return torch.cat(parts, 1) if len(chosen) else self.write.new_empty(len(amounts), 0, self.embed_dim)

    def sum(self, amounts: Tensor) -> Tensor:
        """``Σ amounts[l',h,n] · d[l',h,n]`` over heads and neurons, ``[B, F, M] → [B, D]``."""
        codes = torch.einsum("bfm,fem->bfe", amounts.to(self.read), self.read)
        return torch.einsum("bfe,fed->bd", codes, self.write)

    def shared(self, reads: Sequence["_Row"], mean: Tensor, std: Tensor, norm: Tensor) -> Tensor:
        """What belongs to no neuron, ``[B, D]``.

        Args:
            reads: of each later layer.
            mean: ``[B]``, of the final norm.
            std: ``[B]``.
            norm: ``[B]``, of the embedding.
        """
        total = self.write.new_zeros(len(mean), self.embed_dim)
        for later, layer, row in zip(self.later, self._reads, reads, strict=True):
            terms = 1 + 2 * later  # that the norm before this attention reads
            tokens = row.weight[..., None] * (layer.gamma * self._mlp_bias) + layer.beta / terms  # [B, H, W]
            if self.centring == "uniform":
                tokens = tokens - row.mean[..., None] / terms * layer.gamma
            values = torch.einsum("bhw,hew->bhe", tokens, layer.value) + layer.value_bias / terms
            added = torch.einsum("bhe,hew->bw", values, layer.out) + layer.out_bias / terms
            if self.centring == "uniform":
                added = added - (mean / (terms * self._terms))[:, None]
            total += self._to_embedding(added) / std[:, None]
            beta = self._beta if self._projection is None else self._beta @ self._projection
            total += beta / (terms * self._terms)
        return total / norm[:, None]

    def resolve(self, neurons: Neurons) -> Tensor:
        """Neurons as a tensor ``[P]``, where the weights are.

        Raises:
            InputError: something else, or no such neuron.
        """
        listed = neurons if isinstance(neurons, Tensor) else torch.tensor([*neurons])
        listed = listed if listed.numel() else listed.long()
        if listed.ndim != 1 or listed.is_floating_point() or listed.dtype == torch.bool:
            raise InputError(f"neurons are {listed.dtype} {list(listed.shape)}, expected integers [neurons]")
        wrong = listed[(listed < 0) | (listed >= self.neurons)]
        if len(wrong):
            raise InputError(
                f"neuron {int(wrong[0])} does not exist: layer {self.layer} has neurons 0 to {self.neurons - 1}"
            )
        return listed.long().to(self.read.device)

    def check_features(self, features: Tensor) -> Tensor:
        """Features ``[T, D]`` where the weights are, in their dtype; :class:`InputError` for another shape."""
        if features.ndim != 2 or features.shape[1] != self.embed_dim:
            raise InputError(f"text_features has shape {list(features.shape)}, expected [texts, {self.embed_dim}]")
        return features.to(self.write)

    def same_as(self, other: "PathWeights") -> bool:
        """Whether both are of the same layer, centring and weights, wherever they are kept."""
        mine, theirs = ((each.layer, each.centring, each.fingerprint) for each in (self, other))
        return mine == theirs


# ------------------------------------------------------------------------------------------------------ the forward


@dataclass(frozen=True)
class _Row:
    """What the pooled row reads of the tokens through the heads of one layer.

    Attributes:
        tokens: ``[B, H, N]``, ``α[h,i] / σ[i]``.
        weight: ``[B, H]``, its sum.
        mean: ``[B, H]``, the tokens' means added up with it.
    """

    tokens: Tensor
    weight: Tensor
    mean: Tensor


class SecondOrder:
    """Second-order effects of the neurons of some layers.

    The model's part is made once, and every call of :meth:`decompose` runs one forward for all layers.

    >>> lens = SecondOrder(model, layers=[8, 9, 10])
    >>> for effects in lens.decompose(images):
    ...     effects.norms()

    Args:
        model: a CLIP vision transformer, class token or mean pooled.
        layers: whose neurons, any but the last; default all of them.
        centring: how means are split: ``"uniform"``, as the paper's code, or ``"termwise"``.

    Attributes:
        layers: ascending.
        weights: the model's part of each.

    Raises:
        InputError: no such layer or centring, or a model that is no such transformer, with every reason.
    """

    def __init__(
        self, model: HasTower, layers: int | Sequence[int] | None = None, *, centring: Centring = "uniform"
    ) -> None:
        if centring not in get_args(Centring):
            raise InputError(f"centring is {centring!r}: choose one of {', '.join(get_args(Centring))}")
        tower = model.tower
        check_images(tower, torch.zeros(0, 3, *tower.image_size))
        self.layers = _layers(tower, layers)
        self._model, self._watch, digest = model, Weights(), fingerprint(tower)
        self._state = self._watch.all(tower.tensors())
        with torch.inference_mode(False), autocast_disabled(next(iter(tower.tensors()))):
            self.weights = tuple(PathWeights(tower, layer, centring, digest) for layer in self.layers)

    @torch.no_grad()
    def decompose(self, images: Any, *, tokens: bool = False) -> tuple["NeuronEffects", ...]:
        """Effects of all neurons of the layers on the embeddings of some images.

        Besides a forward's own memory it takes ``B·N·M`` numbers for every layer.

        Args:
            images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
            tokens: keep activations and attention of every token, for :meth:`NeuronEffects.maps`.

        Returns:
            One per layer, in the order of :attr:`layers`.

        Raises:
            InputError: images that do not fit, or weights that have changed since.
            ImageError: a file that cannot be read.
        """
        tower, backend = self._model.tower, self._model.backend
        if self._watch.all(tower.tensors()) != self._state:
            raise InputError("the model's weights have changed since this was made: make a new SecondOrder")
        pixels = check_images(tower, self._model.prepare(images))
        with autocast_disabled(pixels):
            return self._decompose(tower, pixels, backend, tokens)

    def _decompose(self, tower: Tower, images: Tensor, backend: str, tokens: bool) -> tuple["NeuronEffects", ...]:
        x = embed(tower, images, backend)
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        added: Tensor | None = None
        active: dict[int, Tensor] = {}  # layer → activations [B, N, M]
        sums: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}  # layer → [B, H, M] of each later one
        rows: list[_Row] = []  # of every layer after the first one chosen
        for layer, block in enumerate(tower.blocks):
            normed = normalise(x, added, block.ln_1, backend)
            qkv = project_in(tower, normed, block, backend)
            del normed
            needs_row = layer > self.layers[0]
            is_last = layer == tower.layers - 1 and tower.pooling == "cls"
            if is_last:  # of its tokens only the pooled one is read
                z, alpha = ops.query_row(qkv[:, 0, 0].contiguous(), qkv[:, :, 1], qkv[:, :, 2], backend=backend)
                out = z[:, None].to(x.dtype)
            else:
                out, row = attend(qkv, block, _pooled(tower) if needs_row else None, backend)
                alpha = row if row is not None else out.new_empty(0)
            del qkv
            if needs_row:
                rows.append(_read(x, block, alpha.to(acc_dtype), backend))
                for earlier, activation in active.items():
                    sums[earlier].append(rows[-1].tokens @ activation.to(acc_dtype))
            if is_last:
                x = x[:, :1].contiguous()
            added = project_out(out.flatten(2), block, backend)
            hidden = mlp_in(normalise(x, added, block.ln_2, backend), block, tower.activation, backend)
            if layer in sums:
                active[layer] = hidden
            added = mlp_out(hidden, block, backend)
        assert added is not None
        read = read_row(tower, pool(tower, x.add_(added)), x.dtype, backend)
        norm = read.embedding.to(acc_dtype).norm(dim=-1)
        mean, std = read.mean.to(acc_dtype), read.std.to(acc_dtype)
        scale = 1 / (std * norm)
        return tuple(
            NeuronEffects(
                embedding=read.embedding,
                norm=norm,
                coefficients=torch.cat(sums[layer], 1) * scale[:, None, None],
                shared=weights.shared(rows[layer - self.layers[0] :], mean, std, norm),
                grid=tower.grid,
                weights=weights,
                activations=active[layer] if tokens else None,
                attention=_scaled(rows[layer - self.layers[0] :], scale) if tokens else None,
            )
            for layer, weights in zip(self.layers, self.weights, strict=True)
        )


def _pooled(tower: Tower) -> Any:
    """The attention row that kernels give."""
    return "cls" if tower.pooling == "cls" else "mean"


def _read(x: Tensor, block: Block, alpha: Tensor, backend: str) -> _Row:
    mean, std = statistics(x, block.ln_1, backend)
    tokens = alpha / std.to(alpha)[:, None]
    return _Row(tokens, tokens.sum(-1), (tokens @ mean.to(alpha)[..., None])[..., 0])


def _scaled(rows: Sequence[_Row], scale: Tensor) -> Tensor:
    return torch.cat([row.tokens for row in rows], 1) * scale[:, None, None]


def _layers(tower: Tower, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """Layers to look at, ascending.

    Raises:
        InputError: none, or one that has no later layer.
    """
    last = tower.layers - 1
    listed = range(last) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in listed if not (isinstance(layer, int) and 0 <= layer < last)]
    if wrong or not len(listed):
        what = f"layer {wrong[0]} has" if wrong else "there are no layers whose neurons have"
        raise InputError(
            f"{what} no second-order effects: choose from layers 0 to {last - 1}, those before the last"
            if last
            else "a tower of one layer has no second-order effects: no attention comes after its MLP"
        )
    return tuple(sorted(set(listed)))


def decompose(
    model: HasTower, images: Any, layer: int, *, centring: Centring = "uniform", tokens: bool = False
) -> "NeuronEffects":
    """Second-order effects of one layer's neurons; for many batches make a :class:`SecondOrder` once.

    Args:
        model: a CLIP vision transformer.
        images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
        layer: whose neurons, any but the last.
        centring: how means are split.
        tokens: keep activations and attention of every token, for :meth:`NeuronEffects.maps`.

    Raises:
        InputError: as :class:`SecondOrder` and its :meth:`~SecondOrder.decompose`.
        ImageError: a file that cannot be read.
    """
    (effects,) = SecondOrder(model, layer, centring=centring).decompose(images, tokens=tokens)
    return effects


# -------------------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True)
class NeuronEffects:
    """The second-order effects of one layer's neurons on some images, divided by their embeddings' norms.

    Attributes:
        embedding: ``[B, D]``.
        norm: ``[B]``, its norm.
        coefficients: ``[B, F, M]``, ``s[l',h,n]``.
        shared: ``[B, D]``, what belongs to no neuron.
        grid: rows and columns of patches.
        weights: the model's part.
        activations: ``[B, N, M]``, ``aₙ[i]``, where they were kept.
        attention: ``[B, F, N]``, ``α[l',h,i] / σ_{l'}[i] / (σ ‖y‖)``, where it was kept.
    """

    embedding: Tensor
    norm: Tensor
    coefficients: Tensor
    shared: Tensor
    grid: tuple[int, int]
    weights: PathWeights
    activations: Tensor | None = None
    attention: Tensor | None = None

    def __len__(self) -> int:
        """Images, ``B``."""
        return len(self.embedding)

    def __getitem__(self, images: slice) -> "NeuronEffects":
        """Some of the images."""
        names = ("embedding", "norm", "coefficients", "shared", "activations", "attention")
        parts = {name: getattr(self, name) for name in names}
        kept: dict[str, Any] = {name: part[images] for name, part in parts.items() if part is not None}
        return replace(self, **kept)

    @property
    def layer(self) -> int:
        """Whose neurons."""
        return self.weights.layer

    def is_finite(self) -> bool:
        """Whether every effect is a number."""
        return bool(self.coefficients.isfinite().all()) and bool(self.shared.isfinite().all())

    def vectors(self, neurons: Neurons, *, even: bool = False) -> Tensor:
        """Effects of some neurons, ``[B, P, D]``.

        Args:
            neurons: which.
            even: with an even part of :attr:`shared`, as the paper's code gives them.

        Raises:
            InputError: no such neuron.
        """
        chosen = self.weights.resolve(neurons)
        vectors = self.weights.expand(self.coefficients[:, :, chosen], chosen)
        return vectors + (self.shared / self.weights.neurons)[:, None] if even else vectors

    def norms(self, mean: Tensor | None = None) -> Tensor:
        """``‖φₙ‖`` of every neuron, ``[B, M]``.

        Args:
            mean: ``[F, M]``, mean coefficients: give the norm of the deviation from this mean instead.

        Raises:
            InputError: a mean of another shape.
        """
        amounts = self.coefficients if mean is None else self.deviations(mean)
        result = amounts.new_empty(len(self), self.weights.neurons)
        for neurons, rows in self.weights.pieces():
            result[:, neurons] = torch.einsum("bfp,pfd->bpd", amounts[:, :, neurons], rows).norm(dim=-1)
        return result

    def deviations(self, mean: Tensor) -> Tensor:
        """Coefficients less a mean, ``[B, F, M]``.

        Args:
            mean: ``[F, M]``, as :attr:`.EffectMoments.mean`.

        Raises:
            InputError: a mean of another shape.
        """
        expected = self.coefficients.shape[1:]
        if mean.shape != expected:
            raise InputError(f"mean has shape {list(mean.shape)}, expected [later heads, neurons] {list(expected)}")
        return self.coefficients - mean.to(self.coefficients)

    def shares(self) -> Tensor:
        """The part of the embedding that every neuron writes through later attention, ``⟨φ, y⟩ / ‖y‖``, ``[B, M]``."""
        embedding = self.embedding.to(self.norm) / self.norm[:, None]
        codes = torch.einsum("fed,bd->bfe", self.weights.write, embedding)
        along = torch.einsum("bfe,fem->bfm", codes, self.weights.read)
        return (self.coefficients * along).sum(1)

    def scores(self, text_features: Tensor) -> Tensor:
        """``⟨φₙ, t⟩`` of every neuron and text, ``[B, M, T]``.

        Raises:
            InputError: features of another width.
        """
        texts = self.weights.check_features(text_features)
        along = [torch.einsum("bfm,fm->bm", self.coefficients, self.weights.towards(text)) for text in texts]
        return torch.stack(along, 2) if along else self.coefficients.new_empty(len(self), self.weights.neurons, 0)

    def along(self, directions: Tensor, mean: Tensor | None = None) -> Tensor:
        """How far each neuron goes along a direction of its own, ``⟨φₙ, uₙ⟩``, ``[B, M]``.

        Args:
            directions: ``[M, D]``.
            mean: ``[F, M]``, mean coefficients that are subtracted first.

        Raises:
            InputError: directions or a mean of another shape.
        """
        along = _own(self.weights, directions)
        return ((self.coefficients if mean is None else self.deviations(mean)) * along).sum(1)

    def total(self) -> Tensor:
        """The second-order effect of the whole MLP, ``[B, D]``: all neurons and :attr:`shared`."""
        return self.weights.sum(self.coefficients) + self.shared

    def by_layer(self) -> Tensor:
        """What all neurons give through every later layer, ``[B, later layers, D]``, without :attr:`shared`."""
        codes = torch.einsum("bfm,fem->bfe", self.coefficients, self.weights.read)
        heads = torch.einsum("bfe,fed->bfd", codes, self.weights.write)
        return heads.unflatten(1, (len(self.weights.later), -1)).sum(2)

    def ablated(self, mean: Tensor, neurons: Neurons | None = None, *, mask: Tensor | None = None) -> Tensor:
        """``y / ‖y‖`` with the effects of some neurons replaced by their means, ``[B, D]``.

        Args:
            mean: ``[F, M]``, as :attr:`.EffectMoments.mean`.
            neurons: the same for all images; default all.
            mask: bool ``[B, M]``, those of each image, in place of ``neurons``.

        Raises:
            InputError: shapes that do not fit, no such neuron, or both neurons and a mask.
        """
        deviations = self.deviations(mean)
        shape = (len(self), self.weights.neurons)
        if mask is not None:
            if neurons is not None or mask.dtype != torch.bool or mask.shape != shape:
                raise InputError(f"mask is {mask.dtype} {list(mask.shape)}, expected bool {list(shape)} and no neurons")
            deviations = deviations * mask[:, None].to(deviations)
        elif neurons is not None:
            chosen = deviations.new_zeros(self.weights.neurons)
            chosen[self.weights.resolve(neurons)] = 1
            deviations = deviations * chosen
        return self.embedding.to(self.norm) / self.norm[:, None] - self.weights.sum(deviations)

    def approximated(self, mean: Tensor, directions: Tensor) -> Tensor:
        """``y / ‖y‖`` with every neuron's deviation from its mean projected on one direction, ``[B, D]``.

        Args:
            mean: ``[F, M]``, as :attr:`.EffectMoments.mean`.
            directions: ``[M, D]`` of unit length, such as first principal directions.

        Raises:
            InputError: shapes that do not fit.
        """
        along = self.along(directions, mean)
        return self.ablated(mean) + along @ directions.to(along)

    def activation_maps(self, neurons: Neurons) -> Tensor:
        """Activations of some neurons at every patch, ``[B, rows, columns, P]``.

        Raises:
            InputError: no such neuron, or decomposed without ``tokens=True``.
        """
        return self._patches(self._kept()[0][:, :, self.weights.resolve(neurons)])

    def maps(self, text_features: Tensor, neurons: Neurons | None = None) -> Tensor:
        """Where neurons speak for texts through later attention, ``[B, rows, columns, T]``.

        Over all tokens, prefix tokens too, a map adds up to the neurons' scores.

        Args:
            text_features: ``[T, D]``.
            neurons: whose effects are added up; default all.

        Raises:
            InputError: features of another width, no such neuron, or decomposed without ``tokens=True``.
        """
        activations, attention = self._kept()
        along = self.weights.towards(self.weights.check_features(text_features))  # [T, F, M]
        if neurons is not None:
            chosen = self.weights.resolve(neurons)
            activations, along = activations[:, :, chosen], along[:, :, chosen]
        maps = [torch.einsum("bfn,bnm,fm->bn", attention, activations.to(one), one) for one in along]
        return self._patches(torch.stack(maps, 2) if maps else attention.new_empty(*attention.shape[::2], 0))

    def _kept(self) -> tuple[Tensor, Tensor]:
        if self.activations is None or self.attention is None:
            raise InputError("maps need every token's activations: decompose with tokens=True")
        return self.activations, self.attention

    def _patches(self, x: Tensor) -> Tensor:
        rows, columns = self.grid
        return x[:, -rows * columns :].unflatten(1, (rows, columns))


def _own(weights: PathWeights, directions: Tensor) -> Tensor:
    """``⟨d[l',h,n], uₙ⟩``, each neuron with its own direction, ``[F, M]``."""
    expected = (weights.neurons, weights.embed_dim)
    if directions.shape != expected:
        raise InputError(f"directions have shape {list(directions.shape)}, expected {list(expected)}, one per neuron")
    return torch.einsum("fed,md,fem->fm", weights.write, directions.to(weights.write), weights.read)
