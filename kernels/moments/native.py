"""Moments in C++ for the CPU."""

from clipfast.kernels import native_ops

IMPLEMENTATIONS = {"moments": native_ops.IMPLEMENTATIONS["moments"]}
