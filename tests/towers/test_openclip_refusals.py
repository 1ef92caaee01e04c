"""Every refusal is reached by a real module, and nothing that changes the result is accepted silently."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from builders import ROOT, pixels, randomise, vision_tower
from measures import relative_error
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from tolerances import EMBEDDING_FLOAT32
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

from clipfast import UnsupportedTower, wrap
from clipfast.towers import huggingface, openai_clip, timm_towers
from clipfast.towers.openclip import REFUSALS, refusals
from clipfast.towers.patches import CHANGED


class OwnTower(VisionTransformer):
    """Somebody's subclass, whose forward may do anything."""


class Adapted(nn.Linear):
    """A linear layer with an adapter, as fine-tuning packages put in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def adapted(linear: nn.Linear) -> Adapted:
    layer = Adapted(linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    return layer


def replaced() -> nn.Module:
    visual = vision_tower()
    block = visual.transformer.resblocks[1]
    block.mlp.c_fc = adapted(block.mlp.c_fc)
    return visual


def changed(change: Callable[[Any], object]) -> nn.Module:
    """A tower after ``change(second block)``."""
    visual = vision_tower()
    change(visual.transformer.resblocks[1])
    return visual


class LoraLinear(nn.Linear):
    """As adapters are written: low-rank matrices beside the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.lora_A = nn.Parameter(torch.randn(2, linear.in_features))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def adapt(block: Any) -> None:
    block.mlp.c_fc = LoraLinear(block.mlp.c_fc)


def quantise(block: Any) -> None:
    block.mlp.c_proj = torch.ao.nn.quantized.dynamic.Linear(block.mlp.c_proj.in_features, 32)


def override_forward(block: Any) -> None:
    block.attn.forward = lambda *arguments, **options: (2 * type(block.attn).forward(block.attn, *arguments)[0], None)


@contextmanager
def global_hook() -> Iterator[nn.Module]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        yield vision_tower()
    finally:
        handle.remove()


POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "class": partial(OwnTower, 16, 8, 32, 1, 2, 2.0),
    "poolers": partial(vision_tower, **{**POOLER, "attentional_pool": "parallel"}),
    "query_mean": partial(vision_tower, **POOLER, pool_type="avg"),
    "pool": partial(vision_tower, pool_type="none"),
    "scaled_cosine": partial(vision_tower, scaled_cosine_attn=True),
    "activation": partial(vision_tower, act_layer=nn.ReLU),
    "batch_norm": lambda: ModifiedResNet((1, 1, 1, 1), 16, 4, image_size=32, width=8),
    "training": lambda: vision_tower(patch_dropout=0.5).train(),
    "replaced": replaced,
    "adapter": partial(changed, adapt),
    "quantised": partial(changed, quantise),
    "spectral_norm": lambda: changed(lambda block: spectral_norm(block.mlp.c_fc)).train(),
    "not_run": partial(changed, lambda block: weight_norm(block.attn.out_proj)),
    "hook": partial(changed, lambda block: block.register_forward_hook(lambda module, inputs, output: 2 * output)),
    "global_hook": global_hook,
    "forward": partial(changed, override_forward),
}


def test_every_refusal_has_a_module() -> None:
    of_timm = set(timm_towers.REFUSALS) - set(CHANGED) - {"batch_norm"}
    assert set(MODULES) == set(REFUSALS) - of_timm


@pytest.mark.parametrize("key", MODULES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:torch.quantize_per_tensor")
def test_each_reason_is_reached_alone(key: str) -> None:
    made = MODULES[key]()
    with made if key == "global_hook" else nullcontext(made) as visual:
        assert [reason for reason, _ in refusals(visual)] == [key]
        with pytest.raises(UnsupportedTower) as caught:
            wrap(visual)
    message = str(caught.value)
    assert REFUSALS[key] in message
    assert message.startswith("cannot decompose ")
    assert "\n" not in message


def test_two_poolers_give_an_embedding_per_query() -> None:
    """What is refused of open_clip's second pooler is what its own forward does."""
    for pooling in ("parallel", "cascade"):
        visual = vision_tower(**{**POOLER, "attentional_pool": pooling, "output_dim": 32})
        assert [key for key, _ in refusals(visual)] == ["poolers"]
        with torch.no_grad():
            assert visual(pixels(visual)).shape == (2, 1, 32)


def test_scaled_cosine_attention_does_not_run_in_open_clip() -> None:
    visual = vision_tower(scaled_cosine_attn=True)
    with pytest.raises(RuntimeError, match="must be a 3D tensor"):
        visual(pixels(visual))


def test_all_reasons_stand_in_one_message() -> None:
    visual = vision_tower(pool_type="none", act_layer=nn.ReLU, patch_dropout=0.5, scaled_cosine_attn=True).train()
    block = visual.transformer.resblocks[-1]
    block.attn.out_proj = adapted(block.attn.out_proj)
    with pytest.raises(UnsupportedTower) as caught:
        wrap(visual)
    expected = {"scaled_cosine", "pool", "activation", "training", "replaced"}
    assert sorted(reason.split(" (")[0] for reason in caught.value.reasons) == sorted(REFUSALS[key] for key in expected)
    assert all(REFUSALS[key] in str(caught.value) for key in expected)


def test_patch_dropout_in_eval_mode_decomposes() -> None:
    visual = vision_tower(patch_dropout=0.5)
    images = pixels(visual)
    with torch.no_grad():
        assert relative_error(wrap(visual).decompose(images).embedding, visual(images)) <= EMBEDDING_FLOAT32


def test_the_documentation_lists_every_reason_with_advice() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8").partition("\n## Why a pass")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE))
    reasons = {*REFUSALS.values(), *huggingface.REFUSALS.values(), *openai_clip.REFUSALS.values()}
    assert [sentence for sentence in sorted(reasons) if not rows.get(sentence)] == []
    assert set(rows) - reasons == {"reason"}


# Changes of a tower before wrapping. Each changes what the module computes, so it must be refused, or be part of the
# decomposition.


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


class Convolution(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def replace_patch_embedding(visual: Any) -> None:
    conv = Convolution(3, 32, 8, stride=8, bias=False)
    conv.load_state_dict(visual.conv1.state_dict())
    visual.conv1 = conv


def give_patch_embedding_a_bias(visual: Any) -> None:
    visual.conv1 = randomise(nn.Conv2d(3, 32, 8, stride=8, bias=True), seed=5)


def replace_first_norm(visual: Any) -> None:
    visual.ln_pre = nn.RMSNorm(32)


def replace_last_norm(visual: Any) -> None:
    visual.ln_post = nn.Identity()


def derive_last_norm(visual: Any) -> None:
    class Shifted(LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    visual.ln_post = Shifted(32)


def derive_block_norm(visual: Any) -> None:
    class Shifted(LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    visual.transformer.resblocks[0].ln_1 = Shifted(32)


def drop_last_norms_bias(visual: Any) -> None:
    visual.ln_post = nn.LayerNorm(32, bias=False)


def mix_activations(visual: Any) -> None:
    visual.transformer.resblocks[1].mlp.gelu = QuickGELU()


def lengthen_an_mlp(visual: Any) -> None:
    visual.transformer.resblocks[1].mlp.append(nn.Tanh())


def replace_a_layer_scale(visual: Any) -> None:
    visual.transformer.resblocks[1].ls_1 = Doubled(visual.transformer.resblocks[1].ls_1)


def change_the_heads(visual: Any) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    visual.transformer.resblocks[1].attn = randomise(attention, seed=6).eval()


def attend_to_a_learned_key(visual: Any) -> None:
    attention = nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)
    visual.transformer.resblocks[1].attn = randomise(attention, seed=6).eval()


CHANGES = [
    replace_patch_embedding,
    give_patch_embedding_a_bias,
    replace_first_norm,
    replace_last_norm,
    derive_last_norm,
    derive_block_norm,
    drop_last_norms_bias,
    mix_activations,
    lengthen_an_mlp,
    replace_a_layer_scale,
    change_the_heads,
    attend_to_a_learned_key,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_tower_is_refused_or_followed(change: Callable[[Any], None]) -> None:
    visual = vision_tower()
    images = pixels(visual)
    with torch.no_grad():
        before = visual(images)
        change(visual)
        after = visual(images)
    assert relative_error(after, before) > EMBEDDING_FLOAT32, "this change changes nothing"
    try:
        model = wrap(visual)
    except UnsupportedTower:
        return
    difference = relative_error(model.decompose(images).embedding, after)
    assert difference <= EMBEDDING_FLOAT32, "decomposed as a plain tower, into another embedding"
