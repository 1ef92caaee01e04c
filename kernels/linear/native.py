"""Linear layers on the CPU: torch's products, and what follows them in C++."""

import torch
from torch import Tensor

from clipfast.kernels import native_linear, native_ops
from clipfast.kernels.dispatch import Implementation


def _auto_skip_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Where torch's own product is as fast, or where autograd and a compiler shall see through it."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return []
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return ["gradients are enabled, and only torch's own product has them"]
    if native_linear.divides_weight(x, weight):
        return []
    return ["torch's own product is as fast for these shapes"]


_LINEAR = native_ops.IMPLEMENTATIONS["linear"]
IMPLEMENTATIONS = {
    "linear": Implementation(_LINEAR.run, _LINEAR.unsupported_reasons, auto_skip_reasons=_auto_skip_reasons),
    "linear_activation": native_ops.IMPLEMENTATIONS["linear_activation"],
}
