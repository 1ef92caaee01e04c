"""Attention of one query in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {"query_row": native_ops.IMPLEMENTATIONS["query_row"]}
