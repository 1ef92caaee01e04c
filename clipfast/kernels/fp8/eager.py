"""Rows in float8 and their products in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import LARGEST_FLOAT8, Activation, activated

FLOAT8 = torch.float8_e4m3fn
CAPABILITY = (9, 0)
"""The compute capability from which torch multiplies rows of float8 with a scale each."""
MULTIPLE = 16
"""What sizes of such a product must be multiples of: rows start at 16 bytes."""


def quantize_rows(x: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.quantize_rows`, in float32."""
    wide = x.float()
    if activation is not None:
        wide = activated(wide, activation)
    scale = wide.abs().amax(-1) / LARGEST_FLOAT8
    scale = torch.where(scale == 0, 1, scale)
    return (wide / scale[..., None]).to(FLOAT8).view(torch.uint8).contiguous(), scale


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """:func:`clipfast.kernels.reference.scaled_linear` by torch's product, emulated on the CPU."""
    columns, depth = weight.shape
    rows = values.reshape(-1, depth) if depth else values.new_empty(scale.numel(), 0)
    shape = (*values.shape[:-1], columns)
    if values.is_cuda and rows.numel() and columns:
        product = torch._scaled_mm(
            rows.contiguous().view(FLOAT8),
            weight.contiguous().view(FLOAT8).T,
            scale_a=scale.reshape(-1, 1).contiguous(),
            scale_b=weight_scale.reshape(1, -1).contiguous(),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # sums have 14 bits, of factors that have 4
        )
        return product.view(shape)
    wide = F.linear(*(each.contiguous().view(FLOAT8).float() for each in (rows, weight)))
    wide = wide * scale.reshape(-1, 1) * weight_scale
    return (wide if bias is None else wide + bias).to(torch.bfloat16).view(shape)


def gpu_reasons(device: torch.device) -> list[str]:
    """The reasons why a GPU cannot multiply rows of float8."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return []
    return [f"the GPU's compute capability is {capability[0]}.{capability[1]}, products in float8 need 9.0 (Hopper)"]


def _scaled_linear_unsupported_reasons(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> list[str]:
    if not values.is_cuda:
        return []
    reasons = gpu_reasons(values.device)
    if any(size % MULTIPLE for size in weight.shape):
        reasons.append(f"the weight is {list(weight.shape)}: sizes must be multiples of {MULTIPLE}")
    return reasons


IMPLEMENTATIONS = {
    "quantize_rows": Implementation(quantize_rows),
    "scaled_linear": Implementation(scaled_linear, _scaled_linear_unsupported_reasons),
}
