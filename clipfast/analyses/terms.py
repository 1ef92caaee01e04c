"""Naming terms of the embedding: heads, MLPs, the class token's own part of a layer; as sets and as text.

Text is what a command line gets: items with commas between, each adding to the set::

    start           the start of the residual stream, at the pooled token
    mlps            every MLP; mlp 5: that of layer 5; mlp 3-7: of layers 3 to 7
    L4              the attention of a layer, all its heads; L0-L7: of eight layers
    L5.H3           one head
    cls             the class token's own part of every layer's attention; cls 5, cls 3-7: of some layers
    pool            all heads of a pooling; pool.H3: one of them; pool.mlp: the MLP after it
    nothing         the empty set

The names of :attr:`.Contributions.terms` are read, too: ``L5.attn.H3``, ``L5.mlp``. Layers count from 0, negative ones
from the end (``L0-L-5`` is all but the last four).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from clipfast.analyses.protocols import Source, sizes
from clipfast.errors import InputError
from clipfast.indices import resolve_heads, resolve_layer, resolve_layers

NOTHING = "nothing"
_HELP = "write start, mlps, mlp 5, L4, L0-L7, L5.H3, cls, cls 5 or nothing, with commas between"
_LAYERS = r"(-?\d+)(?:\s*-\s*{}(-?\d+))?"
_ATTENTION = re.compile(r"l" + _LAYERS.format("l?"), re.IGNORECASE)
_HEAD = re.compile(r"l(-?\d+)\s*\.\s*(?:attn\s*\.\s*)?h(\d+)", re.IGNORECASE)
_LAYER_MLP = re.compile(r"l(-?\d+)\s*\.\s*mlp", re.IGNORECASE)
_POOL = re.compile(r"pool\s*(\.|$)", re.IGNORECASE)
_NAMED = re.compile(r"(mlp|cls)\s*" + _LAYERS.format(""), re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Terms:
    """A set of terms of the embedding of one kind of model.

    The class token's part of a layer belongs to that layer's heads: where a head is in the set as a whole, its part is
    in it already and counts once.

    Attributes:
        shape: layers of the model and heads per layer.
        start: whether the start of the residual stream is in the set.
        heads: (layer, head) pairs.
        mlps: layers whose MLP is in the set.
        class_tokens: layers of which the class token's own part of the attention is in the set.
    """

    shape: tuple[int, int]
    start: bool = False
    heads: frozenset[tuple[int, int]] = frozenset()
    mlps: frozenset[int] = frozenset()
    class_tokens: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        model: Source,
        *,
        start: bool = False,
        heads: Iterable[tuple[int, int]] = (),
        mlps: Iterable[int] = (),
        class_tokens: Iterable[int] = (),
    ) -> "Terms":
        """The set of these terms; the empty set for none.

        Args:
            model: a model, or its tower or basis.
            start: the start of the residual stream.
            heads: (layer, head) pairs, layers negative from the end.
            mlps: layers of MLPs, negative from the end.
            class_tokens: layers, negative from the end.

        Raises:
            InputError: a layer or head that does not exist.
        """
        layers, count = shape = sizes(model)
        return cls(
            shape,
            start,
            frozenset(resolve_heads(heads, layers, count)),
            frozenset(resolve_layers(mlps, layers)),
            frozenset(resolve_layers(class_tokens, layers)),
        )

    @classmethod
    def all_heads(cls, model: Source) -> "Terms":
        """The attention of every layer."""
        return cls.attention(model, range(sizes(model)[0]))

    @classmethod
    def all_mlps(cls, model: Source) -> "Terms":
        """Every MLP; the start of the residual stream, which is much the same for all images, is not among them."""
        return cls.of(model, mlps=range(sizes(model)[0]))

    @classmethod
    def all_class_tokens(cls, model: Source) -> "Terms":
        """The class token's own part of every layer's attention."""
        return cls.of(model, class_tokens=range(sizes(model)[0]))

    @classmethod
    def attention(cls, model: Source, layers: Iterable[int]) -> "Terms":
        """All heads of some layers, negative from the end."""
        return cls.of(model, heads=[(layer, head) for layer in layers for head in range(sizes(model)[1])])

    @classmethod
    def cumulative(cls, model: Source) -> tuple["Terms", ...]:
        """The attention of the first layer, of the first two, …, of all: ``L`` sets."""
        return tuple(cls.attention(model, range(layer + 1)) for layer in range(sizes(model)[0]))

    @classmethod
    def parse(cls, text: str, model: Source) -> "Terms":
        """The set that a text names, see the top of this module.

        Raises:
            InputError: an item that is no term, or one that the model does not have; the message quotes it.
        """
        layers, count = shape = sizes(model)
        whole = cls(shape)
        if not text.strip():
            raise InputError(f"no terms are named: {_HELP}")
        for item in text.split(","):
            named = " ".join(item.split())
            try:
                whole |= cls(shape) if named.casefold() == NOTHING else _item(named, shape)
            except InputError as error:
                raise InputError(f"{named!r}: {error}") from error
            except ValueError:
                known = f"layers are 0 to {layers - 1}, heads 0 to {count - 1}"
                raise InputError(f"{named!r} is no term: {_HELP} ({known})") from None
        return whole

    def __or__(self, other: "Terms") -> "Terms":
        """Terms in either set."""
        self._check_shape(other)
        return Terms(
            self.shape,
            self.start or other.start,
            self.heads | other.heads,
            self.mlps | other.mlps,
            self.class_tokens | other.class_tokens,
        )

    def __sub__(self, other: "Terms") -> "Terms":
        """Terms of this set that are named in no other; a head takes no class token's part with it."""
        self._check_shape(other)
        return Terms(
            self.shape,
            self.start and not other.start,
            self.heads - other.heads,
            self.mlps - other.mlps,
            self.class_tokens - other.class_tokens,
        )

    def _check_shape(self, other: "Terms") -> None:
        if self.shape != other.shape:
            first, second = (f"{layers} layers of {heads} heads" for layers, heads in (self.shape, other.shape))
            raise InputError(f"these terms are of different models: {first}, and {second}")

    def __bool__(self) -> bool:
        return bool(self.start or self.heads or self.mlps or self.class_tokens)

    def whole(self, layer: int) -> bool:
        """Whether all heads of a layer are in the set."""
        return all((layer, head) in self.heads for head in range(self.shape[1]))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of which any head or the class token's part is in the set, ascending."""
        return tuple(sorted({layer for layer, _ in self.heads} | self.class_tokens))

    @property
    def split_layers(self) -> tuple[int, ...]:
        """Layers whose class token's part is in the set on its own, beside heads that are not: it must be known."""
        return tuple(sorted(layer for layer in self.class_tokens if not self.whole(layer)))

    def __str__(self) -> str:
        layers = self.shape[0]
        whole = [layer for layer in range(layers) if self.whole(layer)]
        items = ["start"] if self.start else []
        items += ["mlps"] if len(self.mlps) == layers else _runs("mlp {}", "mlp {}-{}", self.mlps)
        items += ["cls"] if len(self.class_tokens) == layers else _runs("cls {}", "cls {}-{}", self.class_tokens)
        items += _runs("L{}", "L{}-L{}", whole)
        items += [f"L{layer}.H{head}" for layer, head in sorted(self.heads) if layer not in whole]
        return ", ".join(items) or NOTHING

    def __repr__(self) -> str:
        return f"Terms({str(self)!r})"


def as_terms(terms: Terms | str, model: Source) -> Terms:
    """Terms, or their text, as terms of this model.

    Raises:
        InputError: text that is wrong, or terms of a model with other layers or heads.
    """
    if isinstance(terms, str):
        return Terms.parse(terms, model)
    terms._check_shape(Terms(sizes(model)))
    return terms


def _item(text: str, shape: tuple[int, int]) -> Terms:
    """One item of the text; ``ValueError`` where it is none."""
    model = _Shape(*shape)
    if _POOL.match(text):
        if shape[0] != 1:
            raise InputError("these are the heads of the blocks, not of a pooling")
        text = _POOL.sub(r"L0\1", text, count=1)  # a pooling is one layer
    if text.casefold() == "start":
        return Terms.of(model, start=True)
    if text.casefold() == "mlps":
        return Terms.all_mlps(model)
    if text.casefold() == "cls":
        return Terms.all_class_tokens(model)
    if match := _HEAD.fullmatch(text):
        return Terms.of(model, heads=[(int(match[1]), int(match[2]))])
    if match := _LAYER_MLP.fullmatch(text):
        return Terms.of(model, mlps=[int(match[1])])
    if match := _ATTENTION.fullmatch(text):
        return Terms.attention(model, _range(match[1], match[2], shape[0]))
    if match := _NAMED.fullmatch(text):
        layers = _range(match[2], match[3], shape[0])
        if match[1].casefold() == "cls":
            return Terms.of(model, class_tokens=layers)
        return Terms.of(model, mlps=layers)
    raise ValueError(text)


@dataclass(frozen=True)
class _Shape:
    """Sizes alone."""

    layers: int
    heads: int


def _range(first: str, last: str | None, layers: int) -> range:
    start, stop = (resolve_layer(int(text), layers) for text in (first, last or first))
    if start > stop:
        raise InputError(f"the range goes down, from layer {start} to {stop}")
    return range(start, stop + 1)


def _runs(one: str, several: str, numbers: Iterable[int]) -> list[str]:
    """Numbers as text, neighbours together."""
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in ordered]
    ends = [number for number in ordered if number + 1 not in ordered]
    return [
        one.format(first) if first == last else several.format(first, last)
        for first, last in zip(starts, ends, strict=True)
    ]
