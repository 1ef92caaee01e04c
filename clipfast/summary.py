"""What a model is, in numbers and words: its parts, its images and texts, and what a decomposition of it takes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipfast.basis import Depth
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.packages import classes_of, package_name, package_of
from clipfast.towers.tokenizers import facts_of
from clipfast.towers.tower import Tower


@dataclass(frozen=True)
class Normalisation:
    """What preprocessing does to a pixel's values: ``(value / 255 − mean) / std``, each for red, green and blue."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes that a decomposition keeps of each image, without what the forward itself needs.

    Attributes:
        terms: the embedding and every term of it.
        attention: with ``attention=True``.
        map: of each text, summed over heads.
        map_per_head: of each text, with ``maps="per_head"``.
        tokens: with ``tokens=True``; None where it is not possible.
        until_the_end: before an attention pool, or a mean of final LayerNorms, until the last block has run; 0
            elsewhere. With attention or maps it is 2.5 times as much.
    """

    terms: int
    attention: int
    map: int
    map_per_head: int
    tokens: int | None
    until_the_end: int


@dataclass(frozen=True)
class Summary:
    """What a model is. Printed, it is a table.

    Attributes:
        name: as it was loaded, or the class of a wrapped tower.
        package: where its classes come from.
        classes: of the model, its image tower and, where it has one, the trunk in that.
        pretrained: whether weights were loaded; False for random ones, None for a wrapped model.
        device: where the weights are.
        dtype: of the weights.
        parameters: numbers in the image tower.
        weight_bytes: bytes of them.
        layers: transformer blocks, ``L``.
        heads: of each, ``H``; of the pooling where there are no blocks.
        head_dim: width of one head, ``E``; None without blocks.
        width: of the residual stream, ``W``.
        embed_dim: of the embedding, ``D``.
        image_size: height and width in pixels.
        patch_size: height and width in pixels.
        grid: patches per column and per row.
        tokens: per image, ``N``.
        prefix_tokens: of these the class token and registers.
        pooling: how the embedding reads the tokens, in words.
        depth: which heads a decomposition has by default.
        activation: of the MLPs.
        features: what else it has beyond a vision transformer of CLIP, in words.
        normalisation: what preprocessing does to values; None where it is no mean and standard deviation.
        tokenizer: its class; None for none.
        vocabulary: tokens it knows; None where it does not say.
        context: tokens it gives, or gives at most; None where it does not say.
        memory: by depth, what a decomposition keeps of each image.
    """

    name: str
    package: str
    classes: tuple[str, ...]
    pretrained: bool | None
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    layers: int
    heads: int
    head_dim: int | None
    width: int
    embed_dim: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    tokens: int
    prefix_tokens: int
    pooling: str
    depth: Depth
    activation: str
    features: tuple[str, ...]
    normalisation: Normalisation | None
    tokenizer: str | None
    vocabulary: int | None
    context: int | None
    memory: dict[Depth, Memory]

    def rows(self) -> list[tuple[str, str]]:
        """The table that :class:`Summary` prints: what, and its value in words."""
        weights = {True: "pretrained", False: "random", None: "as given"}[self.pretrained]
        place = f"{self.dtype} on {self.device}"
        blocks = f"{self.layers} layers × {self.heads} heads × {self.head_dim}"
        rows = [
            ("model", f"{self.name}, of {self.package}: {' / '.join(self.classes)}"),
            ("weights", f"{weights}, {self.parameters:,} in {_bytes(self.weight_bytes)}, {place}"),
            ("blocks", f"{blocks}, width {self.width}, {self.activation}" if self.layers else "none"),
            ("beyond CLIP's ViT", ", ".join(self.features) or "nothing"),
            ("images", f"{_size(self.image_size)} pixels, patches of {_size(self.patch_size)}"),
            ("tokens", f"{self.tokens}: {self.prefix_tokens} before {_size(self.grid)} patches"),
            ("embedding", f"{self.embed_dim} numbers from {self.pooling}"),
            ("values", _normalisation(self.normalisation)),
            ("texts", self._texts()),
        ]
        return rows + [(f"memory, depth={depth!r}", self._memory(depth)) for depth in self.memory]

    def _texts(self) -> str:
        if self.tokenizer is None:
            return "no tokenizer: pass features"
        words = [] if self.vocabulary is None else [f"{self.vocabulary:,} tokens known"]
        words += [] if self.context is None else [f"{self.context} per text"]
        return ", ".join([self.tokenizer, *words])

    def _memory(self, depth: Depth) -> str:
        kept = self.memory[depth]
        words = [f"{_bytes(kept.terms)} per image", f"attention {_bytes(kept.attention)}"]
        words += [f"each text's map {_bytes(kept.map)} or per head {_bytes(kept.map_per_head)}"]
        words += [] if kept.tokens is None else [f"tokens {_bytes(kept.tokens)}"]
        words += [f"while it runs {_bytes(kept.until_the_end)}"] if kept.until_the_end else []
        return ", ".join(words) + (" (default)" if depth == self.depth and len(self.memory) > 1 else "")

    def __str__(self) -> str:
        rows = self.rows()
        longest = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{longest}}  {value}" for what, value in rows)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        cells = "".join(f"<tr><th>{escape(what)}</th><td>{escape(value)}</td></tr>" for what, value in self.rows())
        return f"<table>{cells}</table>"

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        normalisation = None if self.normalisation is None else vars(self.normalisation)
        return plain | {
            "normalisation": normalisation,
            "memory": {key: vars(kept) for key, kept in self.memory.items()},
        }


def summarise(
    tower: Tower,
    module: nn.Module,
    *,
    name: str,
    pretrained: bool | None,
    depth: Depth,
    preprocess: Callable[[Image.Image], Tensor] | None,
    tokenize: object,
) -> Summary:
    """Describes a model.

    Args:
        tower: its tower.
        module: the model itself.
        name: of the model.
        pretrained: whether weights were loaded, None where that is not known.
        depth: which heads a decomposition has by default.
        preprocess: PIL image → ``[3, height, width]``; None where it is not known.
        tokenize: its function from texts to tokens, None for none.
    """
    facts = facts_of(tokenize)
    parameters = list(package_of(module).vision_module(module).parameters())
    possible: dict[Depth, bool] = {"all": bool(tower.blocks), "pool": tower.pooling != "cls"}
    return Summary(
        name=name,
        package=package_name(module),
        classes=classes_of(module),
        pretrained=pretrained,
        device=str(tower.device),
        dtype=str(tower.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        layers=tower.layers,
        heads=tower.heads if tower.blocks else 1 if tower.pool is None else tower.pool.heads,
        head_dim=tower.head_dim if tower.blocks else None,
        width=tower.width,
        embed_dim=tower.embed_dim,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        grid=tower.grid,
        tokens=tower.tokens,
        prefix_tokens=tower.prefix_tokens,
        pooling=_pooling(tower),
        depth=depth,
        activation=tower.activation,
        features=tuple(tower.special()),
        normalisation=None if preprocess is None else normalisation(preprocess, tower.image_size),
        tokenizer=None if facts is None else facts.kind,
        vocabulary=None if facts is None else facts.vocabulary,
        context=None if facts is None else facts.context,
        memory={each: _memory(tower, each) for each, is_possible in possible.items() if is_possible},
    )


def _pooling(tower: Tower) -> str:
    if tower.pooling == "cls":
        return "the class token" if tower.prefix_tokens else "the first token"
    if tower.pooling == "attention":
        assert tower.pool is not None
        kind = "an attention pool" if tower.pool.weights is None else "a pool of fixed weights"
        return f"{kind}, {tower.pool.heads} heads"
    over = "all tokens" if tower.pooled_from == 0 else "the patches"
    return f"the mean of {over}{', each after the final norm' if tower.pooling == 'normed_mean' else ''}"


def code_shape(tower: Tower, depth: Depth) -> tuple[int, int, int]:
    """Layers, heads and numbers of a head in the codes of an image, see :mod:`clipfast.basis`."""
    if depth == "pool":
        heads = 1 if tower.pool is None else tower.pool.heads
        return 1, heads, tower.width if tower.pool is None else len(tower.pool.value_weight) // heads
    if tower.pooling == "attention":
        return tower.layers, tower.heads, tower.embed_dim
    return tower.layers, tower.heads, tower.code_width if tower.blocks else 0


def _memory(tower: Tower, depth: Depth) -> Memory:
    """What :class:`clipfast.Contributions` holds of an image, and what the forward keeps for it until the end."""
    wide = torch.empty(0, dtype=accumulation_dtype(tower.dtype)).element_size()
    narrow = torch.empty(0, dtype=tower.dtype).element_size()
    layers, heads, code = code_shape(tower, depth)
    is_late = depth == "all" and tower.pooling in ("normed_mean", "attention")
    numbers = layers * heads * code + (2 + layers) * tower.embed_dim + 3  # codes; start, MLPs, rest; norm, mean, std
    rows = layers * heads * tower.tokens * wide
    has_tokens = depth == "pool" or tower.pool is None
    return Memory(
        terms=numbers * wide + tower.embed_dim * narrow,
        attention=rows,
        map=tower.tokens * wide,
        map_per_head=rows,
        tokens=layers * heads * code * tower.tokens * narrow + rows if has_tokens else None,
        until_the_end=2 * tower.layers * tower.tokens * tower.width * narrow if is_late else 0,
    )


def normalisation(preprocess: Callable[[Image.Image], Tensor], image_size: tuple[int, int]) -> Normalisation | None:
    """The mean and standard deviation of a preprocessing, seen from what it makes of a black and of a white image.

    Args:
        preprocess: PIL image → ``[3, height, width]``.
        image_size: height and width of an image that it takes.

    Returns:
        None where it does something else to values, or takes no such images.
    """
    height, width = image_size
    levels = []
    for value in (0, 128, 255):
        try:
            out = preprocess(Image.new("RGB", (width, height), (value, value, value))).double().flatten(1)
        except Exception:  # of a user's own function, which may expect anything
            return None
        if not len(out) or float((out - out[:, :1]).abs().max()) > 1e-5:
            return None
        levels.append(out[:, 0])
    black, grey, white = levels
    std = 1 / (white - black)
    if not bool(std.isfinite().all()) or float((black + (white - black) * (128 / 255) - grey).abs().max()) > 1e-5:
        return None
    mean, deviation = ([round(value, 6) for value in each.tolist()] for each in (-black * std, std))
    return Normalisation(tuple(mean), tuple(deviation))


def _normalisation(values: Normalisation | None) -> str:
    if values is None:
        return "no mean and standard deviation are known"
    mean, std = (" ".join(f"{value:.4g}" for value in each) for each in (values.mean, values.std))
    return f"mean {mean}, standard deviation {std}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
