"""What a module's own forward passes from layer to layer, recorded by hooks that are removed again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def record(
    parts: Sequence[nn.Module], forward: Callable[[], Any], device: torch.device, *, tokens_first: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """Runs a forward without autocast and keeps the output of some of its parts.

    Args:
        parts: of the module: what gives the start of the residual stream, then every block.
        forward: runs it.
        device: of its images.
        tokens_first: blocks have the axes ``[N, B, W]``.

    Returns:
        What the forward gives, the first of several, and the output of each part ``[B, N, W]``; None for a part that
        did not run.
    """
    stream: list[Tensor | None] = [None] * len(parts)

    def hook(index: int) -> Callable[[nn.Module, object, Any], None]:
        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
            tokens: Tensor = output[0] if isinstance(output, tuple) else output
            stream[index] = (tokens.transpose(0, 1) if tokens_first and index else tokens).clone()

        return keep

    handles = [part.register_forward_hook(hook(index)) for index, part in enumerate(parts)]
    try:
        with torch.autocast(device.type, enabled=False):
            out = forward()
    finally:
        for handle in handles:
            handle.remove()
    return out[0] if isinstance(out, tuple) else out, stream
