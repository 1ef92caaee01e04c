"""Hugging Face's transformers: ``output_attentions``, and forward hooks for what it does not return."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import ours
from benchmarks.peers.conversions import to_transformers
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from benchmarks.peers.terms import Readout


def readout_of(model: Any) -> Readout:
    """What stands after the heads of a ``CLIPVisionModelWithProjection``."""
    outputs = [layer.self_attn.out_proj for layer in model.vision_model.encoder.layers]
    projection = model.visual_projection.weight.T
    return Readout.of(outputs, model.vision_model.post_layernorm, projection, model.config.num_attention_heads)


def _attentions(inputs: Inputs, take: Callable[[tuple[Tensor, ...]], Answer]) -> Side:
    model = to_transformers(inputs.vision.visual, "eager")

    @torch.inference_mode()
    def answer() -> Answer:
        return take(model(pixel_values=inputs.images, output_attentions=True).attentions)

    return Side(answer)


def _rows(attentions: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([attention[:, :, 0] for attention in attentions], 1)


def _heads(inputs: Inputs) -> Side:
    model = to_transformers(inputs.vision.visual)
    readout, layers = readout_of(model), model.vision_model.encoder.layers
    rows: list[Tensor] = []

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        read = arguments[0]
        rows.append(read if read.ndim == 2 else read[:, 0])

    for layer in layers:
        layer.self_attn.out_proj.register_forward_pre_hook(keep)
    model.vision_model.post_layernorm.register_forward_pre_hook(keep)

    @torch.inference_mode()
    def answer() -> Answer:
        rows.clear()
        model(pixel_values=inputs.images)
        *mixed, last = rows
        return readout.heads(mixed, last)

    return Side(answer)


PEER = Peer(
    "transformers",
    "transformers",
    "transformers",
    (
        Question(
            "attention of the class token",
            "the class token's row of attention in every layer and head, [B, L, H, N]",
            "`output_attentions=True` with eager attention, which is the only way to get weights; it returns all rows, "
            "and one of them is taken.",
            ours.pooled_attention,
            partial(_attentions, take=_rows),
        ),
        Question(
            "all attention patterns",
            "every row of attention in every layer and head, [B, H, N, N] per layer",
            "`output_attentions=True` with eager attention. clipfast's answer is `attention_matrices` of "
            "`clipfast.analyses.gradients`, a forward in plain torch: its decomposed forward never makes these.",
            ours.patterns,
            partial(_attentions, take=list),
        ),
        Question(
            "heads' contributions",
            "every head's contribution to the embedding, [B, L, H, D]",
            "Hooks before every output projection with fused attention, the class token alone, and the definition "
            "written out on what they saw.",
            ours.heads,
            _heads,
        ),
    ),
)
