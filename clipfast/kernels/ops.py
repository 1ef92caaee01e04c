"""The operations under one name: ``from clipfast.kernels import ops; ops.attention(qkv)``.

They work on any tensors, on any device, under ``torch.compile`` too; ``docs/kernels/operations.md`` has an example of
each. Arguments are checked, then a backend computes (:mod:`clipfast.kernels.dispatch`). Each operation is documented in
its own folder. Sums are carried in float32 for low-precision inputs, in float64 for float64; so are ``alpha``, ``z``
and maps.
"""

from clipfast.kernels.attention import attention
from clipfast.kernels.fp8 import quantize_rows, scaled_linear
from clipfast.kernels.layer_norm import add_layer_norm, layer_statistics
from clipfast.kernels.linear import add_linear, linear, linear_activation, linear_unrounded
from clipfast.kernels.moments import moments
from clipfast.kernels.query_row import query_row, query_row_from_tokens
from clipfast.kernels.rotate import rotate
from clipfast.kernels.span import span
from clipfast.kernels.text_maps import layered_text_maps, text_maps, text_maps_from_tokens
from clipfast.kernels.token_contributions import head_maps, token_contributions
from clipfast.kernels.weighted_rows import weighted_rows

__all__ = [
    "add_layer_norm",
    "add_linear",
    "attention",
    "head_maps",
    "layer_statistics",
    "layered_text_maps",
    "linear",
    "linear_activation",
    "linear_unrounded",
    "moments",
    "quantize_rows",
    "query_row",
    "query_row_from_tokens",
    "rotate",
    "scaled_linear",
    "span",
    "text_maps",
    "text_maps_from_tokens",
    "token_contributions",
    "weighted_rows",
]
