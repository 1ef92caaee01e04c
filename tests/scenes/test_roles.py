"""The losses that give heads roles, compared with the decomposition."""

import math
from typing import Any

import pytest
import torch
from measures import error
from tolerances import FLOAT64

import clipfast
from clipfast.scenes.training.network import NetworkConfig, build
from clipfast.scenes.training.reading import Reading, read
from clipfast.scenes.training.roles import Roles
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES

IMAGES = 24
CLASSES = sum(map(len, ATTRIBUTES.values()))


@pytest.fixture(scope="module")
def visual() -> Any:
    torch.manual_seed(0)
    config = NetworkConfig(embed_dim=48, vision_width=64, vision_head=16, vision_layers=3, text_width=64, text_layers=1)
    return build(config, 500).visual.double().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    vectors = torch.randn(CLASSES, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1)


def contrasts(texts: torch.Tensor) -> list[torch.Tensor]:
    """The class texts of each attribute without look-alikes, minus their mean, scaled to norm 1."""
    contrasts, start = [], 0
    for values in ATTRIBUTES.values():
        rows = [start + at for at, value in enumerate(values) if value not in LOOKALIKES]
        centred = texts[rows] - texts[rows].mean(0)
        contrasts.append(centred / centred.norm())
        start += len(values)
    return contrasts


def test_reading_equals_the_forward_of_open_clip(visual: Any, images: torch.Tensor) -> None:
    reading = read(visual, images)
    with torch.no_grad():
        assert error(reading.tokens[:, 0] @ visual.proj, visual(images)) <= FLOAT64
        total = sum(reading.others)
        for block, heads in zip(visual.transformer.resblocks, reading.heads, strict=True):
            total = total + block.attn.out_proj(heads.flatten(1))
        assert error(total, reading.stream) <= FLOAT64


@torch.no_grad()
def test_losses_equal_those_of_the_decomposition(visual: Any, images: torch.Tensor, texts: torch.Tensor) -> None:
    late = 2
    roles = Roles(visual, read(visual, images), texts, late)
    contributions = clipfast.wrap(visual).decompose(images, centring="termwise")
    heads = contributions.heads()[:, -late:].flatten(1, 2)  # [B, heads, D]; a new network has no biases
    energies = torch.stack([(heads @ rows.T).var(0).sum(1) for rows in contrasts(texts)], 1)
    shares = energies / energies.sum(1, keepdim=True)
    entropy = -(shares * shares.log()).sum(1) / math.log(len(ATTRIBUTES))
    weights = energies.sum(1) / energies.sum()
    assert float(roles.specialisation()) == pytest.approx(float((weights * entropy).sum()), abs=1e-6)

    around = contributions.start + contributions.mlps.sum(1) + contributions.heads()[:, :-late].sum((1, 2))
    total = contributions.total()
    ratios = [float((around @ rows.T).var(0).sum() / (total @ rows.T).var(0).sum()) ** 0.5 for rows in contrasts(texts)]
    assert float(roles.bypass()) == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)


def test_head_with_a_single_attribute_has_no_specialisation_loss(visual: Any, images: torch.Tensor) -> None:
    """Only one head is active; the texts of shapes lie in the span of its output, all others are orthogonal to it."""
    reading = read(visual, images)
    active = torch.zeros_like(reading.heads[-1])
    active[:, 1] = reading.heads[-1][:, 1]
    reading = Reading(reading.tokens, reading.stream, (*reading.heads[:-1], active), reading.others)
    values = clipfast.wrap(visual).basis("termwise").values(2)[1].double()  # [16, D]
    axes = torch.linalg.qr(values.T)[0]
    vectors = torch.randn(CLASSES, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inside = vectors @ axes @ axes.T
    shapes = len(ATTRIBUTES["shape"])
    separate = torch.cat([inside[:shapes], (vectors - inside)[shapes:]])
    assert float(Roles(visual, reading, separate, 1).specialisation()) == pytest.approx(0, abs=1e-6)
    assert float(Roles(visual, reading, vectors, 1).specialisation()) > 0.7


def test_bypass_is_zero_without_other_terms(visual: Any, images: torch.Tensor, texts: torch.Tensor) -> None:
    reading = read(visual, images)
    early = (torch.zeros_like(reading.heads[0]), *reading.heads[1:])
    silent = Reading(reading.tokens, reading.stream, early, tuple(map(torch.zeros_like, reading.others)))
    assert float(Roles(visual, silent, texts, 2).bypass()) == pytest.approx(1e-4, abs=1e-9)  # 1e-8 in the root
    assert float(Roles(visual, reading, texts, 2).bypass()) > 0.1
