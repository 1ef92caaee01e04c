"""The optimiser: orthogonalised momentum for hidden weight matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

_QUINTIC: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of an odd polynomial that moves singular values into about [0.7, 1.2] in five iterations."""


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Set all singular values of a matrix (last two axes) to about one; the dtype is kept."""
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class HybridOptimiser(torch.optim.Optimizer):
    """Two update rules in one optimiser, with one state to save and one learning rate to set.

    Groups with `orthogonal=True` have 2-D weights; attention's stacked q, k, v weights count as three
    matrices. Their update is the orthogonalised momentum, scaled to the RMS of a typical AdamW update.
    Other groups use AdamW. Everything is computed in float32, which is several times as fast as
    casting on CPUs without fast bfloat16.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(list(groups), {**defaults, "orthogonal": False, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters in place; those without a gradient do not change."""
        for group in self.param_groups:
            rule = self._orthogonal_step if group["orthogonal"] else self._adamw_step
            for weight in group["params"]:
                if weight.grad is not None:
                    rule(weight, weight.grad, group)

    def _orthogonal_step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum, rate = group["momentum"], group["lr"] * group["scale"]
        state["momentum"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(state["momentum"], momentum)
        rows, columns = update.shape
        if rows == 3 * columns:
            update = orthogonalise(update.view(3, columns, columns)).reshape(rows, columns)
            size = columns
        else:
            update = orthogonalise(update)
            size = max(rows, columns)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(update, alpha=-0.2 * math.sqrt(size) * rate)

    def _adamw_step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(weight)
            state["square"] = torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        rate = group["lr"] * group["scale"]
        state["step"] += 1
        step = int(state["step"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (state["square"] / (1 - beta2**step)).sqrt_().add_(1e-8)
        if weight.ndim >= 2:
            weight.mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(state["mean"], spread, value=-rate / (1 - beta1**step))


def make_optimiser(modules: Iterable[nn.Module], lr: float, orthogonal: bool = True) -> HybridOptimiser:
    """An optimiser of the modules' parameters; weight matrices of blocks get orthogonal updates."""
    hidden: list[Tensor] = []
    other: list[Tensor] = []
    for module in modules:
        for name, weight in module.named_parameters():
            in_block = "resblocks" in name and weight.ndim == 2
            (hidden if in_block and orthogonal else other).append(weight)
    groups: list[dict[str, Any]] = [{"params": other, "scale": 0.5 if hidden else 1.0}]
    if hidden:
        groups.append({"params": hidden, "orthogonal": True})
    return HybridOptimiser(groups, lr)
