"""Text maps with captum's conventions: what every pixel adds to the cosine of an image with a text, exactly.

>>> maps = TextMaps(model, ["a red star", "a forest"])
>>> maps.attribute(images, target=0)  # [B, 3, height, width]; sums to the cosine with the first text
>>> maps.attribute(images, target=[0, 1], shape="patches")  # [B, 1, rows, columns], a text for each image

Completeness: the attributions of an image add up to the cosine of its embedding with the text, up to rounding. A patch
has what all heads read of it (:attr:`.Contributions.maps`). What no patch has is the start of the residual stream, the
MLPs, and what heads read of the class token and registers: it is spread evenly over all patches. ``remainder="leave"``
leaves it out, and then the attributions lack it: ``return_convergence_delta=True`` says how much.

``B`` images, ``T`` texts, ``D`` embed_dim.
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.basis import autocast_disabled
from clipfast.compat.relevance import as_model, check_batch, features_of, patch_size
from clipfast.errors import InputError
from clipfast.model import Model

Target: TypeAlias = int | Sequence[int] | Tensor
Shape: TypeAlias = Literal["input", "patches"]
SHAPES: Final = ("input", "patches")
REMAINDERS: Final = ("spread", "leave")


class TextMaps:
    """Attributions of cosines with texts, called as captum's classes are.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
        texts: strings, or features ``[T, D]``, which are used as long as they are; None where targets are features.
    """

    def __init__(self, model: Model | nn.Module, texts: str | Sequence[str] | Tensor | None = None) -> None:
        self.model = as_model(model)
        self.texts = None if texts is None else features_of(self.model, texts)

    @overload
    def attribute(
        self,
        inputs: Tensor,
        target: Target | None = None,
        *,
        shape: Shape = "input",
        remainder: Literal["spread", "leave"] = "spread",
        return_convergence_delta: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def attribute(
        self,
        inputs: Tensor,
        target: Target | None = None,
        *,
        shape: Shape = "input",
        remainder: Literal["spread", "leave"] = "spread",
        return_convergence_delta: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def attribute(
        self,
        inputs: Tensor,
        target: Target | None = None,
        *,
        shape: Shape = "input",
        remainder: Literal["spread", "leave"] = "spread",
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What every pixel or patch adds to the cosine with a text.

        Args:
            inputs: ``[B, 3, height, width]``, preprocessed.
            target: the index of a text, for all images or one for each; or a feature ``[D]`` or ``[B, D]``, which is
                used as long as it is. None where there is one text.
            shape: ``"input"``: a patch's attribution in equal parts for its pixels and channels, ``[B, 3, height,
                width]``. ``"patches"``: ``[B, 1, rows, columns]``, for :meth:`interpolate`.
            remainder: what no patch has is ``"spread"`` evenly, or ``"leave"`` for left out.
            return_convergence_delta: give, too, the sum of each image's attributions less the cosine, ``[B]``.

        Raises:
            InputError: images or a target that do not fit.
        """
        for name, value, choices in (("shape", shape, SHAPES), ("remainder", remainder, REMAINDERS)):
            if value not in choices:
                raise InputError(f"{name} is {value!r}: choose {' or '.join(map(repr, choices))}")
        images = check_batch(self.model, inputs)
        texts, index = self._targets(target, len(images))
        contributions = self.model.decompose(images, texts=texts)
        with torch.no_grad(), autocast_disabled(images):
            grids = contributions.patch_maps()  # [B, rows, columns, T]
            embedding = contributions.embedding.to(grids.dtype)
            cosines = embedding @ texts.to(grids).T / contributions.norm[:, None].to(grids.dtype)
            each = torch.arange(len(images), device=images.device)
            grid, cosine = grids[each, :, :, index], cosines[each, index]
            if remainder == "spread":
                grid = grid + ((cosine - grid.sum((1, 2))) / grid[0].numel() if len(grid) else cosine)[:, None, None]
            result = grid[:, None] if shape == "patches" else self._over_pixels(grid, images)
            delta = grid.sum((1, 2)) - cosine
        return (result, delta) if return_convergence_delta else result

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, int], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Attributions of patches ``[B, 1, rows, columns]`` at another size, as captum's ``LayerAttribution`` does it.

        Values are interpolated, not divided: they no longer add up to the cosine.
        """
        size = (interpolate_dims, interpolate_dims) if isinstance(interpolate_dims, int) else interpolate_dims
        return F.interpolate(layer_attribution, size, mode=interpolate_mode)

    def _over_pixels(self, grid: Tensor, images: Tensor) -> Tensor:
        """A patch's attribution in equal parts for its pixels and channels; 0 for pixels that no patch has."""
        high, wide = patch_size(self.model.tower)
        pixels = grid.repeat_interleave(high, 1).repeat_interleave(wide, 2) / (images.shape[1] * high * wide)
        result = pixels.new_zeros(images.shape)
        result[:, :, : pixels.shape[1], : pixels.shape[2]] = pixels[:, None]
        return result

    def _targets(self, target: Target | None, images: int) -> tuple[Tensor, Tensor]:
        """Texts ``[T, D]``, and which is each image's, ``[B]``."""
        device, width = self.model.device, self.model.tower.embed_dim
        if isinstance(target, Tensor) and target.is_floating_point():
            if target.shape == (width,):
                return target.detach()[None].to(device), torch.zeros(images, dtype=torch.long, device=device)
            if target.shape == (images, width):
                return target.detach().to(device), torch.arange(images, device=device)
            shape = list(target.shape)
            raise InputError(f"target has shape {shape}, expected a feature [{width}] or [{images}, {width}]")
        if self.texts is None:
            raise InputError("there are no texts: give them to TextMaps, or target as features")
        if target is None:
            if len(self.texts) != 1:
                raise InputError(f"target is None, and there are {len(self.texts)} texts: say which")
            target = 0
        index = torch.as_tensor(target, device=device)
        if index.is_floating_point() or index.dtype == torch.bool or index.shape not in ((), (1,), (images,)):
            raise InputError(
                f"target is {index.dtype} {list(index.shape)}, expected a text's index or {images} of them"
            )
        wrong = index[(index < 0) | (index >= len(self.texts))].view(-1)
        if len(wrong):
            raise InputError(f"target {int(wrong[0])} does not exist: texts are 0 to {len(self.texts) - 1}")
        return self.texts, index.long().expand(images)
