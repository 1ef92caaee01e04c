"""The implementations of torch's own attention on a GPU, each a way of its own to compute the operation.

Left to itself torch takes the first that it can use, by an order that does not depend on the shapes. They are called by
name, without ``torch.nn.attention.sdpa_kernel``: its switches belong to the whole process, and another thread may be
about to use the implementation that this one has just switched off.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

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
