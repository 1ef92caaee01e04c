"""What a decomposed forward returns: every term of the embedding, as codes, expanded when asked.

Axes are always in the order images, layers, heads, tokens, (width | texts): ``B`` images, ``L`` layers kept, ``H``
heads, ``N`` tokens (class token first, then patches row by row), ``E`` head_dim, ``D`` embed_dim, ``T`` texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from os import PathLike
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from clipfast import storage
from clipfast.basis import Basis, StoredBasis, full_precision
from clipfast.errors import InputError, NotKept
from clipfast.kernels import ops

Method = TypeVar("Method", bound=Callable[..., Any])


def _exact(method: Method) -> Method:
    """A method that computes in the precision of the codes, also where an autocast surrounds the call."""

    @wraps(method)
    def exactly(self: "Contributions", *args: Any, **kwargs: Any) -> Any:
        with full_precision(self.codes):
            return method(self, *args, **kwargs)

    return cast(Method, exactly)


FORMAT = "clipfast.contributions/1"
_KEPT = ("kept_attention", "kept_maps", "kept_class_codes")
_TENSORS = ("embedding", "norm", "mean", "std", "codes", "mlps", "rest", *_KEPT)
"""Every tensor with an image axis but the kept values, which are one per layer."""


@dataclass(eq=False, repr=False)
class Contributions:
    """The terms of a batch's image embeddings; all of them sum to ``embedding / norm``.

    Every term is divided by the norm of the image's embedding. With centring ``"uniform"`` the mean of the final
    LayerNorm is split evenly over the terms, as the paper's code does (arXiv 2310.05916); with ``"termwise"`` each
    term loses its own mean.

    Attributes:
        embedding: ``[B, D]`` as the model gives it, not normalised.
        norm: ``[B]``, ‖embedding‖.
        mean: ``[B]``, μ of the final LayerNorm's input.
        std: ``[B]``, σ of it, ``√(var + ε)``, biased.
        codes: ``[B, L, H, E]``, each head's output before its output projection, divided by ``std · norm``.
        mlps: ``[B, layers of the model + 1, D]``: the start of the residual stream, then every MLP.
        rest: ``[B, D]``, the attention of layers that were not kept, summed; zero when all were.
        layers: which layers of the model ``codes`` and the other per-layer results hold, in order.
        grid: rows and columns of patches.
        basis: turns codes into contributions.
        texts: labels of the text axis of ``maps`` when they were given as strings.
    """

    embedding: Tensor
    norm: Tensor
    mean: Tensor
    std: Tensor
    codes: Tensor
    mlps: Tensor
    rest: Tensor
    layers: tuple[int, ...]
    grid: tuple[int, int]
    basis: Basis
    texts: tuple[str, ...] | None = None
    kept_attention: Tensor | None = None
    kept_maps: Tensor | None = None
    kept_class_codes: Tensor | None = None
    kept_values: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def __repr__(self) -> str:
        images, layers, heads, head_dim = self.codes.shape
        kept = [
            name
            for name, value in (
                ("attention", self.kept_attention),
                ("maps", self.kept_maps),
                ("tokens", self.kept_values),
                ("class_token", self.kept_class_codes),
            )
            if value is not None
        ]
        return (
            f"Contributions({images} images, {layers} layers, {heads} heads, head_dim {head_dim}, "
            f"embed_dim {self.embedding.shape[1]}, centring {self.basis.centring!r}, kept {kept})"
        )

    @property
    def attention(self) -> Tensor:
        """``[B, L, H, N]``, the weights that the pooled token reads with; each row sums to 1.

        Raises:
            NotKept: decomposed without ``attention=True``.
        """
        if self.kept_attention is None:
            raise NotKept("attention was not kept: decompose with attention=True")
        return self.kept_attention

    @property
    def maps(self) -> Tensor:
        """Scores of every token for every text, ``[B, N, T]`` summed over heads or ``[B, L, H, N, T]`` per head.

        Summed over tokens (and heads) they give the score of the kept heads.

        Raises:
            NotKept: decomposed without ``texts`` and ``maps``.
        """
        if self.kept_maps is None:
            raise NotKept('maps were not kept: decompose with texts=… and maps="summed" or maps="per_head"')
        return self.kept_maps

    @property
    def class_codes(self) -> Tensor:
        """``[B, L, H, E]``, the class token's own part of ``codes``: its attention to itself times its value.

        Raises:
            NotKept: decomposed without ``class_token=True``.
        """
        if self.kept_class_codes is None:
            raise NotKept("the class token was not kept: decompose with class_token=True")
        return self.kept_class_codes

    @property
    def token_count(self) -> int:
        """Tokens of an image, ``N``: the class token and the patches."""
        return 1 + self.grid[0] * self.grid[1]

    def patch_maps(self) -> Tensor:
        """:attr:`maps` without the class token, the token axis unfolded into the grid of patches.

        Returns:
            ``[B, rows, columns, T]`` or ``[B, L, H, rows, columns, T]``.
        """
        rows, columns = self.grid
        return self.maps[..., -rows * columns :, :].unflatten(-2, (rows, columns))

    def _scale(self) -> Tensor:
        return 1 / (self.std * self.norm)  # [B]

    def _position(self, layer: int) -> int:
        """Where a layer of the model (negative from the end) stands in ``codes``."""
        count = self.basis.layers
        label = layer + count if layer < 0 else layer
        if label not in self.layers:
            raise InputError(f"layer {layer} was not kept: the layers here are {list(self.layers)}")
        return self.layers.index(label)

    def _check_head(self, head: int) -> None:
        if not 0 <= head < self.basis.heads:
            raise InputError(f"head {head} does not exist: heads are 0 to {self.basis.heads - 1}")

    def heads(self) -> Tensor:
        """Every head's contribution, ``[B, L, H, D]``, made from the codes at each call."""
        return self._heads(self.basis)

    @_exact
    def _heads(self, basis: Basis) -> Tensor:
        """Contributions of all kept heads in the columns of ``basis``, ``[B, L, H, C]``."""
        out = self.codes.new_empty((*self.codes.shape[:3], basis.columns))
        constants = basis.constants(self.mean, self.std, self.layers) * self._scale()[:, None, None]
        for position, layer in enumerate(self.layers):
            part = torch.einsum("bhe,hec->bhc", self.codes[:, position], basis.values(layer))
            torch.add(part, constants[:, position, None], out=out[:, position])
        return out

    @_exact
    def head(self, layer: int, head: int) -> Tensor:
        """One head's contribution, ``[B, D]``.

        Args:
            layer: layer of the model, negative from the end.
            head: head of that layer.

        Raises:
            InputError: no such head, or a layer that was not kept.
        """
        position = self._position(layer)
        self._check_head(head)
        label = self.layers[position]
        constants = self.basis.constants(self.mean, self.std, [label])[:, 0] * self._scale()[:, None]
        return self.codes[:, position, head] @ self.basis.values(label)[head] + constants

    @_exact
    def tokens(self, layer: int, head: int | None = None) -> Tensor:
        """Every token's part of one layer's heads, or of one head.

        Args:
            layer: layer of the model, negative from the end.
            head: one head, or all.

        Returns:
            ``[B, N, H, D]`` for all heads (large), ``[B, N, D]`` for one. Summed over tokens: the head's contribution.

        Raises:
            InputError: no such head, or a layer that was not kept.
            NotKept: decomposed without ``tokens=True``.
        """
        position = self._position(layer)
        if self.kept_values is None:
            raise NotKept("tokens were not kept: decompose with tokens=True")
        value = self.kept_values[position]  # [B, N, H, E]
        alpha = self.attention[:, position]  # [B, H, N]
        label = self.layers[position]
        basis = self.basis.values(label)
        if head is not None:
            self._check_head(head)
            value, alpha, basis = value[:, :, head : head + 1], alpha[:, head : head + 1], basis[head : head + 1]
        constants = self.basis.constants(self.mean, self.std, [label])[:, 0] / value.shape[1]  # [B, D]
        parts = ops.token_contributions(alpha, value, basis, constants, self._scale())
        return parts if head is None else parts[:, :, 0]

    @_exact
    def class_token(self) -> Tensor:
        """The class token's own part of each layer's attention, ``[B, L, D]``: ``tokens(layer)[:, 0]``, heads summed.

        In a tower that averages patches it is what these read from the class token.

        Raises:
            NotKept: decomposed without ``class_token=True``.
        """
        codes = self.class_codes
        parts = self.basis.constants(self.mean, self.std, self.layers) * self._scale()[:, None, None]
        parts *= self.basis.heads / self.token_count
        for position, layer in enumerate(self.layers):
            parts[:, position] += codes[:, position].flatten(1) @ self.basis.values(layer).flatten(0, 1)
        return parts

    @_exact
    def scores(self, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Every term's share of the similarity with texts.

        Args:
            text_features: ``[T, D]``, unit norm for cosine similarity.

        Returns:
            ``[B, L, H, T]`` for the heads and ``[B, layers of the model + 1, T]`` for the start and the MLPs. Added up
            (with :attr:`rest`) they give ``embedding/norm · text``.

        Raises:
            InputError: features of another width.
        """
        self._check_texts(text_features)
        features = text_features.to(self.codes)
        return self._heads(self.basis.towards(features)), self.mlps @ features.T

    @_exact
    def text_maps(self, text_features: Tensor, heads: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Scores of every token for texts chosen after the forward, summed over kept heads or some of them.

        Args:
            text_features: ``[T, D]``.
            heads: (layer, head) pairs to sum over, each counted once; all kept heads for None.

        Returns:
            ``[B, N, T]``; summed over tokens: the score of those heads.

        Raises:
            InputError: features of another width, no such head, or a layer that was not kept.
            NotKept: decomposed without ``tokens=True``.
        """
        self._check_texts(text_features)
        if self.kept_values is None:
            raise NotKept("tokens were not kept: decompose with tokens=True")
        count = self.basis.heads
        wanted = [(self._position(layer), head) for layer, head in heads or ()]
        for _, head in wanted:
            self._check_head(head)
        chosen = None if heads is None else sorted({position * count + head for position, head in wanted})
        basis = self.basis.towards(text_features.to(self.codes))
        values = torch.stack([basis.values(layer) for layer in self.layers])  # [L, H, E, T]
        index = None if chosen is None else torch.tensor(chosen, dtype=torch.long, device=self.codes.device)
        maps = ops.layered_text_maps(self.attention, self.kept_values, values, index)
        share = torch.full((len(self.layers),), count, dtype=maps.dtype, device=maps.device)
        if index is not None:
            share = torch.bincount(index // count, minlength=len(self.layers)).to(maps.dtype)
        constants = torch.einsum("blt,l->bt", basis.constants(self.mean, self.std, self.layers), share) / maps.shape[1]
        return maps.add_(constants[:, None]).mul_(self._scale()[:, None, None])

    def _check_texts(self, text_features: Tensor) -> None:
        if text_features.ndim != 2 or text_features.shape[1] != self.embedding.shape[1]:
            raise InputError(
                f"text_features has shape {list(text_features.shape)}, expected [texts, {self.embedding.shape[1]}]"
            )

    @_exact
    def total(self) -> Tensor:
        """The sum of all terms, ``[B, D]``."""
        total = self.mlps.sum(1) + self.rest
        constants = self.basis.constants(self.mean, self.std, self.layers) * self._scale()[:, None, None]
        total += self.basis.heads * constants.sum(1)
        for position, layer in enumerate(self.layers):
            total += self.codes[:, position].flatten(1) @ self.basis.values(layer).flatten(0, 1)
        return total

    def check(self) -> float:
        """The largest ``|sum of all terms − embedding/norm|``: how exact this decomposition is (0 for no images)."""
        if not len(self):
            return 0.0
        return float((self.total() - self.embedding.to(self.norm.dtype) / self.norm[:, None]).abs().max())

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor with an image axis, by name."""
        kept = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        values = zip(self.layers, self.kept_values or (), strict=False)
        return kept | {f"values/{layer}": value for layer, value in values}

    def _with(self, tensors: dict[str, Tensor]) -> "Contributions":
        """The same with other tensors, named as :meth:`_tensors` names them."""
        changed: dict[str, Any] = {name: tensors[name] for name in _TENSORS if name in tensors}
        if self.kept_values is not None:
            changed["kept_values"] = tuple(tensors[f"values/{layer}"] for layer in self.layers)
        return replace(self, **changed)

    @property
    def nbytes(self) -> int:
        """Bytes of the images' data, without the basis."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def select(self, images: Sequence[int]) -> "Contributions":
        """Some images of the batch, in the order given."""
        index = torch.tensor(images, dtype=torch.long, device=self.codes.device)
        return self._with({name: tensor[index] for name, tensor in self._tensors().items()})

    def cpu(self) -> "Contributions":
        """The images' data on the CPU; the basis, which is the model's, stays where it is."""
        return self._with({name: tensor.cpu() for name, tensor in self._tensors().items()})

    def clone(self) -> "Contributions":
        """A copy of the images' data; the basis, which is the model's, is shared."""
        return self._with({name: tensor.clone() for name, tensor in self._tensors().items()})

    @staticmethod
    def cat(parts: Sequence["Contributions"]) -> "Contributions":
        """Batches of one model and one request as a single batch.

        Raises:
            InputError: no batches, or batches that keep different things.
        """
        held = [part._tensors() for part in parts]
        kinds = {
            (part.layers, part.texts, part.grid, *((name, tensor.shape[1:]) for name, tensor in tensors.items()))
            for part, tensors in zip(parts, held, strict=True)
        }
        if len(kinds) != 1 or not all(part.basis.same_as(parts[0].basis) for part in parts):
            raise InputError("only batches of one model that keep the same results can be joined")
        return parts[0]._with({name: torch.cat([tensors[name] for tensors in held]) for name in held[0]})

    def save(self, path: str | PathLike[str]) -> None:
        """Writes everything with the basis of the kept layers to one safetensors file.

        Raises:
            OSError: the file cannot be written.
        """
        header = {
            "format": FORMAT,
            "layers": self.layers,
            "grid": self.grid,
            "heads": self.basis.heads,
            "centring": self.basis.centring,
            "texts": self.texts,
        }
        storage.write(path, header, self._tensors() | self.basis.tensors(self.layers))

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device = "cpu") -> "Contributions":
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: not such a file, or damaged.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, FORMAT, "Contributions.save", device)
        with storage.as_damage(path):
            layers = tuple(header["layers"])
            values = tuple(tensors[f"values/{layer}"] for layer in layers if f"values/{layer}" in tensors)
            return cls(
                **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
                layers=layers,
                grid=(header["grid"][0], header["grid"][1]),
                basis=StoredBasis.of(tensors, layers, header["heads"], header["centring"]),
                texts=None if header["texts"] is None else tuple(header["texts"]),
                kept_values=values or None,
            )
