"""A differentiable forward of a tower: every attention matrix, and the gradient of a similarity towards it.

What relevance methods need and the decomposed forward never makes: whole attention matrices ``[B, H, N, N]`` and
gradients. Plain torch, one line per step, for any :class:`clipfast.towers.tower.Tower`; weights take no gradient.
The score that is differentiated is ``⟨y/‖y‖, t⟩`` with the embedding ``y``; a text ``t`` is used as long as it is.

``B`` images, ``N`` tokens (class token first), ``W`` width, ``H`` heads, ``E`` head_dim, ``L`` layers, ``D`` embed_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import autocast_disabled
from clipfast.errors import InputError
from clipfast.towers.tower import LayerNorm, Tower

Part = TypeVar("Part")


def quick_gelu(x: Tensor) -> Tensor:
    """``x · sigmoid(1.702 x)``."""
    return x * (1.702 * x).sigmoid()


_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


@dataclass(frozen=True)
class Trace:
    """A forward pass with its graph.

    Attributes:
        attention: one ``[B, H, N, N]`` per layer, rows are queries, each sums to 1; float32 at least.
        hidden: the residual stream ``[B, N, W]`` before the first block and after each one, ``L + 1`` of them.
        embedding: ``[B, D]``, not normalised.
    """

    attention: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    embedding: Tensor


def forward(tower: Tower, images: Tensor) -> Trace:
    """The whole forward in one graph, whatever gradient mode or autocast surrounds the call.

    Keeps every attention matrix, ``B·L·H·N²`` numbers, and what the graph needs besides, several times as much. Where
    one layer at a time is enough, :func:`attention_gradients` keeps a single layer's.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.

    Raises:
        InputError: images of another shape.
    """
    images = check_images(tower, images)
    with _recording(images):
        weights = frozen(tower)
        x = embed(weights, images)
        if not x.requires_grad:  # nothing before it does: the graph begins here
            x.requires_grad_()
        hidden, attention = [x], []
        for layer in range(weights.layers):
            x, matrix = run_block(weights, layer, x)
            hidden.append(x)
            attention.append(matrix)
        return Trace(tuple(attention), tuple(hidden), readout(weights, pool(weights, x)))


def attention_matrices(tower: Tower, images: Tensor) -> Iterator[Tensor]:
    """Every layer's attention ``[B, H, N, N]``, first to last, without gradients; none is kept here.

    Raises:
        InputError: images of another shape.
    """
    images = check_images(tower, images)
    return _matrices(tower, images)


def attention_gradients(tower: Tower, images: Tensor, text_features: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every layer's attention with the gradient of the similarity towards it, last layer first.

    The residual stream before every block is kept, ``B·L·N·W`` numbers, and each block is run again when its turn
    comes, so that only one layer's attention and graph exist at a time: two forwards and one backward in all.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, or ``[B, D]``, one per image.

    Yields:
        layer, attention ``[B, H, N, N]``, gradient ``[B, H, N, N]``.

    Raises:
        InputError: images or features of another shape.
    """
    images = check_images(tower, images)
    targets = check_targets(tower, images, text_features)[:, None]
    return ((layer, attention, gradient) for layer, _, attention, gradient in _gradients(tower, images, targets))


def text_attention_gradients(
    tower: Tower, images: Tensor, text_features: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """:func:`attention_gradients` for several texts per image, text by text within each layer.

    The two forwards are shared by all texts, and each text adds one backward. The gradient that arrives at a layer is
    kept per text, ``B·T·N·W`` numbers.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[B, T, D]``, or ``[1, T, D]`` for the same texts with all images.

    Yields:
        layer, text, attention ``[B, H, N, N]``, gradient ``[B, H, N, N]``.

    Raises:
        InputError: images or features of another shape.
    """
    images = check_images(tower, images)
    return _gradients(tower, images, check_texts(tower, images, text_features))


def own_gradients(
    tower: Tower, images: Tensor, text_features: Tensor, *, tokens: str = "all"
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every layer's attention with the gradient of *that layer's* similarity towards it, first layer first.

    The similarity of a layer is that of its own output, pooled and read as if it were the last. One layer's attention
    and graph exist at a time, and nothing else is kept: one forward and one short backward per layer.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, or ``[B, D]``, one per image.
        tokens: what is pooled: ``"all"`` tokens averaged, or those that the tower itself ``"pooled"``.

    Yields:
        layer, attention ``[B, H, N, N]``, gradient ``[B, H, N, N]``.

    Raises:
        InputError: images or features of another shape, or no such pooling.
    """
    images = check_images(tower, images)
    targets = check_targets(tower, images, text_features)[:, None]
    layers = _own_gradients(tower, images, targets, _averages(tokens))
    return ((layer, attention, gradient) for layer, _, attention, gradient in layers)


def text_own_gradients(
    tower: Tower, images: Tensor, text_features: Tensor, *, tokens: str = "all", first_layer: int = 0
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """:func:`own_gradients` for several texts per image, text by text within each layer.

    The forward is shared by all texts, and each text adds one short backward per layer.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[B, T, D]``, or ``[1, T, D]`` for the same texts with all images.
        tokens: as for :func:`own_gradients`.
        first_layer: layers before it have no turn.

    Yields:
        layer, text, attention ``[B, H, N, N]``, gradient ``[B, H, N, N]``.

    Raises:
        InputError: images or features of another shape, or no such pooling.
    """
    images = check_images(tower, images)
    return _own_gradients(tower, images, check_texts(tower, images, text_features), _averages(tokens), first_layer)


def _averages(tokens: str) -> bool:
    if tokens not in ("all", "pooled"):
        raise InputError(f"tokens is {tokens!r}: choose 'all' or 'pooled'")
    return tokens == "all"


def check_images(tower: Tower, images: Tensor) -> Tensor:
    """Images on the tower's device and in its dtype, or an :class:`InputError` if their shape is another."""
    if special := tower.special():
        raise InputError(
            f"this method takes vision transformers as CLIP's alone, and this one has {', '.join(special)}"
        )
    height, width = tower.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width) or not images.is_floating_point():
        shape = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise InputError(f"images is {shape}, expected floating point [images, 3, {height}, {width}], preprocessed")
    return images.to(tower.device, tower.dtype)


def check_targets(tower: Tower, images: Tensor, text_features: Tensor) -> Tensor:
    """One text per image, ``[B, D]`` in float32 at least, from ``[D]`` or ``[B, D]``.

    Raises:
        InputError: any other shape.
    """
    count, width = len(images), tower.embed_dim
    if text_features.shape == (width,):
        text_features = text_features.expand(count, -1)
    if text_features.shape != (count, width):
        shape = list(text_features.shape)
        raise InputError(
            f"text_features has shape {shape}: expected one text [{width}] or one per image [{count}, {width}]"
        )
    return _as_target(text_features, images)


def check_texts(tower: Tower, images: Tensor, text_features: Tensor) -> Tensor:
    """Several texts per image, ``[B, T, D]`` in float32 at least, from that or ``[1, T, D]``.

    Raises:
        InputError: any other shape, or no text.
    """
    count, width = len(images), tower.embed_dim
    shape = list(text_features.shape)
    if len(shape) != 3 or shape[0] not in (1, count) or not shape[1] or shape[2] != width:
        raise InputError(f"text_features has shape {shape}: expected [{count}, texts, {width}] or [1, texts, {width}]")
    return _as_target(text_features, images).expand(count, -1, -1)


def _as_target(text_features: Tensor, images: Tensor) -> Tensor:
    acc_dtype = torch.promote_types(images.dtype, torch.float32)
    with torch.inference_mode(False):
        return _own(text_features).detach().to(images.device, acc_dtype)


# ------------------------------------------------------------------------------------------------- steps of a forward


def frozen(part: Part) -> Part:
    """A tower, or a part of one, whose tensors take no gradient; their memory is shared."""
    whole: Any = part
    return replace(whole, **{field.name: _frozen(getattr(whole, field.name)) for field in fields(whole)})


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _own(value).detach()
    if isinstance(value, tuple):
        return tuple(_frozen(item) for item in value)
    return frozen(value) if is_dataclass(value) else value


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under inference mode, which no graph may hold."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def embed(tower: Tower, images: Tensor) -> Tensor:
    """Pixels to the start of the residual stream, ``[B, 3, height, width] → [B, N, W]``."""
    assert tower.patch_weight is not None
    assert tower.class_embedding is not None
    assert tower.positional_embedding is not None
    patches = F.conv2d(images, tower.patch_weight, tower.patch_bias, stride=tower.patch_size)
    patches = patches.flatten(2).transpose(1, 2)  # [B, N − 1, W]
    start = tower.class_embedding.to(images.dtype).expand(len(images), 1, -1)
    x = torch.cat([start, patches], 1) + tower.positional_embedding.to(images.dtype)
    if tower.registers is not None:
        registers = tower.registers.to(images.dtype).expand(len(images), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
    return x if tower.ln_pre is None else _norm(x, tower.ln_pre)


def run_block(tower: Tower, layer: int, x: Tensor, normed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One block: the residual stream after it ``[B, N, W]`` and its attention ``[B, H, N, N]``.

    ``normed`` is what its attention reads, :func:`block_norm` of ``x`` for None.
    """
    block = tower.blocks[layer]
    normed = block_norm(tower, layer, x) if normed is None else normed
    packed = block.packed()
    if packed is None:
        parts: Sequence[Tensor] = [F.linear(normed, *layer) for layer in block.query_key_value()]
    else:
        parts = F.linear(normed, *packed).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (tower.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, N, E] each
    logits = (query * tower.head_dim**-0.5) @ key.transpose(2, 3)
    attention = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))  # [B, H, N, N]
    mixed = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # [B, N, H·E]
    x = x + _scaled(F.linear(mixed, block.out_weight, block.out_bias), block.attention_scale)
    hidden = _ACTIVATIONS[tower.activation](F.linear(_norm(x, block.ln_2), block.mlp_in_weight, block.mlp_in_bias))
    return x + _scaled(F.linear(hidden, block.mlp_out_weight, block.mlp_out_bias), block.mlp_scale), attention


def block_norm(tower: Tower, layer: int, x: Tensor) -> Tensor:
    """The norm before a block's attention, ``[B, N, W]``."""
    return _norm(x, tower.blocks[layer].ln_1)


def pool(tower: Tower, x: Tensor) -> Tensor:
    """The row that the embedding reads, ``[B, N, W] → [B, W]``."""
    return x[:, 0] if tower.pooling == "cls" else x[:, 1:].mean(1)


def readout(tower: Tower, pooled: Tensor) -> Tensor:
    """Final LayerNorm and projection, ``[B, W] → [B, D]``."""
    normed = _norm(pooled, tower.ln_post)
    return normed if tower.projection is None else normed @ tower.projection


def similarity(embedding: Tensor, targets: Tensor) -> Tensor:
    """``⟨y/‖y‖, t⟩`` of every image with its own text, ``[B, D], [B, D] → [B]``; float32 at least."""
    acc_dtype = torch.promote_types(embedding.dtype, torch.float32)
    return (F.normalize(embedding.to(acc_dtype), dim=1) * targets).sum(1)


def _norm(x: Tensor, norm: LayerNorm | None) -> Tensor:
    assert norm is not None  # see check_images
    acc_dtype = torch.promote_types(x.dtype, norm.weight.dtype)  # a norm may be kept in float32 where the rest is not
    weight, bias = norm.weight.to(acc_dtype), norm.bias.to(acc_dtype)
    return F.layer_norm(x.to(acc_dtype), weight.shape, weight, bias, norm.eps).to(x.dtype)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


# ----------------------------------------------------------------------------------------------------- layer by layer


@contextmanager
def _recording(like: Tensor, enabled: bool = True) -> Iterator[None]:
    """Builds a graph, or none, whatever surrounds the call: no_grad, inference mode, autocast."""
    with torch.inference_mode(False), torch.set_grad_enabled(enabled), autocast_disabled(like):
        yield


# No context may stay open over a yield: it would leak into the code that reads the generator.


def _matrices(tower: Tower, images: Tensor) -> Iterator[Tensor]:
    with _recording(images, False):
        x = embed(tower, images)
    for layer in range(tower.layers):
        with _recording(images, False):
            x, attention = run_block(tower, layer, x)
        yield attention


def _gradients(tower: Tower, images: Tensor, targets: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Last layer first, and within a layer each of the texts ``[B, T, D]``."""
    with _recording(images, False):
        weights = frozen(tower)
        hidden = [embed(weights, images)]
        for layer in range(weights.layers):
            hidden.append(run_block(weights, layer, hidden[-1])[0])
    with _recording(images):
        x = hidden.pop().requires_grad_()
        embedding = readout(weights, pool(weights, x))
        arriving = [
            torch.autograd.grad(similarity(embedding, target).sum(), x, retain_graph=True)[0]
            for target in targets.unbind(1)
        ]
        del embedding
    for layer in reversed(range(weights.layers)):
        with _recording(images):
            x = hidden.pop().requires_grad_()
            out, attention = run_block(weights, layer, x)
        for text, gradient_of_out in enumerate(arriving):
            last = text == len(arriving) - 1
            with _recording(images):
                gradient, arriving[text] = torch.autograd.grad(
                    out, (attention, x), gradient_of_out, retain_graph=not last
                )
            if last:
                del out
            yield layer, text, attention.detach(), gradient


def _own_gradients(
    tower: Tower, images: Tensor, targets: Tensor, average: bool, first_layer: int = 0
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """First layer first, and within a layer each of the texts ``[B, T, D]``."""
    with _recording(images, False):
        weights = frozen(tower)
        x = embed(weights, images)
        for layer in range(first_layer):
            x = run_block(weights, layer, x)[0]
    for layer in range(first_layer, weights.layers):
        with _recording(images):
            out, attention = run_block(weights, layer, x.requires_grad_())
            pooled = out.mean(1) if average else pool(weights, out)
            embedding = readout(weights, pooled)
        x = out.detach()
        del out, pooled
        for text, target in enumerate(targets.unbind(1)):
            last = text == targets.shape[1] - 1
            with _recording(images):
                score = similarity(embedding, target).sum()
                (gradient,) = torch.autograd.grad(score, attention, retain_graph=not last)
            yield layer, text, attention.detach(), gradient
