"""What a decomposed forward returns: every term of the embedding, as codes that are expanded on request.

Axes are always in the order images, layers, heads, tokens, (width | texts): ``B`` images, ``L`` layers kept, ``H``
heads, ``N`` tokens (class token first, then registers, then patches row by row), ``E`` numbers of a code (most often
head_dim), ``D`` embed_dim, ``T`` texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from clipfast import storage
from clipfast.basis import Basis, Depth, StoredBasis, autocast_disabled
from clipfast.errors import InputError, NotKept
from clipfast.indices import resolve_head, resolve_heads, resolve_layer
from clipfast.kernels import ops

if TYPE_CHECKING:
    import pandas
    import xarray
    from PIL import Image

Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autocast(method: Method) -> Method:
    """A method that computes in the dtype of the codes, also where the caller uses autocast."""

    @wraps(method)
    def wrapped(self: "Contributions", *args: Any, **kwargs: Any) -> Any:
        with autocast_disabled(self.codes):
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)


FORMAT = "clipfast.contributions/2"
_OPTIONAL = {"attention": "_attention", "maps": "_maps", "class_codes": "_class_codes"}
_TENSORS = {
    **{name: name for name in ("embedding", "norm", "mean", "std", "codes", "start", "mlps", "rest")},
    **_OPTIONAL,
}
"""Name in a file → attribute, of every tensor with an image axis but the values, which are one per layer."""
_AXES = {
    "embedding": "images, embed_dim",
    "codes": "images, layers, heads, head_dim",
    "start": "images, embed_dim",
    "mlps": "images, layers of the model, embed_dim",
    "rest": "images, embed_dim",
    "attention": "images, layers, heads, tokens",
    "class_codes": "images, layers, heads, head_dim",
}


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Raises :class:`InputError` where a gradient is asked for: grad mode is on and a tensor requires one."""
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    if names and torch.is_grad_enabled():
        raise InputError(
            f"{names[0]} require gradients, and a decomposition has none: call it under torch.no_grad() or pass "
            f"{names[0]}.detach(); clipfast.analyses.gradients.forward is differentiable"
        )


class Scores(NamedTuple):
    """The similarity of images with texts as a sum over terms: ``embedding/norm · text`` is the sum of all entries.

    Attributes:
        start: ``[B, T]``, of the start of the residual stream.
        heads: ``[B, L, H, T]``, of every head of the kept layers.
        mlps: ``[B, layers of the model, T]``, of every MLP.
        rest: ``[B, T]``, of the attention of the layers that were not kept.
    """

    start: Tensor
    heads: Tensor
    mlps: Tensor
    rest: Tensor

    def total(self) -> Tensor:
        """The sum of all terms, ``[B, T]``: the similarity itself, up to rounding."""
        return self.start + self.heads.sum((1, 2)) + self.mlps.sum(1) + self.rest


@dataclass(eq=False, repr=False)
class Contributions:
    """The terms of a batch's image embeddings; all of them sum to ``embedding / norm``.

    Every term is divided by the norm of the image's embedding. With centring ``"uniform"`` the mean of the final
    LayerNorm is split evenly over the terms, as the paper's code does (arXiv 2310.05916); with ``"termwise"`` each
    term loses its own mean.

    ``len``, iteration and slices are over images: ``contributions[0]`` and ``contributions[2:5]`` are batches of one
    and of three images.

    Attributes:
        embedding: ``[B, D]`` as the model gives it, not normalised.
        norm: ``[B]``, ‖embedding‖.
        mean: ``[B]``, μ of the final LayerNorm's input.
        std: ``[B]``, σ of it, ``√(var + ε)``, biased.
        codes: ``[B, L, H, E]``, each head's output before its output projection, divided by ``std · norm``.
        start: ``[B, D]``, the residual stream before the first layer.
        mlps: ``[B, layers of the model, D]``, the MLP of every layer.
        rest: ``[B, D]``, what is no other term, summed: the attention of the layers that were not kept and, of the
            blocks before an attention pool, the pool's MLP.
        layers: which layers of the model ``codes`` and the other per-layer results hold, ascending.
        grid: rows and columns of patches.
        basis: turns codes into contributions.
        texts: labels of the text axis of ``maps``, where they are known.
        prefix_tokens: tokens before the patches: the class token and registers.
    """

    embedding: Tensor
    norm: Tensor
    mean: Tensor
    std: Tensor
    codes: Tensor
    start: Tensor
    mlps: Tensor
    rest: Tensor
    layers: tuple[int, ...]
    grid: tuple[int, int]
    basis: Basis
    texts: tuple[str, ...] | None = None
    prefix_tokens: int = 1
    _attention: Tensor | None = None
    _maps: Tensor | None = None
    _class_codes: Tensor | None = None
    _values: tuple[Tensor, ...] | None = None  # [B, N, H, E] per kept layer

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def __getitem__(self, images: int | slice) -> "Contributions":
        """One image, negative from the end, or a slice of them; the image axis stays.

        Raises:
            InputError: an image that does not exist.
        """
        if not isinstance(images, slice):
            if not -len(self) <= images < len(self):
                raise InputError(f"image {images} does not exist: there are {len(self)}")
            images = slice(images % len(self), images % len(self) + 1)
        if images.step is not None and images.step < 0:  # tensors have no negative steps
            return self.select(range(*images.indices(len(self))))
        return self._with({name: tensor[images] for name, tensor in self._tensors().items()})

    def __iter__(self) -> Iterator["Contributions"]:
        return (self[image] for image in range(len(self)))

    @property
    def kept(self) -> tuple[str, ...]:
        """Which optional results there are, of ``"attention"``, ``"maps"``, ``"tokens"`` and ``"class_token"``."""
        optional = {
            "attention": self._attention,
            "maps": self._maps,
            "tokens": self._values,
            "class_token": self._class_codes,
        }
        return tuple(name for name, value in optional.items() if value is not None)

    def __repr__(self) -> str:
        images, layers, heads, head_dim = self.codes.shape
        return (
            f"Contributions({images} images, {layers} layers, {heads} heads, head_dim {head_dim}, "
            f"embed_dim {self.embedding.shape[1]}, centring {self.basis.centring!r}, kept {list(self.kept)})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: every tensor with its axes, and a small picture of what the terms add."""
        from clipfast.presentation.html import image_tag

        tensors = self._tensors()
        axes = dict(_AXES)
        if self._maps is not None:
            axes["maps"] = "images, tokens, texts" if self._maps.ndim == 3 else "images, layers, heads, tokens, texts"
        rows = [
            f"<tr><td><code>{name}</code></td><td>{' × '.join(map(str, tensors[name].shape))}</td>"
            f"<td>{names}</td><td>{str(tensors[name].dtype).removeprefix('torch.')}</td></tr>"
            for name, names in axes.items()
            if name in tensors
        ]
        notes = [f"layers {list(self.layers)} of {self.basis.layers}", f"centring {self.basis.centring}"]
        notes += [] if self.texts is None else [f"texts: {', '.join(self.texts)}"]
        notes += ["tokens kept"] if self._values is not None else []
        head = "<tr><th>tensor</th><th>shape</th><th>axes</th><th>dtype</th></tr>"
        return (
            f"<p><b>Contributions</b> of {len(self)} images ({escape('; '.join(notes))})</p>"
            f"<table>{head}{''.join(rows)}</table>{image_tag(self)}"
        )

    def to_xarray(self, *, ids: Sequence[str] | None = None, heads: bool = False) -> "xarray.Dataset":
        """Everything that was kept as arrays with named axes, under the names that a collection has.

        >>> contributions.to_xarray().codes.sel(layer=11, head=3)

        Arrays: ``codes`` ``(image, layer, head, dim)``, ``terms`` ``(image, term, embed)``, which are no head's,
        ``embeddings`` ``(image, embed)``. Where they were kept: ``attention`` ``(image, layer, head, token)``, ``maps``
        ``(image, token, text)`` or ``(image, layer, head, token, text)``, ``patch_maps`` with ``row, column`` in place
        of ``token``, ``class_codes`` as ``codes``, and ``values`` ``(image, layer, token, head, dim)``.

        Coordinates: ``layer``, ``head``, ``term``, ``text`` (labels, where they are known); of every image ``mean``,
        ``std`` and ``norm``; of every token ``patch_row`` and ``patch_column``, -1 before the patches.

        Args:
            ids: a name for each image, the coordinate ``id``.
            heads: whether there is ``heads`` ``(image, layer, head, embed)``, too, :meth:`heads`, which is large.

        Raises:
            MissingExtra: xarray is not installed.
            InputError: not one name per image.
        """
        from clipfast.presentation.labelled import to_xarray

        return to_xarray(self, ids, heads)

    def to_pandas(
        self,
        text_features: Tensor | None = None,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
    ) -> "pandas.DataFrame":
        """A long table: a row per image and term, times a row per text where texts are given.

        Columns: ``image`` (number), ``id`` (where given), ``term`` (as in :attr:`terms`), ``kind`` (``"start"``,
        ``"head"``, ``"mlp"`` or ``"rest"``), ``layer`` and ``head`` (missing where a term has none), ``norm`` (length
        of the term; the whole has length 1), ``share`` (the term times ``embedding / norm``: those of an image sum to
        1), and with texts ``text`` and ``score`` (those of an image and a text sum to its similarity).

        Args:
            text_features: ``[T, D]``, unit norm for cosine similarity.
            texts: what they are called; their numbers for None.
            ids: a name for each image.

        Raises:
            MissingExtra: pandas is not installed.
            InputError: features of another width, or not one name per text or image.
        """
        from clipfast.presentation.table import to_pandas

        return to_pandas(self, text_features, texts, ids)

    def plot(
        self,
        text_features: Tensor | None = None,
        *,
        text: str | None = None,
        image: int | None = 0,
        picture: "Image.Image | None" = None,
    ) -> "Image.Image":
        """A picture of what every head and MLP adds to a text's score, layers × heads; a notebook shows it.

        Below it, where they were kept: the text maps of the image, each summed over heads.

        Args:
            text_features: of one text, ``[1, D]``; None for each term's share of the embedding, as in
                :meth:`to_pandas`.
            text: what it is called.
            image: which image, negative from the end; None for the mean over all images, without maps.
            picture: the image as the model sees it, resized and cropped, to draw its maps on; grey for None.

        Raises:
            InputError: no such image, features of another width or of several texts, a name without features, or a
                picture without maps.
        """
        from clipfast.presentation.drawing import plot

        return plot(self, text_features, text, image, picture)

    @property
    def fingerprint(self) -> str:
        """Of the model's vision weights, 32 hexadecimal digits: :attr:`.Basis.fingerprint`."""
        return self.basis.fingerprint

    @property
    def terms(self) -> tuple[str, ...]:
        """The name of every term, in the order of the sum: ``start``, ``L0.attn.H0``, …, ``L0.mlp``, ``L1.attn.H0``, ….

        ``rest`` is the last one where layers were left out, and of the blocks before an attention pool. The terms of a
        pooling alone are ``start``, which is zero, ``pool.H0``, … and ``pool.mlp``.
        """
        is_pool = self.basis.kind == "pool"
        names = ["start"]
        for layer in range(self.basis.layers):
            if layer in self.layers:
                place = "pool" if is_pool else f"L{layer}.attn"
                names += [f"{place}.H{head}" for head in range(self.basis.heads)]
            names.append("pool.mlp" if is_pool else f"L{layer}.mlp")
        return (*names, "rest") if self._has_rest else tuple(names)

    @property
    def _has_rest(self) -> bool:
        return len(self.layers) < self.basis.layers or self.basis.kind == "upstream"

    @property
    def depth(self) -> Depth:
        """What the heads are: ``"all"``, those of the blocks; ``"pool"``, those of the pooling alone."""
        return "pool" if self.basis.kind == "pool" else "all"

    def stack(self) -> tuple[Tensor, tuple[str, ...]]:
        """Every term in one tensor.

        Returns:
            ``[B, terms, D]``, which sums to ``embedding / norm`` over its terms, and their names, :attr:`terms`.
        """
        heads = self.heads()
        parts = [self.start[:, None]]
        for layer in range(self.basis.layers):
            if layer in self.layers:
                parts.append(heads[:, self.layers.index(layer)])
            parts.append(self.mlps[:, layer : layer + 1])
        if self._has_rest:
            parts.append(self.rest[:, None])
        return torch.cat(parts, 1), self.terms

    def start_and_mlps(self) -> Tensor:
        """:attr:`start` and :attr:`mlps` in one tensor, ``[B, 1 + layers of the model, D]``."""
        return torch.cat([self.start[:, None], self.mlps], 1)

    def is_finite(self) -> Tensor:
        """Which images have an embedding that can be taken apart, bool ``[B]``.

        False where a value of a term is infinite or not a number, or where the embedding is zero.
        """
        finite = self.norm > 0
        for tensor in (self.embedding, self._scale(), self.mean, self.codes, self.start, self.mlps, self.rest):
            values = tensor.isfinite()
            finite = finite & (values if values.ndim == 1 else values.flatten(1).all(1))
        return finite

    @property
    def attention(self) -> Tensor:
        """``[B, L, H, N]``, the weights that the pooled token reads with; each row sums to 1.

        Raises:
            NotKept: decomposed without ``attention=True``.
        """
        if self._attention is None:
            raise NotKept("attention was not kept: decompose with attention=True")
        return self._attention

    @property
    def maps(self) -> Tensor:
        """Scores of every token for every text, ``[B, N, T]`` summed over heads or ``[B, L, H, N, T]`` per head.

        Summed over tokens (and heads) they give the score of the kept heads.

        Raises:
            NotKept: decomposed without ``texts`` and ``maps``.
        """
        if self._maps is None:
            raise NotKept('maps were not kept: decompose with texts=… and maps="summed" or maps="per_head"')
        return self._maps

    @property
    def class_codes(self) -> Tensor:
        """``[B, L, H, E]``, the class token's own part of ``codes``: its attention to itself times its value.

        Raises:
            NotKept: decomposed without ``class_token=True``.
        """
        if self._class_codes is None:
            raise NotKept("the class token was not kept: decompose with class_token=True")
        return self._class_codes

    def token_values(self) -> Tensor:
        """``[B, L, N, H, E]``, what heads read from every token: weighted by :attr:`attention`, codes times std · norm.

        A copy; raises as :meth:`tokens`.
        """
        images, layers, *others = self.codes.shape
        kept = self._kept_values()
        return torch.stack(kept, 1) if layers else self.codes.new_empty(images, 0, self.token_count, *others)

    def _kept_values(self) -> tuple[Tensor, ...]:
        if self._values is None:
            raise NotKept("tokens were not kept: decompose with tokens=True")
        return self._values

    @property
    def token_count(self) -> int:
        """Tokens of an image, ``N``: the class token, registers and the patches."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    def patch_maps(self) -> Tensor:
        """:attr:`maps` without the class token and registers, the token axis unfolded into the grid of patches.

        Returns:
            ``[B, rows, columns, T]`` or ``[B, L, H, rows, columns, T]``.
        """
        rows, columns = self.grid
        return self.maps[..., -rows * columns :, :].unflatten(-2, (rows, columns))

    def _scale(self) -> Tensor:
        return 1 / (self.std * self.norm)  # [B]

    def _position(self, layer: int) -> int:
        """Where a layer of the model (negative from the end) stands in ``codes``."""
        return self.layers.index(resolve_layer(layer, self.basis.layers, self.layers))

    def heads(self) -> Tensor:
        """Every head's contribution, ``[B, L, H, D]``, made from the codes at each call."""
        return self._heads(self.basis)

    @_without_autocast
    def _heads(self, basis: Basis) -> Tensor:
        """Contributions of all kept heads in the columns of ``basis``, ``[B, L, H, C]``."""
        out = self.codes.new_empty((*self.codes.shape[:3], basis.columns))
        constants = basis.constants(self.mean, self.std, self.layers) * self._scale()[:, None, None]
        for position, layer in enumerate(self.layers):
            part = torch.einsum("bhe,hec->bhc", self.codes[:, position], basis.values(layer))
            torch.add(part, constants[:, position, None], out=out[:, position])
        return out

    @_without_autocast
    def head(self, layer: int, head: int) -> Tensor:
        """One head's contribution, ``[B, D]``.

        Args:
            layer: layer of the model, negative from the end.
            head: head of that layer.

        Raises:
            InputError: no such head, or a layer that was not kept.
        """
        position, head = self._position(layer), resolve_head(head, self.basis.heads)
        label = self.layers[position]
        constants = self.basis.constants(self.mean, self.std, [label])[:, 0] * self._scale()[:, None]
        return self.codes[:, position, head] @ self.basis.values(label)[head] + constants

    @_without_autocast
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
        value = self._kept_values()[position]  # [B, N, H, E]
        alpha = self.attention[:, position]  # [B, H, N]
        label = self.layers[position]
        basis = self.basis.values(label)
        if head is not None:
            head = resolve_head(head, self.basis.heads)
            value, alpha, basis = value[:, :, head : head + 1], alpha[:, head : head + 1], basis[head : head + 1]
        constants = self.basis.constants(self.mean, self.std, [label])[:, 0] / value.shape[1]  # [B, D]
        parts = ops.token_contributions(alpha, value, basis, constants, self._scale())
        return parts if head is None else parts[:, :, 0]

    @_without_autocast
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

    @_without_autocast
    def scores(self, text_features: Tensor) -> Scores:
        """The similarity with texts as a sum over terms.

        Args:
            text_features: ``[T, D]``, unit norm for cosine similarity.

        Raises:
            InputError: features of another width.
        """
        self._check_texts(text_features)
        features = text_features.to(self.codes)
        residual = self.start_and_mlps() @ features.T  # [B, 1 + layers of the model, T]
        return Scores(
            start=residual[:, 0],
            heads=self._heads(self.basis.towards(features)),
            mlps=residual[:, 1:],
            rest=self.rest @ features.T,
        )

    @_without_autocast
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
        kept = self._kept_values()
        count = self.basis.heads
        index = None
        if heads is not None:
            pairs = resolve_heads(heads, self.basis.layers, count, self.layers)
            chosen = sorted({self.layers.index(layer) * count + head for layer, head in pairs})
            index = torch.tensor(chosen, dtype=torch.long, device=self.codes.device)
        basis = self.basis.towards(text_features.to(self.codes))
        values = torch.stack([basis.values(layer) for layer in self.layers])  # [L, H, E, T]
        maps = ops.layered_text_maps(self.attention, kept, values, index)
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
        refuse_gradients(text_features=text_features)

    @_without_autocast
    def total(self) -> Tensor:
        """The sum of all terms, ``[B, D]``."""
        total = self.start_and_mlps().sum(1) + self.rest
        constants = self.basis.constants(self.mean, self.std, self.layers) * self._scale()[:, None, None]
        total += self.basis.heads * constants.sum(1)
        for position, layer in enumerate(self.layers):
            total += self.codes[:, position].flatten(1) @ self.basis.values(layer).flatten(0, 1)
        return total

    def max_error(self) -> float:
        """The largest ``|sum of all terms − embedding/norm|``, rounding alone if all is well (0 for no images)."""
        if not len(self):
            return 0.0
        return float((self.total() - self.embedding.to(self.norm.dtype) / self.norm[:, None]).abs().max())

    def check(self) -> float:
        """:meth:`max_error` under its older name."""
        return self.max_error()

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor with an image axis, by its name in a file."""
        tensors = {name: getattr(self, attribute) for name, attribute in _TENSORS.items()}
        values = zip(self.layers, self._values or (), strict=False)
        return {name: tensor for name, tensor in tensors.items() if tensor is not None} | {
            f"values/{layer}": value for layer, value in values
        }

    def _with(self, tensors: dict[str, Tensor], basis: Basis | None = None) -> "Contributions":
        """The same with other tensors, named as :meth:`_tensors` names them."""
        changed: dict[str, Any] = {attribute: tensors[name] for name, attribute in _TENSORS.items() if name in tensors}
        if self._values is not None:
            changed["_values"] = tuple(tensors[f"values/{layer}"] for layer in self.layers)
        return replace(self, basis=basis or self.basis, **changed)

    @property
    def nbytes(self) -> int:
        """Bytes of the images' data, without the basis."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def select(self, images: Sequence[int]) -> "Contributions":
        """Some images of the batch, by number, in that order."""
        index = torch.tensor(list(images), dtype=torch.long, device=self.codes.device)
        return self._with({name: tensor[index] for name, tensor in self._tensors().items()})

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "Contributions":
        """The same on another device or in another floating-point dtype, basis included.

        As with a tensor, the first argument may be the dtype. The basis is converted once per device and dtype, layer
        by layer when it is read, and shared by all batches.

        Raises:
            InputError: a dtype that is not floating point.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}: contributions are floating point")
        place = self.codes.device if device is None else torch.device(device)
        moved = {name: tensor.to(place, dtype or tensor.dtype) for name, tensor in self._tensors().items()}
        return self._with(moved, self.basis.to(moved["norm"].device, dtype or self.basis.biases.dtype))

    def cpu(self) -> "Contributions":
        """The same on the CPU, see :meth:`to`."""
        return self.to("cpu")

    def clone(self) -> "Contributions":
        """A copy of the images' data; the basis, which is the model's, is shared."""
        return self._with({name: tensor.clone() for name, tensor in self._tensors().items()})

    @staticmethod
    def cat(parts: Sequence["Contributions"]) -> "Contributions":
        """Batches of one model and one request as a single batch.

        Raises:
            InputError: no batches, or batches that keep different things.
        """
        batches = [part._tensors() for part in parts]
        kinds = {
            (
                part.layers,
                part.texts,
                part.grid,
                part.prefix_tokens,
                *((name, tensor.shape[1:]) for name, tensor in tensors.items()),
            )
            for part, tensors in zip(parts, batches, strict=True)
        }
        grids = [f"{rows} × {columns}" for rows, columns in dict.fromkeys(part.grid for part in parts)]
        if len(grids) > 1:
            raise InputError(f"batches of images of several sizes cannot be joined: {' and '.join(grids)} patches")
        if len(kinds) != 1 or not all(part.basis.same_as(parts[0].basis) for part in parts):
            raise InputError("only batches of one model that keep the same results can be joined")
        return parts[0]._with({name: torch.cat([tensors[name] for tensors in batches]) for name in batches[0]})

    def save(self, path: str | PathLike[str]) -> None:
        """Writes everything with the basis of the kept layers to one safetensors file.

        Raises:
            OSError: the file cannot be written.
        """
        header = {
            "format": FORMAT,
            "layers": self.layers,
            "grid": self.grid,
            "prefix_tokens": self.prefix_tokens,
            "texts": self.texts,
        }
        storage.write(path, header | self.basis.header(), self._tensors() | self.basis.tensors(self.layers))

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
                **{attribute: tensors.get(name) for name, attribute in _TENSORS.items()},  # type: ignore[arg-type]
                layers=layers,
                grid=(header["grid"][0], header["grid"][1]),
                prefix_tokens=int(header["prefix_tokens"]),
                basis=StoredBasis.of(tensors, layers, header),
                texts=None if header["texts"] is None else tuple(header["texts"]),
                _values=values or None,
            )
