"""Attention in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {"attention": native_ops.IMPLEMENTATIONS["attention"]}
