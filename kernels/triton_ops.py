"""The operations as Triton kernels: which of them, where they live, and what they refuse.

Each operation has a file of its own with its kernel, its launcher and its configurations; this table is what
:mod:`clipfast.kernels.dispatch` reads.
"""

from collections.abc import Mapping

from clipfast.kernels import (
    attention,
    layer_norm,
    mlp,
    moments,
    query_row,
    query_row_tokens,
    span,
    text_maps,
    token_contributions,
)
from clipfast.kernels.dispatch import Implementation

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "attention": Implementation(attention.run, attention.refuses, attention.variants),
    "query_row": Implementation(query_row.run, query_row.refuses, query_row.variants),
    "query_row_from_tokens": Implementation(query_row_tokens.run, query_row_tokens.refuses, query_row_tokens.variants),
    "moments": Implementation(moments.run, moments.refuses, moments.variants),
    "span": Implementation(span.run, span.refuses, span.variants),
    "text_maps": Implementation(text_maps.run, text_maps.refuses, text_maps.variants),
    "text_maps_from_tokens": Implementation(text_maps.run_from_tokens, text_maps.refuses_from_tokens),
    "layered_text_maps": Implementation(text_maps.run_layered, text_maps.refuses_layered, text_maps.variants_layered),
    "head_maps": Implementation(
        token_contributions.run_maps, token_contributions.refuses_maps, token_contributions.variants_maps
    ),
    "token_contributions": Implementation(
        token_contributions.run, token_contributions.refuses, token_contributions.variants
    ),
    "linear_activation": Implementation(mlp.run, mlp.refuses, mlp.variants),
    "add_layer_norm": Implementation(layer_norm.run, layer_norm.refuses, layer_norm.variants),
}
"""By the operations' names in :mod:`clipfast.kernels.ops`."""
