"""Pairs of a neuron and a head: what CLIP's ResNets are made of, where their convolutions end.

An attention pool reads tokens ``xᵢ`` with weights ``α[h,i]``, so neuron ``n`` of the last feature map adds, through
head ``h``, ``Σᵢ α[h,i] xᵢ[n] · W_VO[h][n,:]`` to the embedding: a number per image times a direction of the model. All
pairs and a constant add up to the embedding. Only the numbers ``s[h,n] = Σᵢ α[h,i] xᵢ[n]`` are kept of an image; norms,
scores and maps follow from them and ``W_VO``, which stays in two factors. Source: arXiv 2509.19943.

Tokens here are what the pool reads, with the mean token before the positions and positional embeddings in all. The
paper's code gives every neuron an equal part of the values' bias; here the biases are the constant. It does not move a
pair's direction, its deviation from a mean, or what a mean-ablation gives.

``B`` images, ``N`` tokens, ``C`` neurons, ``H`` heads, ``E`` head_dim, ``D`` embed_dim, ``T`` texts, ``P`` pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import autocast_disabled
from clipfast.errors import InputError
from clipfast.towers.tower import AttentionPool, Tower

Pairs: TypeAlias = Sequence[tuple[int, int]] | Tensor
"""Pairs as (head, neuron), ``[P, 2]``."""
MapMethod = Literal["exact", "published"]

_TOGETHER = 4096  # pairs at once: their part of a map stays around 3 MB per image of RN50x16


class HasPool(Protocol):
    """A model with an attention pool that takes images."""

    @property
    def tower(self) -> Tower:
        """The vision tower."""

    def prepare(self, images: Any) -> Tensor:
        """Preprocessed images, ``[B, 3, height, width]``."""


class PairWeights:
    """The model's part of every pair, ``W_VO[h][n,:]``, in two factors that are never multiplied out.

    Attributes:
        values: ``[H, E, C]``, the values' weights.
        out: ``[H, E, D]``, the output projection of each head, through the final projection where there is one.
        constant: ``[D]``, what all biases add to the embedding.

    Args:
        tower: a tower without blocks whose attention pool gives the embedding.

    Raises:
        InputError: another tower.
    """

    def __init__(self, tower: Tower) -> None:
        pool = _pool(tower)
        dtype = torch.promote_types(tower.dtype, torch.float32)
        self.values = pool.value_weight.detach().to(dtype).unflatten(0, (pool.heads, -1))
        out, constant = pool.out_weight.detach().to(dtype).T, pool.out_bias.detach().to(dtype)
        if pool.value_bias is not None:
            constant = constant + pool.value_bias.detach().to(dtype) @ out
        if tower.projection is not None:
            projection = tower.projection.detach().to(dtype)
            out, constant = out @ projection, constant @ projection
        if tower.projection_bias is not None:
            constant = constant + tower.projection_bias.detach().to(dtype)
        self.out = out.unflatten(0, (pool.heads, -1))
        self.constant = constant

    @property
    def heads(self) -> int:
        """Heads of the pool, ``H``."""
        return self.values.shape[0]

    @property
    def neurons(self) -> int:
        """Channels of the last feature map, ``C``."""
        return self.values.shape[2]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding, ``D``."""
        return self.out.shape[2]

    @cached_property
    def norms(self) -> Tensor:
        """``‖W_VO[h][n,:]‖``, ``[H, C]``."""
        gram = self.out @ self.out.transpose(1, 2)  # [H, E, E]
        return (self.values * (gram @ self.values)).sum(1).clamp_min(0).sqrt()

    def towards(self, directions: Tensor) -> Tensor:
        """``⟨W_VO[h][n,:], t⟩`` for directions ``[..., D]``, such as texts: ``[..., H, C]``."""
        return torch.einsum("hed,...d,hec->...hc", self.out, directions.to(self.out), self.values)

    def rows(self, pairs: Pairs) -> Tensor:
        """``W_VO[h][n,:]`` of some pairs, ``[P, D]``."""
        heads, neurons = self.resolve(pairs).unbind(1)
        if not len(heads):
            return self.out.new_empty(0, self.embed_dim)
        parts = [
            torch.einsum("pe,ped->pd", self.values[part, :, of], self.out[part])
            for part, of in zip(heads.split(_TOGETHER), neurons.split(_TOGETHER), strict=True)
        ]
        return torch.cat(parts)

    def sum(self, amounts: Tensor) -> Tensor:
        """``Σ amounts[h,n] · W_VO[h][n,:]``, ``[B, H, C] → [B, D]``."""
        return torch.einsum("bhe,hed->bd", self.code(amounts), self.out)

    def code(self, amounts: Tensor) -> Tensor:
        """The same before the output projection, ``[B, H, C] → [B, H, E]``."""
        return torch.einsum("bhc,hec->bhe", amounts.to(self.values), self.values)

    def resolve(self, pairs: Pairs) -> Tensor:
        """Pairs as a tensor ``[P, 2]`` of (head, neuron), where the weights are.

        Raises:
            InputError: something else, or no such pair.
        """
        listed = pairs if isinstance(pairs, Tensor) else torch.tensor([*pairs], dtype=torch.long).view(-1, 2)
        if listed.ndim != 2 or listed.shape[1] != 2 or listed.is_floating_point():
            raise InputError(f"pairs are {listed.dtype} {list(listed.shape)}, expected integers [pairs, 2]")
        limits = listed.new_tensor([self.heads, self.neurons])
        wrong = listed[((listed < 0) | (listed >= limits)).any(1)]
        if len(wrong):
            head, neuron = wrong[0].tolist()
            raise InputError(
                f"no head {head} with neuron {neuron}: there are {self.heads} heads, {self.neurons} neurons"
            )
        return listed.long().to(self.values.device)


def _pool(tower: Tower) -> AttentionPool:
    """The pool whose output is the embedding, up to a linear map.

    Raises:
        InputError: a tower with another pooling.
    """
    pool = tower.pool
    if tower.blocks or tower.embedder is None or pool is None or pool.query.ndim != 2:
        raise InputError(
            "neuron-head pairs need the attention pool of a ResNet of CLIP, such as RN50: this tower has none"
        )
    layers = (pool.norm, pool.mlp, pool.key_norm, pool.weights, tower.ln_post)
    if any(layer is not None for layer in layers) or not pool.reads_prefix:
        raise InputError("neuron-head pairs need an attention pool of plain features, with nothing before or after it")
    return pool


# ------------------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True)
class PairContributions:
    """The neuron-head pairs of some images.

    Attributes:
        embedding: ``[B, D]``.
        norm: ``[B]``, its norm; contributions are divided by it, as everywhere.
        activations: ``[B, H, C]``, ``s[h,n] = Σᵢ α[h,i] xᵢ[n]``, not divided.
        attention: ``[B, H, N]``, ``α``.
        tokens: ``[B, N, C]``, ``xᵢ``.
        grid: rows and columns of positions.
        weights: the model's part.
    """

    embedding: Tensor
    norm: Tensor
    activations: Tensor
    attention: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    weights: PairWeights

    def __len__(self) -> int:
        """Images, ``B``."""
        return len(self.embedding)

    def norms(self) -> Tensor:
        """The norm of every pair's contribution, ``[B, H, C]``."""
        return self.activations.abs() * self.weights.norms / self.norm[:, None, None]

    def shares(self) -> Tensor:
        """The part of the embedding that every pair writes, ``⟨c, y⟩ / ‖y‖²``, ``[B, H, C]``.

        With the constant's, :meth:`constant_share`, they add up to one.
        """
        along = self.weights.towards(self.embedding)
        return self.activations * along / self.norm[:, None, None] ** 2

    def constant_share(self) -> Tensor:
        """The part of the embedding that the biases write, ``[B]``."""
        return self.embedding.to(self.norm.dtype) @ self.weights.constant / self.norm**2

    def scores(self, text_features: Tensor) -> Tensor:
        """Every pair's score for every text, ``[B, H, C, T]``: for few texts at once.

        Raises:
            InputError: features of another width.
        """
        along = self.weights.towards(check_features(text_features, self.weights)).permute(1, 2, 0)  # [H, C, T]
        return (self.activations / self.norm[:, None, None])[..., None] * along

    def top(self, text_features: Tensor, count: int) -> "TopPairs":
        """The pairs that speak most for each text in each image, largest score first.

        Returns:
            ``[B, T, count]`` pairs and their scores.

        Raises:
            InputError: features of another width.
        """
        amounts = self.activations / self.norm[:, None, None]
        found = [
            (amounts * self.weights.towards(text)).flatten(1).topk(min(count, amounts[0].numel()))
            for text in check_features(text_features, self.weights)
        ]
        places = torch.stack([one.indices for one in found], 1)
        return TopPairs(as_pairs(places, self.weights.neurons), torch.stack([one.values for one in found], 1))

    def rows(self, pairs: Pairs) -> Tensor:
        """Contributions of some pairs, ``[B, P, D]``."""
        heads, neurons = self.weights.resolve(pairs).unbind(1)
        amounts = self.activations[:, heads, neurons] / self.norm[:, None]
        return amounts[..., None] * self.weights.rows(pairs)

    def heads(self) -> Tensor:
        """What all neurons write through each head, ``[B, H, D]``, without biases."""
        codes = self.weights.code(self.activations / self.norm[:, None, None])
        return torch.einsum("bhe,hed->bhd", codes, self.weights.out)

    def max_error(self) -> float:
        """The largest difference between the sum of all terms and the embedding, relative to its norm."""
        whole = self.weights.sum(self.activations) + self.weights.constant
        return float(((whole - self.embedding) / self.norm[:, None]).abs().max()) if len(self) else 0.0

    def maps(self, pairs: Pairs | Sequence[Pairs], text_features: Tensor, *, method: MapMethod = "exact") -> Tensor:
        """Where some pairs speak for texts.

        Args:
            pairs: for all texts; or a list with those of each.
            text_features: ``[T, D]``.
            method: ``"exact"``, ``Σ α[h,i] xᵢ[n] ⟨W_VO[h][n,:], t⟩``, whose sum over tokens is the pairs' score.
                ``"published"``, the mean over pairs of ``xᵢ[n]`` times the cosine of what head h writes of token i with
                the text, as the paper segments; its code takes ``xᵢ`` without the positional embedding.

        Returns:
            ``[B, rows, columns, T]``, the positions alone.

        Raises:
            InputError: no such pair or method, features of another width, or not as many lists as texts.
        """
        if method not in get_args(MapMethod):
            raise InputError(f"method is {method!r}: choose one of {', '.join(get_args(MapMethod))}")
        texts = check_features(text_features, self.weights)
        listed = _per_text(pairs, len(texts))
        maps = self.tokens.new_zeros(len(self), self.tokens.shape[1], len(texts))
        cosines = self._cosines(texts) if method == "published" else None
        for text, one in enumerate(texts):
            chosen = self.weights.resolve(listed[text])
            for heads, neurons in (part.unbind(1) for part in chosen.split(_TOGETHER)):
                along = self.tokens[:, :, neurons]  # [B, N, P]
                if cosines is not None:
                    part = (along * cosines[..., text].transpose(1, 2)[:, :, heads]).sum(-1) / len(chosen)
                else:
                    read = self.attention.transpose(1, 2)[:, :, heads] * along
                    part = read @ (self.weights.rows(torch.stack([heads, neurons], 1)) @ one) / self.norm[:, None]
                maps[:, :, text] += part
        rows, columns = self.grid
        return maps[:, -rows * columns :].unflatten(1, (rows, columns))

    def _cosines(self, texts: Tensor) -> Tensor:
        """Cosines of what every head writes of every token with texts, ``[B, H, N, T]``."""
        codes = torch.einsum("bnc,hec->bhne", self.tokens, self.weights.values)  # without the values' bias
        gram = self.weights.out @ self.weights.out.transpose(1, 2)
        norms = torch.einsum("bhne,hef,bhnf->bhn", codes, gram, codes).clamp_min(0).sqrt()
        along = torch.einsum("bhne,hed,td->bhnt", codes, self.weights.out, F.normalize(texts, dim=-1))
        return along / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]


@dataclass(frozen=True)
class TopPairs:
    """Pairs by their score for texts, largest first.

    Attributes:
        pairs: ``[..., T, k, 2]``, (head, neuron).
        scores: ``[..., T, k]``.
    """

    pairs: Tensor
    scores: Tensor

    def above(self, share: float) -> list[Tensor]:
        """The pairs ``[P, 2]`` of each text whose score is above a share of the text's largest.

        Raises:
            InputError: these are of several images.
        """
        if self.scores.ndim != 2:
            raise InputError("these pairs are of several images: choose one first")
        return [pairs[scores > share * scores[:1]] for pairs, scores in zip(self.pairs, self.scores, strict=True)]


@torch.no_grad()
def decompose(model: HasPool, images: Any) -> PairContributions:
    """Takes embeddings apart into neuron-head pairs.

    Args:
        model: with an attention pool on a feature map, such as open_clip's RN50 or OpenAI's.
        images: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.

    Raises:
        InputError: a model with another pooling, or images that do not fit.
        ImageError: a file that cannot be read.
    """
    tower = model.tower
    pool, weights = _pool(tower), PairWeights(tower)
    pixels = model.prepare(images)
    assert tower.embedder is not None
    with autocast_disabled(pixels):
        tokens = tower.embedder.run(pixels).to(weights.out.dtype)
        attention, embedding = _pooled(pool, tokens)
        if tower.projection is not None:
            embedding = embedding @ tower.projection.to(embedding)
        if tower.projection_bias is not None:
            embedding = embedding + tower.projection_bias.to(embedding)
    return PairContributions(
        embedding=embedding,
        norm=embedding.norm(dim=-1),
        activations=attention @ tokens,
        attention=attention,
        tokens=tokens,
        grid=tower.grid,
        weights=weights,
    )


def _pooled(pool: AttentionPool, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's attention weights ``[B, H, N]`` and its output ``[B, D]``, of tokens ``[B, N, C]``."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x), None if bias is None else bias.to(x))

    query = linear(tokens[:, 0], pool.query, pool.query_bias).unflatten(-1, (pool.heads, -1))  # [B, H, E]
    key = linear(tokens, pool.key_weight, pool.key_bias).unflatten(-1, (pool.heads, -1))  # [B, N, H, E]
    value = linear(tokens, pool.value_weight, pool.value_bias).unflatten(-1, (pool.heads, -1))
    attention = (torch.einsum("bhe,bnhe->bhn", query, key) / key.shape[-1] ** 0.5).softmax(-1)
    out = torch.einsum("bhn,bnhe->bhe", attention, value).flatten(1)
    return attention, linear(out, pool.out_weight, pool.out_bias)


def check_features(text_features: Tensor, weights: PairWeights) -> Tensor:
    """Features ``[T, D]`` where the weights are, in their dtype; :class:`InputError` for another width."""
    if text_features.ndim != 2 or text_features.shape[1] != weights.embed_dim:
        raise InputError(f"text_features has shape {list(text_features.shape)}, expected [texts, {weights.embed_dim}]")
    return text_features.to(weights.out)


def _per_text(pairs: Pairs | Sequence[Pairs], texts: int) -> list[Pairs]:
    """The pairs of each text, of those for all or of a list."""
    if isinstance(pairs, Tensor) or (len(pairs) and isinstance(pairs[0], tuple)) or not len(pairs):
        return [pairs] * texts  # type: ignore[list-item]
    if len(pairs) != texts:
        raise InputError(f"{len(pairs)} lists of pairs for {texts} texts: give one per text")
    return list(pairs)  # type: ignore[arg-type]


def as_pairs(places: Tensor, neurons: int) -> Tensor:
    """Places among all pairs as (head, neuron), ``[...] → [..., 2]``."""
    return torch.stack([places // neurons, places % neurons], -1)
