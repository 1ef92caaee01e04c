"""Rotary positions of queries and keys, in place.

Axes: ``B`` images, ``N`` tokens, ``S`` parts (queries, keys), ``H`` heads, ``E`` head_dim.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import NONEMPTY, check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, TOKENS, Examples
from clipfast.kernels.registration import register

__all__ = ["rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, *, backend: str = AUTO) -> None:
    """Turns queries and keys by their positions (:func:`clipfast.kernels.reference.rotate`), rounded once.

    Args:
        x: ``[B, N, S, H, E]``, a view of packed queries, keys and values, say; its last axis is contiguous and of even
            length. Changed in place.
        cos: ``[H, N, E]``, or ``[1, N, E]`` for all heads, of any floating-point precision.
        sin: as ``cos``.
        halves: whether the two entries that are turned together are half a head apart; else they are neighbours.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Raises:
        ValueError: wrong shape or device.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    choice = _ROTATE.known((x, cos, sin, halves), backend)
    if choice is not None:
        choice.run(x, cos, sin, halves)
        return
    check_shape("x", x, (None, None, None, None, NONEMPTY))
    _, tokens, _, heads, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"x has a head_dim of {head_dim}: pairs of entries are turned, so expected an even number")
    check_shape("cos", cos, (1 if cos.ndim and cos.shape[0] == 1 else heads, tokens, head_dim))
    check_shape("sin", sin, tuple(cos.shape))
    check_same_device(x=x, cos=cos, sin=sin)
    _ROTATE(x, cos, sin, halves, backend)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, backend: str) -> None:
    pass


def _example_arguments(examples: Examples) -> list[Any]:
    qkv = examples.draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM)
    angles = examples.draw_float32(1, TOKENS, HEAD_DIM)
    return [qkv[:, :, :2], angles.cos(), angles.sin(), True]


_ROTATE = register("rotate", _fake, _example_arguments, mutates_args=("x",))
