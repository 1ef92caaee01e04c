"""The implementations of torch's own attention on a GPU, each a way of its own to compute the operation.

Left to itself torch takes the first that it can use, by an order that does not depend on the shapes. They are called by
name, without ``torch.nn.attention.sdpa_kernel``: its switches belong to the whole process, and another thread may be
about to use the implementation that this one has just switched off.

The row of the pooled token comes from a kernel of its own: that of one query, or the mean row from torch's logarithms.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend

from clipfast.kernels.attention import mean_row
from clipfast.kernels.attention.tiles import constants_of, readable, sizes_of
from clipfast.kernels.launch import Launch, capability
from clipfast.kernels.query_row.triton import alpha_alone
from clipfast.kernels.reference import Row

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, H, N, E]`` three times → ``[B, H, N, E]``."""


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention, as torch has it; 16-bit formats, head_dim a multiple of 8."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of cuDNN; 16-bit formats."""
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
    return out


def efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The memory-efficient attention of xFormers, as torch has it."""
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0]
    return out


_LOW = (torch.float16, torch.bfloat16)
_WAYS: tuple[tuple[str, Attend, Callable[[SDPAParams], bool], Sequence[torch.dtype]], ...] = (
    ("sdpa-flash", flash, can_use_flash_attention, _LOW),
    ("sdpa-cudnn", cudnn, can_use_cudnn_attention, _LOW),
    ("sdpa-efficient", efficient, can_use_efficient_attention, (*_LOW, torch.float32)),
)


def ways(qkv: Tensor) -> list[tuple[str, Attend]]:
    """Labels and implementations that torch has on a GPU for ``qkv [B, N, 3, H, E]``.

    On a GPU torch is asked. Elsewhere, where the question is what a GPU would have, the dtype decides.
    """
    usable = [each for each in _WAYS if qkv.dtype in each[3]]
    if qkv.is_cuda:
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        params = SDPAParams(query, key, value, None, 0.0, False, False)
        usable = [each for each in usable if each[2](params)]
    return [(label, attend) for label, attend, _, _ in usable]


def through_torch(
    qkv: Tensor, row: Row | None, attend: Attend = F.scaled_dot_product_attention
) -> tuple[Tensor, Tensor]:
    """Attention by torch for ``row`` ``"cls"`` or None, and the row from a kernel of its own."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    out = attend(query, key, value).transpose(1, 2).contiguous()
    if row is None:
        return out, qkv.new_empty((qkv.shape[0], qkv.shape[3], 0), dtype=torch.float32)
    return out, alpha_alone(qkv[:, 0, 0], qkv[:, :, 1])


def with_logsumexp(qkv: Tensor, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """Torch's attention ``out [B, N, H, E]``, and ``ln Σ_m exp(q·k_m/√E)`` of every query, ``[B, H, N]`` in float32.

    ``backend`` is flash or cuDNN; on the CPU there is one of its own.
    """
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    if qkv.is_cpu:
        out, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, logarithm, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        out, logarithm, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out.transpose(1, 2).contiguous(), logarithm.reshape(query.shape[:3]).contiguous()


def plan_mean(qkv: Tensor, logarithm: Tensor) -> tuple[Launch, Tensor]:
    """The launch that computes the mean row ``alpha [B, H, N]`` from :func:`with_logsumexp`, and its result."""
    qkv = readable(qkv)
    alpha = torch.empty_like(logarithm)
    kept = {"p_max": logarithm, "p_inverse": None}
    return mean_row.plan(qkv, kept, alpha, sizes_of(qkv), constants_of(qkv)), alpha


def mean_through_torch(qkv: Tensor, row: Row | None, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """Attention by torch for ``row="mean"`` in 16-bit formats, and the row from its logarithms."""
    out, logarithm = with_logsumexp(qkv, backend)
    launch, alpha = plan_mean(qkv, logarithm)
    launch.run()
    return out, alpha


def fused(qkv: Tensor) -> Iterator[tuple[str, SDPBackend]]:
    """Torch's fused kernels that can attend within ``qkv`` in its 16-bit format."""
    if qkv.dtype == torch.float32 or qkv.shape[4] % 8 or capability(qkv) < 80:
        return
    ways = {
        "sdpa-flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
        "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    }
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    arguments = SDPAParams(query, key, value, None, 0.0, False, False)
    for label, (backend, usable) in ways.items():
        if not qkv.is_cuda or usable(arguments):  # without a GPU, what one may have
            yield label, backend
