"""The residual stream's LayerNorm in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import accumulation_dtype


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> Tensor:
    """Adds ``delta`` to ``x`` and returns the LayerNorm, :func:`clipfast.kernels.reference.add_layer_norm`.

    The norm runs in the dtype of its own weights: mixed-precision models keep those in float32. With carried biases it
    runs in at least float32, because their sum with the stream is not to be rounded.
    """
    if delta is not None:
        x += delta
    if carried is not None:
        dtype = accumulation_dtype(x.dtype)
        whole = x.to(dtype) + carried.to(dtype)
        return F.layer_norm(whole, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype).contiguous()
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype).contiguous()


def layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.layer_statistics`, two passes in the accumulation dtype."""
    residual = residual.to(accumulation_dtype(residual.dtype))
    mean = residual.mean(-1)
    variance = (residual - mean[..., None]).square().mean(-1)
    return mean, (variance + eps).sqrt()


IMPLEMENTATIONS = {
    "add_layer_norm": Implementation(add_layer_norm),
    "layer_statistics": Implementation(layer_statistics),
}
