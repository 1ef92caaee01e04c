"""What a forward pass of a vision tower costs, kernel by kernel: arithmetic on shapes, nothing runs.

A forward pass is a tuple of :class:`Step`, one per kernel, for a whole batch. Three are described:

- :func:`plain_eager`: open_clip's own forward as eager torch runs it under ``inference_mode`` in one dtype. LayerNorm,
  product of queries, keys and values, attention, output projection, residual add, LayerNorm, first MLP product,
  activation, second MLP product, residual add: each is a kernel of its own, QuickGELU's ``x·sigmoid(1.702 x)`` three.
- :func:`plain_fused`: the same mathematics, with every elementwise pass but LayerNorm inside a neighbouring product.
  A bound rather than an implementation, and the hardest opponent.
- :func:`benchmarks.costs_decomposed.decomposed`: what clipfast does.

Conventions, the same everywhere:

- FLOPs are two per multiply-add. ``products`` are those of matrix products, convolution and attention: exactly what
  ``torch.utils.flop_counter`` counts, and the tests hold the two equal for every model. What no counter of torch sees
  is kept apart: ``pointwise`` (multiply-adds that are no matrix product: alpha times text maps) and ``padding`` (what
  tiles of attention compute where there is no token). LayerNorm, softmax, activations and adds cost bytes only.
- Bytes are the fewest a kernel can move: every input read once, every output written once, weights once per batch.
  Vectors (biases, LayerNorm's parameters) and statistics per row are left out.
- Launches cost nothing here, and no head_dim is padded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

FLOAT32 = 4
"""Bytes of a float32 number: what a decomposition keeps (alpha, codes, MLP terms, maps), whatever the model's dtype."""

Unit = Literal["matrix", "attention", "float32"]


@dataclass(frozen=True)
class Shape:
    """The sizes and switches of a vision tower that decide what it costs."""

    grid: tuple[int, int]
    patch: tuple[int, int]
    layers: int
    width: int
    heads: int
    hidden: int
    embed_dim: int
    quick_gelu: bool = False
    pooling: Literal["cls", "mean"] = "cls"
    ln_pre: bool = True
    layer_scale: bool = False
    norm_after_pool: bool = False

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patches and the class token, ``N``."""
        return self.patches + 1

    @property
    def pixels(self) -> int:
        """Numbers in one patch."""
        return 3 * self.patch[0] * self.patch[1]

    @property
    def pooled_rows(self) -> int:
        """Rows of the residual stream that the embedding reads."""
        return 1 if self.pooling == "cls" else self.patches


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile of attention scores."""

    queries: int = 128
    keys: int = 64


def padded_scores(queries: int, keys: int, tile: Tile) -> int:
    """Attention scores that whole tiles compute for ``queries × keys``."""
    return -(-queries // tile.queries) * tile.queries * (-(-keys // tile.keys) * tile.keys)


@dataclass(frozen=True)
class Step:
    """One kernel, for a whole batch.

    Attributes:
        name: what it computes.
        products: FLOPs of matrix products, convolution, attention.
        pointwise: FLOPs of multiply-adds outside of those.
        padding: FLOPs spent on tiles' rows and columns without a token.
        read: bytes.
        written: bytes.
        unit: what bounds its FLOPs: matrix units, attention (softmax runs beside the matrix units), float32 arithmetic.
    """

    name: str
    products: int = 0
    pointwise: int = 0
    padding: int = 0
    read: int = 0
    written: int = 0
    unit: Unit = "matrix"

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def executed(self) -> int:
        """FLOPs a device carries out."""
        return self.products + self.pointwise + self.padding


Steps: TypeAlias = tuple[Step, ...]


def products(steps: Iterable[Step]) -> int:
    """FLOPs of all matrix products, what a counter sees."""
    return sum(step.products for step in steps)


def moved(steps: Iterable[Step]) -> int:
    """Bytes read and written by all steps."""
    return sum(step.moved for step in steps)


@dataclass(frozen=True)
class Batch:
    """Images of one shape in one dtype, and the steps that several forwards have in common.

    Attributes:
        shape: the tower.
        images: how many, ``B``.
        element: bytes of one number in the model's dtype.
        tile: of attention.
    """

    shape: Shape
    images: int
    element: int = 2
    tile: Tile = Tile()

    @property
    def stream(self) -> int:
        """Numbers in the residual stream of all images, ``B·N·W``."""
        return self.images * self.shape.tokens * self.shape.width

    @property
    def pooled(self) -> int:
        """Numbers in one row per image, ``B·W``."""
        return self.images * self.shape.width

    def step(
        self,
        name: str,
        *,
        products: int = 0,
        pointwise: int = 0,
        read: int = 0,
        written: int = 0,
        read_float32: int = 0,
        written_float32: int = 0,
        unit: Unit = "matrix",
    ) -> Step:
        """A kernel that reads and writes so many numbers of the model's dtype, and so many of float32."""
        return Step(
            name,
            products=products,
            pointwise=pointwise,
            read=self.element * read + FLOAT32 * read_float32,
            written=self.element * written + FLOAT32 * written_float32,
            unit=unit,
        )

    def linear(self, name: str, rows: int, inputs: int, outputs: int, *, epilogue: int = 0) -> Step:
        """``rows`` rows per image times a weight matrix; its epilogue reads ``epilogue`` numbers more."""
        entries = self.images * rows
        return self.step(
            name,
            products=2 * entries * inputs * outputs,
            read=entries * inputs + inputs * outputs + epilogue,
            written=entries * outputs,
        )

    def elementwise(self, name: str, rows: int, *, reads: int = 1, writes: int = 1, width: int | None = None) -> Step:
        """A pass that reads and writes so many tensors of ``rows`` rows per image, as wide as the residual stream."""
        numbers = self.images * rows * (self.shape.width if width is None else width)
        return self.step(name, read=reads * numbers, written=writes * numbers)

    def attention(self, scores: int) -> Step:
        """Attention of all tokens, of which ``scores`` scores are computed per head and image."""
        tokens, width = self.shape.tokens, self.shape.width
        return Step(
            "attention",
            products=4 * self.images * tokens**2 * width,
            padding=4 * self.images * (scores - tokens**2) * width,
            read=self.element * 3 * self.stream,
            written=self.element * self.stream,
            unit="attention",
        )

    def flash_attention(self) -> Step:
        """Tiles over all tokens: one token past a whole tile costs a row and a column of tiles."""
        return self.attention(padded_scores(self.shape.tokens, self.shape.tokens, self.tile))


# ------------------------------------------------------------------------------------------------------------- plain


def plain_eager(batch: Batch) -> Steps:
    """The plain forward, one kernel after the other."""
    shape = batch.shape
    patches = batch.images * shape.patches * shape.width
    table = shape.tokens * shape.width
    return (
        batch.linear("patch convolution", shape.patches, shape.pixels, shape.width),
        batch.step("class token", read=patches, written=batch.stream),
        batch.step("position", read=batch.stream + table, written=batch.stream),
        *_ln_pre(batch),
        *_eager_block(batch) * shape.layers,
        *_eager_end(batch),
    )


def _ln_pre(batch: Batch) -> Steps:
    return (batch.elementwise("ln_pre", batch.shape.tokens),) if batch.shape.ln_pre else ()


def layer_scale(batch: Batch, rows: int) -> Steps:
    """The pass that multiplies by a layer scale, where the tower has one."""
    return (batch.elementwise("layer scale", rows),) if batch.shape.layer_scale else ()


def _eager_activation(batch: Batch) -> Steps:
    tokens, hidden = batch.shape.tokens, batch.shape.hidden
    if not batch.shape.quick_gelu:
        return (batch.elementwise("activation", tokens, width=hidden),)
    return (
        batch.elementwise("activation: 1.702 x", tokens, width=hidden),
        batch.elementwise("activation: sigmoid", tokens, width=hidden),
        batch.elementwise("activation: product", tokens, reads=2, width=hidden),
    )


def _eager_block(batch: Batch) -> Steps:
    shape = batch.shape
    tokens, width, hidden = shape.tokens, shape.width, shape.hidden
    scale = layer_scale(batch, tokens)
    return (
        batch.elementwise("ln_1", tokens),
        batch.linear("queries, keys, values", tokens, width, 3 * width),
        batch.flash_attention(),
        batch.linear("output projection", tokens, width, width),
        *scale,
        batch.elementwise("residual add", tokens, reads=2),
        batch.elementwise("ln_2", tokens),
        batch.linear("MLP in", tokens, width, hidden),
        *_eager_activation(batch),
        batch.linear("MLP out", tokens, hidden, width),
        *scale,
        batch.elementwise("residual add", tokens, reads=2),
    )


def _eager_end(batch: Batch) -> Steps:
    shape = batch.shape
    mean = batch.step("pooling", read=batch.pooled * shape.pooled_rows, written=batch.pooled)
    return (
        *([mean] if shape.pooling == "mean" else []),
        # Without norm_after_pool open_clip normalises every token and then picks one.
        batch.elementwise("ln_post", 1 if shape.norm_after_pool else shape.tokens),
        batch.linear("projection", 1, shape.width, shape.embed_dim),
    )


def plain_fused(batch: Batch) -> Steps:
    """The plain forward if every elementwise pass but LayerNorm cost nothing of its own."""
    shape = batch.shape
    tokens, width, hidden = shape.tokens, shape.width, shape.hidden
    block = (
        batch.elementwise("ln_1", tokens),
        batch.linear("queries, keys, values", tokens, width, 3 * width),
        batch.flash_attention(),
        batch.linear("output projection", tokens, width, width, epilogue=batch.stream),
        batch.elementwise("ln_2", tokens),
        batch.linear("MLP in", tokens, width, hidden),
        batch.linear("MLP out", tokens, hidden, width, epilogue=batch.stream),
    )
    start = batch.linear("patch convolution", shape.patches, shape.pixels, width, epilogue=tokens * width)
    return (
        replace(start, written=batch.element * batch.stream),  # class token and position in its epilogue
        *_ln_pre(batch),
        *block * shape.layers,
        batch.step("ln_post", read=batch.pooled * shape.pooled_rows, written=batch.pooled),
        batch.linear("projection", 1, width, shape.embed_dim),
    )
