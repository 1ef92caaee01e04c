"""Small arguments for every operation: what ``clipfast doctor`` asks the backends about, and what tests call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMAGES, TOKENS, HEADS, HEAD_DIM, WIDTH, TEXTS, LAYERS = 2, 17, 2, 64, 128, 5, 3


def arguments(operation: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of an operation in their order, without the backend.

    Args:
        operation: its name in :mod:`clipfast.kernels.ops`.
        device: where.
        dtype: of what a model computes in; sums and bases are float32.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, kept: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kept)

    def exact(*shape: int) -> Tensor:
        return draw(*shape, kept=torch.float32)

    alpha = exact(IMAGES, HEADS, TOKENS).softmax(-1)
    value = draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM)[:, :, 2]
    text_basis = exact(HEADS, HEAD_DIM, TEXTS)
    out = exact(IMAGES, TOKENS, TEXTS)
    tokens, query = draw(IMAGES, TOKENS, WIDTH), draw(IMAGES, HEADS, HEAD_DIM)
    weight, bias = draw(HEADS, HEAD_DIM, WIDTH), draw(HEADS, HEAD_DIM)
    sums = (torch.zeros(HEADS, HEAD_DIM + 3), torch.zeros(HEADS, HEAD_DIM + 3, HEAD_DIM + 3))
    made: dict[str, Callable[[], list[Any]]] = {
        "attention": lambda: [draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM), "cls"],
        "query_row": lambda: [query, draw(IMAGES, TOKENS, HEADS, HEAD_DIM), value],
        "query_row_from_tokens": lambda: [query, tokens, weight, weight, bias],
        "text_maps": lambda: [alpha, value, text_basis, out, None],
        "text_maps_from_tokens": lambda: [alpha, tokens, weight, bias, text_basis, out],
        "layered_text_maps": lambda: [
            exact(IMAGES, LAYERS, HEADS, TOKENS).softmax(-1),
            list(draw(LAYERS, IMAGES, TOKENS, HEADS, HEAD_DIM)),
            exact(LAYERS, HEADS, HEAD_DIM, TEXTS),
            None,
        ],
        "head_maps": lambda: [alpha, value, text_basis],
        "token_contributions": lambda: [
            alpha,
            value,
            exact(HEADS, HEAD_DIM, WIDTH),
            exact(IMAGES, WIDTH),
            exact(IMAGES),
        ],
        "layer_statistics": lambda: [exact(IMAGES, WIDTH), 1e-5],
        "moments": lambda: [
            exact(IMAGES, HEADS, HEAD_DIM),
            exact(IMAGES, 3),
            exact(HEADS, HEAD_DIM + 3),
            *(each.to(device, torch.float64) for each in sums),
        ],
        "span": lambda: [exact(HEADS, 20, HEAD_DIM), exact(HEADS, HEAD_DIM, HEAD_DIM), 4, 1e-10],
        "linear": lambda: [tokens, draw(WIDTH, WIDTH), draw(WIDTH)],
        "linear_activation": lambda: [tokens, draw(WIDTH, WIDTH), draw(WIDTH), "quick_gelu"],
        "add_layer_norm": lambda: [tokens, draw(IMAGES, TOKENS, WIDTH), draw(WIDTH), draw(WIDTH), 1e-5],
    }
    return made[operation]()
