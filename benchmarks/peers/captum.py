"""captum: activations of layers, and gradient × activation."""

from typing import Any, cast

import torch
from torch import Tensor

import clipfast
from benchmarks.peers import ours
from benchmarks.peers.conversions import to_transformers
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from benchmarks.peers.transformers import readout_of


def _heads(inputs: Inputs) -> Side:
    from captum.attr import LayerActivation

    model = to_transformers(inputs.vision.visual)
    readout, vision = readout_of(model), model.vision_model
    layers = [*(layer.self_attn.out_proj for layer in vision.encoder.layers), vision.post_layernorm]
    method = LayerActivation(lambda images: model(pixel_values=images).image_embeds, layers)

    def answer() -> Answer:
        *mixed, last = method.attribute(inputs.images, attribute_to_layer_input=True)
        with torch.inference_mode():
            return readout.heads([each[:, 0] for each in mixed], last)

    return Side(answer)


def _last_layer(inputs: Inputs) -> Side:
    from captum.attr import LayerGradientXActivation

    model = to_transformers(inputs.vision.visual)
    vision, norm, text = model.vision_model, model.vision_model.post_layernorm, inputs.texts[0]
    heads = model.config.num_attention_heads
    # the direct effect alone: not what the block's MLP makes of it
    vision.encoder.layers[-1].layer_norm2.register_forward_pre_hook(lambda _, arguments: (arguments[0].detach(),))

    def similarity(images: Tensor) -> Tensor:  # [B], with the norms frozen
        last = vision(pixel_values=images).last_hidden_state[:, 0]
        mean = last.mean(-1, keepdim=True)
        std = (last.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        embedding = model.visual_projection((last - mean.detach()) / std.detach() * norm.weight + norm.bias)
        return cast(Tensor, embedding @ text / embedding.norm(dim=-1).detach())

    method: Any = LayerGradientXActivation(similarity, vision.encoder.layers[-1].self_attn.out_proj)

    def answer() -> Answer:
        products = method.attribute(inputs.images, attribute_to_layer_input=True)  # [B, N, H·E]
        return cast(Tensor, products.detach().sum(1).unflatten(-1, (heads, -1)).sum(-1))

    return Side(answer)


def _our_last_layer(inputs: Inputs) -> Side:
    model = clipfast.wrap(inputs.vision.visual)

    def answer() -> Answer:
        contributions = model.decompose(inputs.images, layers=[-1])
        values = contributions.basis.values(model.layers - 1) @ inputs.texts[0]  # [H, E]
        return (contributions.codes[:, 0] * values).sum(-1)

    return Side(answer)


PEER = Peer(
    "captum",
    "captum",
    "captum.attr",
    (
        Question(
            "heads' contributions",
            "every head's contribution to the embedding, [B, L, H, D]",
            "`LayerActivation` of the inputs of all output projections of transformers' model, then the definition "
            "written out. It keeps all tokens, and the class token's are taken.",
            ours.heads,
            _heads,
        ),
        Question(
            "last layer's heads for a text",
            "what each head of the last layer adds to the similarity with one text, [B, H], without constants",
            "`LayerGradientXActivation` of the last output projection's input. The final norm and ‖embedding‖ are "
            "frozen and the last MLP's input is detached, so that the similarity is linear in it: the direct effect.",
            _our_last_layer,
            _last_layer,
        ),
    ),
)
