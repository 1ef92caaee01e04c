"""One layer, one head, two tokens: every number below can be verified on paper.

The tower has width 2 and embedding width 2; every LayerNorm has ε = 0, so with two entries (a, b), a > b, it gives
(1, −1). One pixel is the image, the patch is that pixel.

    residual start      class token (3, 1), patch (0, 4)
    ln_1                (1, −1) and (−1, 1)
    query of the class  (√2·ln 3/2, 0)     keys (2, −2) and (0, 0)
    logits              q·k/√2 = ln 3 and 0  →  attention (3/4, 1/4)
    values              (4, −4) and (−4, 12)  →  z = (2, 0)
    attention           W_O z + b_O = (2, 2) + (1, −1) = (3, 1)       residual (6, 2)
    MLP                 ln_2 = (1, −1), one hidden unit GELU(10) = 10, out (10 − 2, 0 + 4) = (8, 4)
    residual            (14, 6): μ = 10, σ = 4
    embedding           ((1, −1)·γ + β) P = ((1, −1)·(2, 1) + (1, 2)) P = (3, 1) P = (3, 4): n = 5
"""

from functools import partial
from math import log, sqrt

import pytest
import torch
from measures import error
from open_clip.transformer import LayerNorm, VisionTransformer
from tolerances import FLOAT64
from torch import Tensor

from clipfast import wrap
from clipfast.contributions import Contributions

WEIGHTS = {
    "class_embedding": [3, 1],
    "positional_embedding": [[0, 0], [0, 0]],
    "conv1.weight": [[[[0]], [[0]], [[0]]], [[[4]], [[0]], [[0]]]],  # (0, 4 · red)
    "proj": [[1, 1], [0, 1]],
    "ln_post.weight": [2, 1],
    "ln_post.bias": [1, 2],
    "transformer.resblocks.0.ln_1.weight": [1, 1],
    "transformer.resblocks.0.ln_1.bias": [0, 0],
    "transformer.resblocks.0.attn.in_proj_weight": [[sqrt(2) * log(3) / 2, 0], [0, 0], [1, 0], [0, 1], [4, 0], [0, 8]],
    "transformer.resblocks.0.attn.in_proj_bias": [0, 0, 1, -1, 0, 4],
    "transformer.resblocks.0.attn.out_proj.weight": [[1, 0], [1, 1]],
    "transformer.resblocks.0.attn.out_proj.bias": [1, -1],
    "transformer.resblocks.0.ln_2.weight": [1, 1],
    "transformer.resblocks.0.ln_2.bias": [0, 0],
    "transformer.resblocks.0.mlp.c_fc.weight": [[5, -5]],
    "transformer.resblocks.0.mlp.c_fc.bias": [0],
    "transformer.resblocks.0.mlp.c_proj.weight": [[1], [0]],
    "transformer.resblocks.0.mlp.c_proj.bias": [-2, 4],
}


def exactly(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def visual() -> VisionTransformer:
    module = VisionTransformer(
        image_size=1,
        patch_size=1,
        width=2,
        layers=1,
        heads=1,
        mlp_ratio=0.5,
        output_dim=2,
        no_ln_pre=True,
        norm_layer=partial(LayerNorm, eps=0.0),
    ).double()
    module.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in WEIGHTS.items()})
    return module.eval()


def decompose(visual: VisionTransformer, **options: object) -> Contributions:
    red = exactly([[[1.0]], [[0.0]], [[0.0]]])
    return wrap(visual).decompose(red, attention=True, tokens=True, texts=exactly([6, 4], [0, 10]), **options)


def test_the_embedding_and_its_statistics(visual: VisionTransformer) -> None:
    contributions = decompose(visual)
    assert error(contributions.embedding, exactly([3, 4])) <= FLOAT64
    assert error(contributions.norm, exactly(5)) <= FLOAT64
    assert error(contributions.mean, exactly(10)) <= FLOAT64
    assert error(contributions.std, exactly(4)) <= FLOAT64


def test_attention_and_code(visual: VisionTransformer) -> None:
    contributions = decompose(visual)
    assert error(contributions.attention, exactly([[[3 / 4, 1 / 4]]])) <= FLOAT64
    assert error(contributions.codes, exactly([[[2 / 20, 0]]])) <= FLOAT64  # z / (σ n)


def test_terms_with_the_mean_split_evenly(visual: VisionTransformer) -> None:
    """K = 3: ((a − 10/3)/4 · γ + β/3) P / 5 for a = (3, 1), (3, 1) and (8, 4)."""
    contributions = decompose(visual)
    assert error(contributions.heads(), exactly([[[1 / 30, 1 / 20]]])) <= FLOAT64
    assert error(contributions.head(0, 0), exactly([1 / 30, 1 / 20])) <= FLOAT64
    assert error(contributions.start, exactly([1 / 30, 1 / 20])) <= FLOAT64
    assert error(contributions.mlps, exactly([[8 / 15, 7 / 10]])) <= FLOAT64
    assert error(contributions.rest, exactly([0, 0])) <= FLOAT64
    assert error(contributions.total(), exactly([3 / 5, 4 / 5])) <= FLOAT64


def test_tokens_and_maps(visual: VisionTransformer) -> None:
    """Parts α_i W_O v_i = (3, 0) and (−1, 2), each with b_O/2, −μ/6 and β/6; maps towards (6, 4) and (0, 10)."""
    tokens = exactly([[13 / 60, 7 / 40], [-11 / 60, -1 / 8]])
    maps = exactly([[2, 1.75], [-1.6, -1.25]])
    contributions = decompose(visual, maps="summed")
    assert error(contributions.tokens(0)[:, :, 0], tokens) <= FLOAT64
    assert error(contributions.tokens(0, head=0), tokens) <= FLOAT64
    assert error(contributions.maps, maps) <= FLOAT64
    assert error(contributions.patch_maps(), maps[:, 1:, None]) <= FLOAT64
    assert error(decompose(visual, maps="per_head").maps[:, 0, 0], maps) <= FLOAT64


def test_terms_that_lose_their_own_mean(visual: VisionTransformer) -> None:
    """((a − mean(a))/4 · γ + β/3) P / 5: (3, 1) → (1/6, 1/4), (8, 4) → (4/15, 3/10)."""
    contributions = decompose(visual, centring="termwise")
    assert error(contributions.heads(), exactly([[[1 / 6, 1 / 4]]])) <= FLOAT64
    assert error(contributions.start, exactly([1 / 6, 1 / 4])) <= FLOAT64
    assert error(contributions.mlps, exactly([[4 / 15, 3 / 10]])) <= FLOAT64
    assert error(contributions.total(), exactly([3 / 5, 4 / 5])) <= FLOAT64


def test_scores_towards_a_text(visual: VisionTransformer) -> None:
    scores = decompose(visual).scores(exactly([6, 4]))
    assert error(scores.start, exactly([0.4])) <= FLOAT64
    assert error(scores.heads, exactly([[[0.4]]])) <= FLOAT64  # 6/30 + 4/20
    assert error(scores.mlps, exactly([[6.0]])) <= FLOAT64
    assert error(scores.rest, exactly([0.0])) <= FLOAT64
