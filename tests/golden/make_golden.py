"""Golden arrays: every term of small random towers, from what forward hooks see of open_clip's own forward.

``python tests/golden/make_golden.py`` writes one file per tower and one for TEXTSPAN. Everything is computed in float64
with NumPy, from the definition in section 3 of arXiv 2310.05916, and imports nothing of clipfast. The script checks
itself: the heads of a layer sum to what the hook saw that layer's attention give, and all terms to the embedding.

Axes: ``B`` images, ``L`` layers, ``N`` tokens, ``H`` heads, ``D`` embed_dim.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

HERE = Path(__file__).resolve().parent
Array = NDArray[np.float64]

SIZES = {"image_size": 12, "patch_size": 4, "width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2.0, "output_dim": 16}
TOWERS: dict[str, dict[str, Any]] = {
    "class_token": {"quick_gelu": True},
    "mean_pooled": {"quick_gelu": False, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5},
    "no_ln_pre": {"quick_gelu": False, "no_ln_pre": True},
}
IMAGES = 3


def build(changes: dict[str, Any]) -> VisionTransformer:
    """A tower from a configuration; weights are still open_clip's initial ones."""
    settings = {**SIZES, **changes}
    quick_gelu = settings.pop("quick_gelu")
    return VisionTransformer(**settings, act_layer=QuickGELU if quick_gelu else nn.GELU).eval()


def randomise(visual: nn.Module, seed: int) -> None:
    """Every weight, bias and scale gets a random value; float32 holds it exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            fan_in = 1 if parameter.ndim == 1 else parameter[0].numel()
            value = torch.randn(parameter.shape, generator=generator) * (0.4 if parameter.ndim == 1 else fan_in**-0.5)
            parameter.copy_(value + 1 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_post.weight")) else value)


def record(visual: VisionTransformer, images: torch.Tensor) -> tuple[Array, dict[str, Array]]:
    """The embedding, and what goes in and out of the modules of the tower while it is computed."""
    seen: dict[str, Array] = {}

    def saving(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[f"{name}.in"], seen[f"{name}.out"] = inputs[0].double().numpy(), output.double().numpy()

        return hook

    handles = [visual.ln_post.register_forward_hook(saving("ln_post"))]
    for layer, block in enumerate(visual.transformer.resblocks):
        handles.append(block.register_forward_hook(saving(f"{layer}.block")))
        for name in ("ln_1", "ls_1", "ls_2"):
            handles.append(getattr(block, name).register_forward_hook(saving(f"{layer}.{name}")))
    with torch.no_grad():
        embedding = visual(images)
    for handle in handles:
        handle.remove()
    return embedding.numpy(), seen


def pool(x: Array, mean_pooled: bool) -> Array:
    """The token that the embedding reads, ``[B, N, ...] → [B, ...]``."""
    return x[:, 1:].mean(1) if mean_pooled else x[:, 0]


def softmax(x: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def decompose(visual: VisionTransformer, images: torch.Tensor, centring: str) -> dict[str, Array]:
    """Every term of the embeddings, divided by their norm.

    Returns:
        ``embedding [B, D]``, ``attention [B, L, H, N]``, ``tokens [B, L, N, H, D]``, ``start [B, D]`` and
        ``mlps [B, L, D]``.
    """
    mean_pooled = visual.pool_type == "avg"
    embedding, seen = record(visual, images)
    weights = {name: value.numpy() for name, value in visual.state_dict().items()}
    attention, token_parts, mlps = [], [], []
    for layer, block in enumerate(visual.transformer.resblocks):
        prefix, heads = f"transformer.resblocks.{layer}", block.attn.num_heads
        normed = seen[f"{layer}.ln_1.out"]
        projected = normed @ weights[f"{prefix}.attn.in_proj_weight"].T + weights[f"{prefix}.attn.in_proj_bias"]
        query, key, value = np.split(projected.reshape(*normed.shape[:2], 3 * heads, -1), 3, axis=2)  # [B, N, H, E]
        full = softmax(np.einsum("bqhe,bkhe->bhqk", query, key) / np.sqrt(query.shape[-1]))
        row = pool(full.transpose(0, 2, 1, 3), mean_pooled)  # [B, H, N]
        out_weight = weights[f"{prefix}.attn.out_proj.weight"].reshape(-1, heads, query.shape[-1])  # [W, H, E]
        scale = weights.get(f"{prefix}.ls_1.gamma", np.ones(out_weight.shape[0]))
        parts = np.einsum("bhn,bnhe,whe,w->bnhw", row, value, out_weight, scale)
        parts += weights[f"{prefix}.attn.out_proj.bias"] * scale / (parts.shape[1] * heads)
        attention.append(row)
        token_parts.append(parts)
        mlps.append(pool(seen[f"{layer}.ls_2.out"], mean_pooled))
        np.testing.assert_allclose(parts.sum((1, 2)), pool(seen[f"{layer}.ls_1.out"], mean_pooled), atol=1e-12)
    start = pool(seen["0.block.in"], mean_pooled)
    before = seen["ln_post.in"]
    residual = before if before.ndim == 2 else pool(before, mean_pooled)  # the norm may come before or after pooling
    mean, std = residual.mean(-1), np.sqrt(residual.var(-1) + visual.ln_post.eps)
    norm = np.linalg.norm(embedding, axis=-1)
    terms = 1 + 2 * len(mlps)

    def through_norm(term: Array, share: float) -> Array:
        """The final LayerNorm with its own μ and σ held, the projection, and a ``share`` of μ and of the bias."""
        shape = (IMAGES,) + (1,) * (term.ndim - 1)
        centre = term.mean(-1, keepdims=True) if centring == "termwise" else mean.reshape(shape) * share
        normed = (term - centre) / std.reshape(shape) * weights["ln_post.weight"] + weights["ln_post.bias"] * share
        return normed @ weights["proj"] / norm.reshape(shape)

    tokens = np.stack(token_parts, 1)
    made = {
        "embedding": embedding,
        "attention": np.stack(attention, 1),
        "tokens": through_norm(tokens, 1 / (terms * tokens.shape[2] * tokens.shape[3])),
        "start": through_norm(start, 1 / terms),
        "mlps": through_norm(np.stack(mlps, 1), 1 / terms),
    }
    total = made["tokens"].sum((1, 2, 3)) + made["start"] + made["mlps"].sum(1)
    np.testing.assert_allclose(total, embedding / norm[:, None], atol=1e-12)
    return made


def textspan(outputs: Array, texts: Array, size: int, rank: int) -> tuple[list[int], Array]:
    """Algorithm 1 of arXiv 2310.05916: the texts picked, and the outputs rebuilt from their directions."""
    axes = np.linalg.svd(outputs, full_matrices=False)[2][:rank]
    rest, features = outputs - outputs.mean(0), texts @ axes.T @ axes
    picks, rebuilt = [], np.tile(outputs.mean(0), (len(outputs), 1))
    for _ in range(size):
        pick = int(np.argmax((rest @ features.T).std(0)))
        unit = features[pick] / np.linalg.norm(features[pick])
        picks.append(pick)
        rebuilt = rebuilt + np.outer(rest @ unit, unit)
        rest = rest - np.outer(rest @ unit, unit)
        features = features - np.outer(features @ unit, unit)
    return picks, rebuilt


def main() -> None:
    """Writes all files."""
    for seed, (name, changes) in enumerate(TOWERS.items()):
        visual = build(changes)
        randomise(visual, seed)
        images = torch.randn(IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(100 + seed))
        weights = {f"weights/{key}": value.numpy() for key, value in visual.state_dict().items()}
        visual.double()
        made = {
            f"{centring}/{key}": value
            for centring in ("uniform", "termwise")
            for key, value in decompose(visual, images.double(), centring).items()
        }
        config = np.frombuffer(json.dumps(changes).encode(), dtype=np.uint8)
        np.savez_compressed(HERE / f"{name}.npz", config=config, images=images.numpy(), **weights, **made)
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.normal(size=(20, 8)))[0]
    outputs = ((rng.normal(size=(200, 8)) + 1) * 0.8 ** np.arange(8)) @ axes.T
    texts = rng.normal(size=(60, 20))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    picks, rebuilt = textspan(outputs, texts, 6, 8)
    np.savez_compressed(
        HERE / "textspan.npz", head_outputs=outputs, text_features=texts, picks=picks, rank=8, reconstruction=rebuilt
    )


if __name__ == "__main__":
    main()
