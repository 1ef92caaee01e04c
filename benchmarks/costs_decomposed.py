"""The cost of a decomposed forward, kernel by kernel, in the conventions of :mod:`benchmarks.costs`.

:func:`decomposed` follows :func:`clipfast.forward.decompose` with fused kernels: products add themselves to the
residual stream where :class:`clipfast.forward.stream.Stream` lets them, else the sum and LayerNorm are one kernel, the
activation is an epilogue of the first MLP product, attention is split into class token and patches and
writes alpha, and the last block is computed for the class token alone, without keys and values:
``q·(W_K x) = (W_Kᵀ q)·x`` and ``Σ_n α_n W_V x_n = W_V (Σ_n α_n x_n)``.

Kernels multiply in the model's dtype and accumulate in float32; the stored arrays are float32. The readout of the MLP
terms multiplies float32 tensors, which is slow for its size. Two steps outside the forward are not included: the
readout of heads from codes (``Contributions.heads()``), and folding texts into the basis, once per set of texts.

:func:`plain_same_kernels` is the plain forward with the same kernels, which isolates the cost of the decomposition.
"""

from dataclasses import dataclass, replace

from benchmarks.costs import Batch, Step, Steps, layer_scale, padded_scores, products


@dataclass(frozen=True)
class Options:
    """What a decomposition computes besides heads.

    Attributes:
        alpha: the pooled token's attention.
        texts: number of text maps, summed over heads.
        tokens: contributions of every token through every head, ``[B, N, H, D]`` per kept layer.
        last: keep this many layers, from the end; None keeps all.
    """

    alpha: bool = False
    texts: int = 0
    tokens: bool = False
    last: int | None = None

    def keeps(self, layer: int, layers: int) -> bool:
        """Whether ``layer`` of ``layers`` is kept."""
        return self.last is None or layer >= layers - self.last


def decomposed(batch: Batch, options: Options | None = None) -> Steps:
    """The decomposed forward with fused kernels: heads, and what ``options`` adds."""
    options = options or Options()
    shape = batch.shape
    steps = [*_start(batch), _pool(batch, "start of the residual stream")]
    for layer in range(shape.layers - (shape.pooling == "cls")):
        steps += _block(batch, options, layer)
    steps += _class_token_block(batch, options) if shape.pooling == "cls" else _mean_of_residual(batch)
    return (*steps, *_readout(batch, options))


def plain_same_kernels(batch: Batch) -> Steps:
    """The plain forward with the kernels of the decomposed one, and attention in tiles over all tokens."""
    shape = batch.shape
    blocks = [
        step
        for layer in range(shape.layers)
        for step in (*_before_attention(batch, layer), batch.flash_attention(), *_after_attention(batch))
    ]
    end = _mean_of_residual(batch)
    return (*_start(batch), *blocks, *end, *_embedding(batch))


def split_attention(batch: Batch) -> Step:
    """Attention in tiles over the patches alone; the class token's row and column of scores are computed as vectors."""
    patches, tokens = batch.shape.patches, batch.shape.tokens
    return batch.attention(padded_scores(patches, patches, batch.tile) + tokens**2 - patches**2)


def saved_by_last_block(batch: Batch) -> int:
    """FLOPs of matrix products saved by a last block for the class token alone (0 with mean pooling)."""
    if batch.shape.pooling != "cls":
        return 0
    full_block = (*_before_attention(batch, batch.shape.layers - 1), split_attention(batch), *_after_attention(batch))
    return products(full_block) - products(_class_token_block(batch, Options()))


def _start(batch: Batch) -> Steps:
    """From pixels to the start of the residual stream."""
    shape = batch.shape
    patches = batch.images * shape.patches * shape.width
    name = "position and ln_pre" if shape.ln_pre else "position"
    return (
        batch.elementwise("pixels by patch", shape.patches, width=shape.pixels),
        batch.linear("patch convolution", shape.patches, shape.pixels, shape.width),
        batch.step(name, read=patches + shape.tokens * shape.width, written=batch.stream),
    )


def _embedding(batch: Batch) -> Steps:
    """The final LayerNorm of one row per image, and the projection."""
    return batch.elementwise("ln_post", 1), batch.linear("projection", 1, batch.shape.width, batch.shape.embed_dim)


def _pool(batch: Batch, name: str) -> Step:
    """The rows that the embedding reads, one float32 row per image."""
    return batch.step(name, read=batch.pooled * batch.shape.pooled_rows, written_float32=batch.pooled)


def _attention_adds(batch: Batch) -> bool:
    """Whether output projections add themselves to the residual stream."""
    return not batch.shape.layer_scale


def _mlps_add(batch: Batch) -> bool:
    """Whether MLPs add themselves to the residual stream: their term must then be computed again, for one row."""
    return _attention_adds(batch) and batch.shape.pooling == "cls"


def _norm(batch: Batch, name: str, *, adds: bool, rows: int | None = None) -> Step:
    """The LayerNorm of the stream; where ``adds`` is false it adds a term first, ``x += added``."""
    rows = batch.shape.tokens if rows is None else rows
    return batch.elementwise(name, rows) if adds else batch.elementwise(f"add and {name}", rows, reads=2, writes=2)


def _before_attention(batch: Batch, layer: int) -> Steps:
    norm = _norm(batch, "ln_1", adds=layer == 0 or _mlps_add(batch))
    return norm, batch.linear("queries, keys, values", batch.shape.tokens, batch.shape.width, 3 * batch.shape.width)


def _after_attention(batch: Batch) -> Steps:
    """From the head outputs to the residual stream with the MLP output in it, or beside it."""
    tokens, width, hidden = batch.shape.tokens, batch.shape.width, batch.shape.hidden
    scale = layer_scale(batch, tokens)
    attention_adds, mlps_add = _attention_adds(batch), _mlps_add(batch)
    return (
        batch.linear("output projection", tokens, width, width, epilogue=batch.stream if attention_adds else 0),
        *scale,
        _norm(batch, "ln_2", adds=attention_adds),
        batch.linear("MLP in", tokens, width, hidden),
        batch.linear("MLP out", tokens, hidden, width, epilogue=batch.stream if mlps_add else 0),
        *scale,
    )


def _mlp_term(batch: Batch) -> Step:
    """The pooled row of an MLP's output: computed again where the product went to the stream at once."""
    if not _mlps_add(batch):
        return _pool(batch, "MLP term")
    width, hidden = batch.shape.width, batch.shape.hidden
    return batch.step(
        "MLP term",
        products=2 * batch.images * hidden * width,
        read=batch.images * hidden + hidden * width,
        written_float32=batch.pooled,
    )


def _after_class_attention(batch: Batch) -> Steps:
    """:func:`_after_attention` for the class token alone: its terms are kept, so nothing adds itself."""
    width, hidden = batch.shape.width, batch.shape.hidden
    scale = layer_scale(batch, 1)
    return (
        batch.linear("output projection", 1, width, width),
        *scale,
        _norm(batch, "ln_2", adds=False, rows=1),
        batch.linear("MLP in", 1, width, hidden),
        batch.linear("MLP out", 1, hidden, width),
        *scale,
    )


def _block(batch: Batch, options: Options, layer: int) -> Steps:
    return (
        *_before_attention(batch, layer),
        split_attention(batch),
        _pool(batch, "codes"),
        *_kept(batch, options, layer),
        *_after_attention(batch),
        _mlp_term(batch),
    )


def _kept(batch: Batch, options: Options, layer: int) -> Steps:
    """The extra steps of a block that computes all values, for a kept layer or one that is not kept."""
    if not options.keeps(layer, batch.shape.layers):
        return (_unkept(batch),)
    alpha = (_alpha(batch),) if options.alpha or options.texts or options.tokens else ()
    return (*alpha, *_of_values(batch, options))


def _of_values(batch: Batch, options: Options) -> Steps:
    maps = (_maps(batch, options.texts),) if options.texts else ()
    return (*maps, *(_token_contributions(batch) if options.tokens else ()))


def _unkept(batch: Batch) -> Step:
    """Adds the pooled attention of a layer that is not kept to their sum."""
    width = batch.shape.width
    return batch.step(
        "attention not kept",
        products=2 * batch.pooled * width,
        read=width * width,
        read_float32=2 * batch.pooled,
        written_float32=batch.pooled,
        unit="float32",
    )


def _alpha(batch: Batch) -> Step:
    """One attention row per head. The class token's row exists already and is only written."""
    shape = batch.shape
    rows = batch.images * shape.heads * shape.tokens
    if shape.pooling == "cls":
        return batch.step("alpha", written_float32=rows)
    # The mean over patch rows needs their softmax denominators first, so the scores are computed twice.
    scores = shape.patches * shape.tokens
    step = batch.step(
        "alpha",
        products=2 * batch.images * scores * shape.width,
        read=2 * batch.stream,
        written_float32=rows,
        unit="attention",
    )
    waste = padded_scores(shape.patches, shape.tokens, batch.tile) - scores
    return replace(step, padding=2 * batch.images * waste * shape.width)


def _maps(batch: Batch, texts: int) -> Step:
    """``map[n,t] += Σ_h alpha[h,n] <v[n,h], U[h,:,t]>``."""
    shape = batch.shape
    rows = batch.images * shape.tokens
    return batch.step(
        "text maps",
        products=2 * rows * shape.width * texts,
        pointwise=2 * rows * shape.heads * texts,
        read=batch.stream,
        read_float32=rows * shape.heads + shape.width * texts + rows * texts,
        written_float32=rows * texts,
    )


def _token_contributions(batch: Batch) -> Steps:
    """A copy of one layer's values, and the contribution of every token through every head."""
    shape = batch.shape
    rows = batch.images * shape.tokens
    contributions = batch.step(
        "token contributions",
        products=2 * rows * shape.width * shape.embed_dim,
        pointwise=2 * rows * shape.heads * shape.embed_dim,
        read=batch.stream,
        read_float32=rows * shape.heads + shape.width * shape.embed_dim,
        written_float32=rows * shape.heads * shape.embed_dim,
    )
    return batch.elementwise("values copied", shape.tokens), contributions


def _class_token_block(batch: Batch, options: Options) -> Steps:
    """The last block for the class token alone."""
    shape = batch.shape
    kept = options.keeps(shape.layers - 1, shape.layers)
    return (
        batch.elementwise("ln_1", shape.tokens) if shape.layers == 1 or _mlps_add(batch) else _last_add_norm(batch),
        *_query_row(batch),
        *(_last_kept(batch, options) if kept else [_unkept(batch)]),
        *_after_class_attention(batch),
        batch.step("add and MLP term", read=2 * batch.pooled, written=batch.pooled, written_float32=batch.pooled),
    )


def _last_add_norm(batch: Batch) -> Step:
    """The last LayerNorm of all tokens; of the residual stream itself, only the class token's row is written."""
    return batch.step("add and ln_1", read=2 * batch.stream, written=batch.stream + batch.pooled)


def _query_row(batch: Batch) -> Steps:
    """Attention of one query, computed from the tokens in two passes with the softmax between them."""
    shape = batch.shape
    weights = shape.width * shape.width
    by_head = batch.pooled * shape.heads  # a row as wide as the residual stream for every head
    scores = batch.images * shape.heads * shape.tokens
    one_row = 2 * batch.images * weights
    all_tokens = 2 * batch.stream * shape.heads
    return (
        batch.linear("query", 1, shape.width, shape.width),
        batch.step("keys into query", products=one_row, read=batch.pooled + weights, written_float32=by_head),
        batch.step("logits", products=all_tokens, read=batch.stream, read_float32=by_head, written_float32=scores),
        batch.step(
            "mixed tokens", products=all_tokens, read=batch.stream, read_float32=scores, written_float32=by_head
        ),
        batch.step("codes", products=one_row, read=weights, read_float32=by_head, written_float32=batch.pooled),
    )


def _last_kept(batch: Batch, options: Options) -> Steps:
    """Outputs of the last block. Alpha is already computed; values are computed only where that is cheaper."""
    shape = batch.shape
    if options.texts and not options.tokens and shape.heads * options.texts < shape.width:
        return _maps_from_tokens(batch, options.texts)
    if not options.texts and not options.tokens:
        return ()
    return batch.linear("values", shape.tokens, shape.width, shape.width), *_of_values(batch, options)


def _maps_from_tokens(batch: Batch, texts: int) -> Steps:
    """Text maps with the value projection folded into the texts, once per batch."""
    shape = batch.shape
    rows, columns = batch.images * shape.tokens, shape.heads * texts
    fold = batch.step(
        "values into texts",
        products=2 * shape.width * (shape.width + 1) * texts,  # with its bias
        read=shape.width * shape.width,
        read_float32=shape.width * texts,
        written_float32=shape.width * columns,
    )
    maps = batch.step(
        "text maps",
        products=2 * rows * shape.width * columns,
        pointwise=2 * rows * columns,
        read=batch.stream,
        read_float32=rows * shape.heads + shape.width * columns + rows * texts,
        written_float32=rows * texts,
    )
    return fold, maps


def _mean_of_residual(batch: Batch) -> Steps:
    """The last residual add, unless it is done, and the mean over the patches."""
    rows = batch.pooled * batch.shape.pooled_rows
    if batch.shape.pooling == "cls":
        return () if _mlps_add(batch) else (batch.elementwise("residual add", 1, reads=2),)
    return (batch.step("add and pooling", read=2 * rows, written_float32=batch.pooled),)


def _readout(batch: Batch, options: Options) -> Steps:
    """The embedding; start, MLPs and the rest term in the joint space; the scaling of maps."""
    shape = batch.shape
    terms, matrix = batch.images * (shape.layers + 2), shape.width * shape.embed_dim
    readout = batch.step(
        "readout of MLP terms",
        products=2 * terms * matrix,
        read_float32=terms * shape.width + matrix,
        written_float32=terms * shape.embed_dim,
        unit="float32",
    )
    maps = batch.images * shape.tokens * options.texts
    scaling = (
        batch.step("maps set to zero", written_float32=maps),
        batch.step("maps scaled", read_float32=maps, written_float32=maps),
    )
    return *_embedding(batch), readout, *(scaling if options.texts else ())
