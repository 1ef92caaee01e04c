"""Small example arguments of every operation, for tests and for ``clipfast doctor``."""

from typing import Any

import torch
from torch import Tensor

IMAGES, TOKENS, HEADS, HEAD_DIM, WIDTH, TEXTS, LAYERS = 2, 17, 2, 64, 128, 5, 3


class Examples:
    """Random tensors that operations take their example arguments from.

    Attributes:
        device: where all tensors are.
        dtype: of what a model computes with; attention weights, bases and sums are float32.
        alpha: ``[B, H, N]``, every row sums to 1.
        value: ``[B, N, H, E]``, a view of packed queries, keys and values.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``.
        tokens: ``[B, N, W]``.
        query: ``[B, H, E]``.
        head_weight: ``[H, E, W]``.
        head_bias: ``[H, E]``.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)
        self.alpha = self.draw_float32(IMAGES, HEADS, TOKENS).softmax(-1)
        self.value = self.draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM)[:, :, 2]
        self.text_basis = self.draw_float32(HEADS, HEAD_DIM, TEXTS)
        self.out = self.draw_float32(IMAGES, TOKENS, TEXTS)
        self.tokens = self.draw(IMAGES, TOKENS, WIDTH)
        self.query = self.draw(IMAGES, HEADS, HEAD_DIM)
        self.head_weight = self.draw(HEADS, HEAD_DIM, WIDTH)
        self.head_bias = self.draw(HEADS, HEAD_DIM)

    def draw(self, *shape: int) -> Tensor:
        """Normally distributed numbers in the model's dtype."""
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)

    def draw_float32(self, *shape: int) -> Tensor:
        """Normally distributed numbers in float32."""
        return torch.randn(*shape, generator=self._generator).to(self.device)


def arguments(operation: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of an operation in their order, without the backend.

    Args:
        operation: its name.
        device: where.
        dtype: of what a model computes with; attention weights, bases and sums are float32.
    """
    from clipfast.kernels.registration import operations

    return operations()[operation].example_arguments(Examples(device, dtype))
