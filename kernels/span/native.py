"""TEXTSPAN in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {"span": native_ops.IMPLEMENTATIONS["span"]}
