"""Relevance of patches and of words by Chefer et al. (arXiv 2103.15679), called as in their CLIP notebook.

>>> R_text, R_image = interpret(image=image, texts=tokens, model=model, device="cpu")
>>> R_image[0].reshape(7, 7)  # of the first text

What is explained is the logit of the image with each text: the cosine times the logit scale. The image's relevance is
:func:`clipfast.analyses.relevance.chefer`; its forward is shared by all texts, where the notebook repeats the image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipfast.analyses.relevance import chefer
from clipfast.basis import autocast_disabled
from clipfast.compat.relevance import as_model, check_batch
from clipfast.errors import InputError
from clipfast.indices import resolve_layer
from clipfast.model import Model
from clipfast.towers.packages import package_of


def interpret(
    image: Tensor,
    texts: Tensor | Sequence[str],
    model: Model | nn.Module,
    device: str | torch.device | None = None,
    start_layer: int = -1,
    start_layer_text: int = -1,
) -> tuple[Tensor, Tensor]:
    """Relevance of every text's tokens and of the image's patches for the logit of the two.

    Args:
        image: ``[1, 3, height, width]``, preprocessed.
        texts: tokens ``[T, context]``, or strings.
        model: a model, or a module that :func:`clipfast.wrap` takes, with its text encoder.
        device: where the results are put; None for the model's.
        start_layer: the image tower's first layer that counts, negative from the end.
        start_layer_text: the same of the text encoder.

    Returns:
        ``R_text [T, context, context]``, whose row at a text's end token is the relevance of its tokens, and
        ``R_image [T, patches]``, patches row by row.

    Raises:
        InputError: images, texts or layers that do not fit, a tower beyond CLIP's transformers, or a text encoder
            whose attention cannot be read.
    """
    model = as_model(model)
    place = model.device if device is None else torch.device(device)
    tokens = texts if isinstance(texts, Tensor) else model.tokenize(texts)
    features, relevance = text_relevance(model, tokens, _embedding(model, image), start_layer_text)
    return relevance.to(place), image_relevance(model, image, features, start_layer)[0].to(place)


def image_relevance(model: Model | nn.Module, images: Tensor, text_features: Tensor, start_layer: int = -1) -> Tensor:
    """Relevance of images' patches for texts; no text encoder is needed.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[T, D]``, used at unit length times the model's logit scale, where it has one.
        start_layer: the first layer that counts, negative from the end.

    Returns:
        ``[B, T, patches]``, row by row.

    Raises:
        InputError: images, features or a layer that do not fit, or a tower beyond CLIP's transformers.
    """
    model = as_model(model)
    if text_features.ndim != 2:
        raise InputError(f"text_features has shape {list(text_features.shape)}, expected [texts, embed_dim]")
    texts = F.normalize(text_features.detach().to(model.device), dim=1) * _logit_scale(model)
    return chefer(model.tower, check_batch(model, images), texts[None], first_layer=start_layer).flatten(2)


def text_relevance(
    model: Model | nn.Module, tokens: Tensor, image_embedding: Tensor, start_layer: int = -1
) -> tuple[Tensor, Tensor]:
    """Features of texts, and the relevance of their tokens for the logit with an image.

    The encoder is the module's own. Where it calls torch's attention the weights are computed one by one and kept,
    ``T·heads·context²`` numbers per layer.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes.
        tokens: ``[T, context]``.
        image_embedding: ``[D]``, of any length.
        start_layer: the first layer that counts, negative from the end.

    Returns:
        ``[T, D]``, not normalised, and ``[T, context, context]``.

    Raises:
        InputError: no text encoder, or one whose attention cannot be read, tokens or a layer that do not fit.
    """
    model = as_model(model)
    package = package_of(model.module)
    if not package.has_text_encoder(model.module):
        raise InputError("this model has no text encoder: call image_relevance with features")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not len(tokens) or tokens.is_floating_point():
        raise InputError("texts are neither strings nor tokens [texts, context]")
    kept = _KeptAttention()
    with torch.inference_mode(False), torch.enable_grad(), autocast_disabled(image_embedding), kept:
        features = package.encode_text(model.module, tokens, model.device)
    if not kept.weights:
        raise InputError("this text encoder does not use torch's attention: call image_relevance with its features")
    with torch.inference_mode(False), torch.enable_grad(), autocast_disabled(image_embedding):
        image = F.normalize(image_embedding.detach().clone().to(features), dim=0)
        logits = F.normalize(features, dim=1) @ image * _logit_scale(model)
        first = resolve_layer(start_layer, len(kept.weights))
        weights = kept.weights[first:]
        gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    count = weights[0].shape[-1]
    relevance = torch.eye(count, dtype=weights[0].dtype, device=weights[0].device).expand(len(tokens), -1, -1)
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            relevance = relevance + (gradient * weight.detach()).relu().mean(1) @ relevance
    return features.detach(), relevance


def _embedding(model: Model, image: Tensor) -> Tensor:
    pixels = check_batch(model, image)
    if len(pixels) != 1:
        raise InputError(f"image is {len(pixels)} images: give one, or call image_relevance")
    return model.encode_image(pixels)[0]


def _logit_scale(model: Model) -> Tensor:
    """What a module multiplies cosines with, 1 where it does not say."""
    scale = getattr(model.module, "logit_scale", None)
    if not isinstance(scale, Tensor):
        return torch.ones((), device=model.device)
    with torch.no_grad():
        return scale.detach().to(model.device).exp()


class _KeptAttention(TorchFunctionMode):
    """While it is entered, torch's attention keeps its weights ``[..., heads, queries, keys]``, each in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # of nn.MultiheadAttention; what it calls is not seen here
            return self._attend_heads(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Attention among the tokens ``[N, T, W]`` of texts."""
        extras = (bias_k, bias_v, key_padding_mask)
        if query is not key or in_proj_weight is None or add_zero_attn or any(extra is not None for extra in extras):
            raise InputError("this text encoder's attention has more than queries, keys and values of its tokens")
        packed = F.linear(query, in_proj_weight, in_proj_bias).transpose(0, 1)  # [T, N, 3·W]
        query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        is_causal = bool(rest.get("is_causal")) and attn_mask is None
        mixed = self._attend(query, key, value, attn_mask, is_causal=is_causal)
        return F.linear(mixed.transpose(1, 2).flatten(2).transpose(0, 1), out_proj_weight, out_proj_bias), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        weights = logits.softmax(-1)
        weights = weights if weights.requires_grad else weights.requires_grad_()
        self.weights.append(weights)
        return weights @ value
