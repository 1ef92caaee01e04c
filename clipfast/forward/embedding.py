"""Pixels to the start of the residual stream."""

from torch import Tensor

from clipfast.forward.blocks import normalise
from clipfast.kernels import ops
from clipfast.towers.tower import Tower


def embed(tower: Tower, images: Tensor, backend: str) -> Tensor:
    """Pixels to the start of the residual stream, ``[B, 3, height, width] → [B, N, W]``."""
    if tower.embedder is not None:
        x = tower.embedder.run(images).contiguous()
        return x if tower.ln_pre is None else normalise(x, None, tower.ln_pre, backend)
    assert tower.patch_weight is not None
    # A convolution whose stride is its kernel is one matrix product; this way its result has the tokens' layout.
    (rows, columns), (high, wide) = tower.grid, tower.patch_size
    patches = images[:, :, : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, 3 * high * wide)
    embedded = ops.linear(patches, tower.patch_weight.flatten(1), tower.patch_bias, backend=backend)  # [B, patches, W]
    prefix = tower.prefix_tokens
    x = images.new_empty(len(images), tower.tokens, tower.width)
    if tower.class_embedding is not None:
        x[:, 0] = tower.class_embedding
    if tower.registers is not None:
        x[:, prefix - len(tower.registers) : prefix] = tower.registers
    if tower.positional_embedding is not None:
        position = tower.positional_embedding.to(images.dtype)
        before = len(position) - rows * columns  # of class token and registers
        x[:, :before] += position[:before]
        embedded.add_(position[before:])
    x[:, prefix:] = embedded
    return x if tower.ln_pre is None else normalise(x, None, tower.ln_pre, backend)
