"""TransformerLens: a bridge to transformers' ViT. It has none to a CLIP tower alone."""

from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from benchmarks import cases
from benchmarks.peers.question import Answer, Inputs, NotPossible, Peer, Question, Side, one_line
from benchmarks.peers.terms import Readout
from clipfast.analyses.gradients import attention_matrices


def vit(inputs: Inputs) -> Any:
    """A ``ViTModel`` of transformers with the sizes of the inputs' model and seeded random weights."""
    from transformers import ViTConfig, ViTModel

    tower = clipfast.wrap(inputs.vision.visual).tower
    config = ViTConfig(
        hidden_size=tower.width,
        intermediate_size=tower.blocks[0].mlp_in_weight.shape[0],
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size[0],
        patch_size=tower.image_size[0] // tower.grid[0],
        architectures=["ViTModel"],
    )
    torch.manual_seed(0)
    model: nn.Module = ViTModel(config, add_pooling_layer=False).eval()
    cases.randomize(model)
    return model


def _bridge(model: nn.Module) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("vit", hf_model=model, device="cpu")


def _patterns(inputs: Inputs) -> Side:
    model, images = vit(inputs), inputs.images
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.config.num_hidden_layers)]
    bridge = _bridge(model)

    @torch.inference_mode()
    def answer() -> Answer:
        _, cache = bridge.run_with_cache(images, names_filter=lambda name: name in names)
        return [cache[name] for name in names]

    return Side(answer)


def _our_patterns(inputs: Inputs) -> Side:
    tower, images = clipfast.wrap(vit(inputs)).tower, inputs.images
    return Side(lambda: list(attention_matrices(tower, images)))


def _heads(inputs: Inputs) -> Side:
    model, images = vit(inputs), inputs.images
    outputs = [layer.attention.o_proj for layer in model.layers]
    readout = Readout.of(outputs, model.layernorm, None, model.config.num_attention_heads)
    bridge, count = _bridge(model), model.config.num_hidden_layers
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(count)]
    final = f"blocks.{count - 1}.hook_resid_post"

    @torch.inference_mode()
    def answer() -> Answer:
        _, cache = bridge.run_with_cache(images, names_filter=lambda name: name in (*names, final))
        mixed: list[Tensor] = [cache[name][:, 0].flatten(1) for name in names]
        return readout.heads(mixed, cache[final][:, 0])

    return Side(answer)


def _our_heads(inputs: Inputs) -> Side:
    model, images = clipfast.wrap(vit(inputs)), inputs.images
    return Side(lambda: model.decompose(images).heads())


def _clip(inputs: Inputs) -> Side:
    from benchmarks.peers.conversions import to_transformers

    try:
        _bridge(to_transformers(inputs.vision.visual, "eager"))
    except Exception as failure:
        raise NotPossible(f"no bridge to a CLIP tower: {one_line(failure)}") from failure
    raise NotPossible("there is a bridge to a CLIP tower now, and nothing that asks it")


SIZES = "a ViT of transformers with the model's sizes, because TransformerLens has no bridge to a CLIP tower"

PEER = Peer(
    "TransformerLens",
    "transformer_lens",
    "transformer_lens",
    (
        Question(
            "heads' contributions, CLIP",
            "every head's contribution to the embedding, [B, L, H, D]",
            "`TransformerBridge.boot_transformers` on transformers' CLIP tower.",
            _our_heads,
            _clip,
        ),
        Question(
            "heads' contributions, ViT",
            f"every head's contribution to the class token's last norm, [B, L, H, W]: {SIZES}",
            "`run_with_cache` that keeps `hook_z` and the last residual stream, then the definition written out on the "
            "class token.",
            _our_heads,
            _heads,
        ),
        Question(
            "all attention patterns, ViT",
            f"every row of attention in every layer and head, [B, H, N, N] per layer: {SIZES}",
            "`run_with_cache` that keeps `hook_pattern` alone; clipfast's side is `attention_matrices` here, too.",
            _our_patterns,
            _patterns,
        ),
    ),
)
