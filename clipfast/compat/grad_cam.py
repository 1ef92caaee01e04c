"""Grad-CAM (arXiv 1610.02391) on a vision transformer's tokens, called as pytorch-grad-cam is.

>>> cam = GradCAM(model, texts=["a dog", "a cat"])
>>> cam(input_tensor=images, targets=[ClassifierOutputTarget(0)] * len(images))  # numpy [B, height, width], 0 … 1

The activations are what a block's attention reads, after its first norm: the package's own choice for vision
transformers, since in the last block no gradient reaches the patches behind it. A channel's weight is its gradient's
mean over patches; the weighted sum of channels, without negative values, is spread from 0 to 1, enlarged bilinearly,
averaged over the target layers and spread again. The outputs that targets see are cosines with the texts.

:func:`reshape_transform` is for the package itself, used on the module.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.analyses import gradients
from clipfast.basis import autocast_disabled
from clipfast.compat.relevance import as_model, check_batch, enlarged, features_of
from clipfast.errors import InputError
from clipfast.indices import resolve_layer
from clipfast.model import Model
from clipfast.towers.tower import Tower

Target = Callable[[Tensor], Tensor]


class ClassifierOutputTarget:
    """One output of a row of outputs, as the package's target of that name.

    Args:
        category: index of a text.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """``[T]`` to one number, or ``[B, T] → [B]``."""
        return model_output[..., self.category]


def reshape_transform(model: Model | nn.Module) -> Callable[[Tensor], Tensor]:
    """What turns a model's tokens ``[B, N, W]`` into feature maps ``[B, W, rows, columns]``, for pytorch-grad-cam.

    The class token and registers are left out.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
    """
    tower = as_model(model).tower
    prefix, grid = tower.prefix_tokens, tower.grid

    def reshape(tensor: Tensor) -> Tensor:
        if tensor.ndim != 3 or tensor.shape[1] != prefix + grid[0] * grid[1]:
            expected = f"[images, {prefix + grid[0] * grid[1]}, width]"
            raise InputError(f"tokens have shape {list(tensor.shape)}, expected {expected}")
        return tensor[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)

    return reshape


own_transform: Final = reshape_transform  # an argument has that name, too


class GradCAM:
    """Grad-CAM of cosines with texts.

    Attributes:
        model: the model.
        layers: the blocks whose activations count, ascending.
        outputs: of the last call, ``[B, T]``; None before.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
        target_layers: blocks by number, negative from the end, or the modules of their first norms, such as
            ``visual.transformer.resblocks[-1].ln_1``; None for the last block.
        texts: strings, or features ``[T, D]``, which are used as long as they are: times the logit scale, outputs are
            CLIP's logits.
        reshape_transform: tokens ``[B, N, W]`` → ``[B, W, rows, columns]``; None for the model's own.

    Raises:
        InputError: a layer or module that is none, or texts that do not fit.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        target_layers: Sequence[int | nn.Module] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        texts: str | Sequence[str] | Tensor,
    ) -> None:
        self.model = as_model(model)
        tower = self.model.tower
        chosen = [-1] if target_layers is None else list(target_layers)
        if not chosen:
            raise InputError("target_layers is empty: give a block, or leave it out for the last")
        self.layers = tuple(sorted({_layer(tower, each) for each in chosen}))
        self.outputs: Tensor | None = None
        self._texts = features_of(self.model, texts)
        self._reshape = own_transform(self.model) if reshape_transform is None else reshape_transform

    def __enter__(self) -> "GradCAM":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held: the package removes its hooks here."""

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target | int] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Heat of every image for its target.

        Args:
            input_tensor: ``[B, 3, height, width]``, preprocessed.
            targets: one for each image: a function of the image's outputs ``[T]``, or a text's index. None for the
                text of the largest output.
            aug_smooth: not supported.
            eigen_smooth: not supported.

        Returns:
            ``[B, height, width]`` from 0 to 1.

        Raises:
            InputError: images or targets that do not fit, or smoothing.
        """
        if aug_smooth or eigen_smooth:
            raise InputError("smoothing is not supported: leave aug_smooth and eigen_smooth out")
        tower = self.model.tower
        images = gradients.check_images(tower, check_batch(self.model, input_tensor))
        if targets is not None and len(targets) != len(images):
            raise InputError(f"{len(targets)} targets for {len(images)} images: give one for each")
        if not len(images):
            self.outputs = images.new_zeros(0, len(self._texts))
            return np.zeros((0, *tower.image_size), dtype=np.float32)
        with torch.inference_mode(False), torch.enable_grad(), autocast_disabled(images):
            activations, outputs = self._forward(tower, images)
            if targets is None:
                score = outputs.max(1).values.sum()
            else:
                pairs = zip(targets, outputs, strict=True)
                score = sum((_read(target, row).sum() for target, row in pairs), outputs.new_zeros(()))
            if not score.requires_grad:
                raise InputError("targets do not depend on the outputs: there is no gradient")
            slopes = torch.autograd.grad(score, activations)
        self.outputs = outputs.detach()
        cams = []
        for activation, slope in zip(activations, slopes, strict=True):
            maps, weights = self._reshape(activation.detach()), self._reshape(slope).mean((2, 3), keepdim=True)
            cam = (weights * maps).sum(1).relu().float()
            cams.append(enlarged(_spread(cam), tower.image_size))
        result: np.ndarray[Any, np.dtype[np.float32]] = _spread(torch.stack(cams).mean(0)).cpu().numpy()
        return result

    def _forward(self, tower: Tower, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the target layers' attention reads, ``[B, N, W]`` each, and the outputs ``[B, T]``, in one graph."""
        first, weights = self.layers[0], gradients.frozen(tower)
        x = gradients.embed(weights, images)
        activations = []
        for layer in range(tower.layers):
            normed = None
            if layer in self.layers:
                normed = gradients.block_norm(weights, layer, x)
                normed = normed.requires_grad_() if layer == first else normed
                activations.append(normed)
            x, _ = gradients.run_block(weights, layer, x, normed)
        embedding = gradients.readout(weights, gradients.pool(weights, x))
        acc_dtype = torch.promote_types(embedding.dtype, torch.float32)
        texts = self._texts.clone().to(embedding.device, acc_dtype)  # a graph may not hold one of inference mode
        return activations, F.normalize(embedding.to(acc_dtype), dim=1) @ texts.T


def _layer(tower: Tower, layer: int | nn.Module) -> int:
    """The number of a block, or of the block whose first norm a module is."""
    if not isinstance(layer, nn.Module):
        return resolve_layer(layer, tower.layers)
    weight = getattr(layer, "weight", None)
    for number, block in enumerate(tower.blocks):
        if block.ln_1 is not None and isinstance(weight, Tensor) and block.ln_1.weight.data_ptr() == weight.data_ptr():
            return number
    kind = type(layer).__name__
    raise InputError(f"target layer {kind} is not the first norm of a block: give that, or the block's number")


def _read(target: Target | int, row: Tensor) -> Tensor:
    if callable(target):
        return target(row)
    if not 0 <= target < len(row):
        raise InputError(f"target {target} does not exist: texts are 0 to {len(row) - 1}")
    return row[target]


def _spread(cam: Tensor) -> Tensor:
    """Each map from 0 to 1, with the package's 1e-7 in the denominator."""
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / (1e-7 + cam.amax((1, 2), keepdim=True))
