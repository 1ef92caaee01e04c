"""The residual stream's LayerNorm in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {"add_layer_norm": native_ops.IMPLEMENTATIONS["add_layer_norm"]}
