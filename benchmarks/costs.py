"""The cost of a vision tower's forward pass, kernel by kernel, computed from shapes; nothing runs.

A forward pass is a tuple of :class:`Step`, one per kernel, for a whole batch. Three forward passes are modelled:

- :func:`plain_eager`: open_clip's own forward as eager torch runs it under ``inference_mode`` in one dtype. Each
  of these is a separate kernel: LayerNorm, product of queries, keys and values, attention, output projection, residual
  add, LayerNorm, first MLP product, activation, second MLP product, residual add. QuickGELU's ``x·sigmoid(1.702 x)``
  is three.
- :func:`plain_fused`: the same mathematics, with every elementwise pass except LayerNorm fused into a neighbouring
  product. It is a lower bound on the cost, not an implementation.
- :func:`benchmarks.costs_decomposed.decomposed`: the forward pass of clipfast.

Conventions:

- A multiply-add is two FLOPs. ``products`` counts matrix products, convolution and attention, exactly as
  ``torch.utils.flop_counter`` does; the tests compare the two for every model. FLOPs that torch does not count are
  separate: ``pointwise`` (multiply-adds outside matrix products, such as alpha times text maps) and ``padding``
  (attention tiles beyond the last token). LayerNorm, softmax, activations and adds count as bytes only.
- Bytes are the minimum a kernel can move: every input read once, every output written once, weights once per batch.
  Vectors (biases, LayerNorm parameters) and per-row statistics are not counted.
- Launches are free, and head_dim is not padded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

FLOAT32 = 4
"""Bytes of a float32 number. Alpha, codes, MLP terms and maps are float32 in every model dtype."""

Unit = Literal["matrix", "attention", "float32"]


@dataclass(frozen=True)
class Shape:
    """The sizes and options of a vision tower that determine its cost."""

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
        """Patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patches and the class token, ``N``."""
        return self.patches + 1

    @property
    def pixels(self) -> int:
        """Values in one patch."""
        return 3 * self.patch[0] * self.patch[1]

    @property
    def pooled_rows(self) -> int:
        """Rows of the residual stream that the embedding reads."""
        return 1 if self.pooling == "cls" else self.patches


@dataclass(frozen=True)
class Tile:
    """Size of one tile of attention scores, in queries and keys."""

    queries: int = 128
    keys: int = 64


def padded_scores(queries: int, keys: int, tile: Tile) -> int:
    """Attention scores computed for ``queries × keys``, rounded up to whole tiles."""
    return -(-queries // tile.queries) * tile.queries * (-(-keys // tile.keys) * tile.keys)


@dataclass(frozen=True)
class Step:
    """One kernel, for a whole batch.

    Attributes:
        name: what the kernel computes.
        products: FLOPs of matrix products, convolution, attention.
        pointwise: FLOPs of other multiply-adds.
        padding: FLOPs of tile rows and columns without a token.
        read: bytes read.
        written: bytes written.
        unit: the rate that bounds its FLOPs: matrix units, attention (softmax and matrix units), float32 arithmetic.
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
        """FLOPs that a device executes."""
        return self.products + self.pointwise + self.padding


Steps: TypeAlias = tuple[Step, ...]


def products(steps: Iterable[Step]) -> int:
    """FLOPs of all matrix products, as ``torch.utils.flop_counter`` counts them."""
    return sum(step.products for step in steps)


def moved(steps: Iterable[Step]) -> int:
    """Bytes read and written by all steps."""
    return sum(step.moved for step in steps)


@dataclass(frozen=True)
class Batch:
    """Images of one shape in one dtype, and the steps that the forward passes share.

    Attributes:
        shape: the tower.
        images: number of images, ``B``.
        element: bytes per value in the model's dtype.
        tile: tile size of attention.
    """

    shape: Shape
    images: int
    element: int = 2
    tile: Tile = Tile()

    @property
    def stream(self) -> int:
        """Values in the residual stream of all images, ``B·N·W``."""
        return self.images * self.shape.tokens * self.shape.width

    @property
    def pooled(self) -> int:
        """Values in one row per image, ``B·W``."""
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
        """A kernel, from the number of values it reads and writes in the model's dtype and in float32."""
        return Step(
            name,
            products=products,
            pointwise=pointwise,
            read=self.element * read + FLOAT32 * read_float32,
            written=self.element * written + FLOAT32 * written_float32,
            unit=unit,
        )

    def linear(self, name: str, rows: int, inputs: int, outputs: int, *, epilogue: int = 0) -> Step:
        """``rows`` rows per image times a weight matrix; its epilogue reads ``epilogue`` more values."""
        entries = self.images * rows
        return self.step(
            name,
            products=2 * entries * inputs * outputs,
            read=entries * inputs + inputs * outputs + epilogue,
            written=entries * outputs,
        )

    def elementwise(self, name: str, rows: int, *, reads: int = 1, writes: int = 1, width: int | None = None) -> Step:
        """An elementwise pass that reads and writes tensors of ``rows`` rows per image, of width ``W`` by default."""
        values = self.images * rows * (self.shape.width if width is None else width)
        return self.step(name, read=reads * values, written=writes * values)

    def attention(self, scores: int) -> Step:
        """Attention over all tokens that computes ``scores`` scores per head and image, padding included."""
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
        """Attention tiled over all tokens; one token beyond a whole tile adds a row and a column of tiles."""
        return self.attention(padded_scores(self.shape.tokens, self.shape.tokens, self.tile))


# ------------------------------------------------------------------------------------------------------------- plain


def plain_eager(batch: Batch) -> Steps:
    """The plain forward in eager torch."""
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
    """The multiplication by a layer scale; empty if the tower has none."""
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
        # Without norm_after_pool, open_clip normalises every token before it pools.
        batch.elementwise("ln_post", 1 if shape.norm_after_pool else shape.tokens),
        batch.linear("projection", 1, shape.width, shape.embed_dim),
    )


def plain_fused(batch: Batch) -> Steps:
    """The plain forward with every elementwise pass except LayerNorm fused into a product."""
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
