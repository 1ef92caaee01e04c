"""Products of oneDNN, which torch's builds for x86 contain.

Torch gives its float32 products to MKL, which runs its AVX2 kernels on AMD's CPUs, those with AVX-512 too. oneDNN runs
the best kernels for the CPU's instructions, reads the weight where it is and keeps no copy. Torch has no public
function for such a product in float32; ``torch.compile`` calls the one that is called here.
"""

from functools import cache

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.reference import Activation


@cache
def unsupported_reasons() -> list[str]:
    """Why oneDNN's products cannot be used here, empty when they can."""
    if not torch.backends.mkldnn.is_available():
        return ["torch was built without oneDNN"]
    if not torch.backends.mkldnn.enabled:
        return ["torch.backends.mkldnn.enabled is false"]
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return [f"torch {torch.__version__} has no mkldnn::_linear_pointwise"]
    return native.unsupported_reasons()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """``f(x Wᵀ + b)`` in float32.

    Args:
        x: ``[..., K]``, ``K`` at least 1.
        weight: ``[M, K]``, contiguous.
        bias: ``[M]``, or None.
        activation: its name, None for none.

    Returns:
        ``[..., M]``.
    """
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    added = bias if activation is None else None
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, added, "none", [], "")
    if activation is not None:
        native.library().activation(out, None if bias is None else bias.contiguous(), activation, out)
    return out.view(*x.shape[:-1], weight.shape[0])
