"""The residual stream's LayerNorm in C++ for the CPU (``csrc/layer_norm.cpp``)."""

from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.dispatch import Implementation


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> Tensor:
    """Adds ``delta`` to ``x`` and returns the LayerNorm, :func:`clipfast.kernels.reference.add_layer_norm`."""
    out = buffers.empty(x, *x.shape)
    delta = None if delta is None else delta.contiguous()
    native.library().add_layer_norm(x, delta, native.float32(weight), native.float32(bias), eps, out)
    return out


def _unsupported_reasons(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> list[str]:
    reasons = native.library().add_layer_norm_unsupported_reasons(x, delta, weight, bias)
    # On a CPU products are formed with their biases, which costs nothing there.
    return reasons if carried is None else [*reasons, "biases are carried"]


IMPLEMENTATIONS = {"add_layer_norm": Implementation(add_layer_norm, _unsupported_reasons)}
