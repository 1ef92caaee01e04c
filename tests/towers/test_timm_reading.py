"""Walks over all names of timm's transformers and of open_clip's trunks: read exactly and decomposed, or refused.

What a tower's fields say must give the module's own embedding in float64. That forward is written out in plain torch,
so that a mistake of the reader cannot be mended by one of clipfast's own forward.
"""

from typing import Any

import open_clip
import pytest
import timm
import torch
from measures import relative_error
from plain_forward import embedding
from timm_small import (
    FLAGS,
    TRANSFORMERS,
    build,
    build_open_clip,
    flagged,
    has_network,
    pixels,
    randomised,
    trunk_of,
)
from tolerances import EMBEDDING_FLOAT32, SUM_FLOAT32

import clipfast
from clipfast.towers import openclip, openclip_models, timm_towers
from clipfast.towers.tower import Tower

REFUSED_TRUNKS = {"convnext_large_d": "mlp_head", "convnext_large_d_320": "mlp_head"}
QUICK = ("vit_small_r26_s32_224", "vit_base_resnet26d_224", "vitamin_small_224", "vit_base_mci_224")
"""Of the names with a network before the blocks, one of every kind of network."""
NAMES = [
    name if not has_network(name) or name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in TRANSFORMERS
]
TRUNKS = [name for name in open_clip.list_models() if trunk_of(name) is not None]
QUICK_TRUNKS = {
    tuple(sorted((key, str(value)) for key, value in (trunk_of(name) or {}).items() if key != "image_size")): name
    for name in TRUNKS
    if not has_network((trunk_of(name) or {})["timm_model_name"]) or name in ("ViTamin-S", "MobileCLIP-B")
}


def expected(name: str) -> list[str]:
    return [REFUSED_TRUNKS[name]] if name in REFUSED_TRUNKS else []


def check(module: Any, tower: Tower) -> None:
    images = pixels(tower.image_size, dtype=torch.float64)
    with torch.no_grad():
        own = module(images)
    assert relative_error(embedding(tower, images), own) <= 1e-11
    contributions = clipfast.wrap(module.float(), image_size=tower.image_size).decompose(images.float())
    assert contributions.max_error() <= SUM_FLOAT32
    assert relative_error(contributions.embedding, own) <= EMBEDDING_FLOAT32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_name_of_timms_transformers_decomposes(name: str) -> None:
    module = build(name, torch.float64)
    check(module, timm_towers.read(module))


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_read_exactly(flag: str) -> None:
    module = flagged(flag, torch.float64)
    check(module, timm_towers.read(module))


NETWORKS = (
    *("test_byobnet", "cs3darknet_focus_s", "cspnext_tiny", "edgenext_xx_small", "regnetx_002", "resnetv2_18"),
    *("rexnet_100", "tresnet_m", "ese_vovnet19b_slim_dw", "xception41p", "densenet121", "mobilenetv2_035", "resnet18d"),
    "resnet50_clip",
)
"""The smallest name of every class of networks whose pooling is read, and one with an attention pool."""


@pytest.mark.parametrize("name", NETWORKS)
def test_every_class_of_networks_decomposes(name: str) -> None:
    module = randomised(timm.create_model(name)).double().eval()
    check(module, timm_towers.read(module, image_size=(64, 96)))


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.slow
def test_every_trunk_of_open_clip_is_read_or_refused(name: str) -> None:
    assert [key for key, _ in openclip_models.supports(name)] == expected(name)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_TRUNKS.values() else pytest.param(name, marks=pytest.mark.slow) for name in TRUNKS]
)
def test_trunks_of_open_clip_decompose_or_are_refused(name: str) -> None:
    module = build_open_clip(name, torch.float64)
    keys = [key for key, _ in openclip.refusals(module)]
    assert keys == expected(name)
    if not keys:
        check(module, openclip.read(module))


def test_the_well_known_models_are_read() -> None:
    """The walks above would also pass if everything were refused."""
    assert len(TRANSFORMERS) >= 292
    assert len(TRUNKS) - len(REFUSED_TRUNKS) >= 76
