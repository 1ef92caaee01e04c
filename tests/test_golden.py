"""Every term against the arrays of an independent implementation of the paper."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT
from measures import error
from open_clip.transformer import QuickGELU, VisionTransformer
from tolerances import FLOAT64, GOLDEN
from torch import nn

from clipfast import wrap

FOLDER = ROOT.parent / "shared" / "golden"
FILES = ("tower_gelu.npz", "tower_quickgelu.npz")


def load(path: Path) -> tuple[VisionTransformer, dict[str, torch.Tensor]]:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    config = json.loads(bytes(arrays.pop("config").numpy()))
    quick = config.pop("quick_gelu")
    config.pop("seed")
    visual = VisionTransformer(**config, act_layer=QuickGELU if quick else nn.GELU)
    weights = {name.removeprefix("weights/"): arrays.pop(name) for name in list(arrays) if name.startswith("weights/")}
    visual.load_state_dict(weights)
    return visual.eval(), arrays


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest) -> tuple[VisionTransformer, dict[str, torch.Tensor]]:
    path = FOLDER / request.param
    if not path.is_file():
        pytest.skip(f"no golden arrays beside this checkout: {path.name}")
    return load(path)


def test_terms_are_the_golden_ones(golden: tuple[VisionTransformer, dict[str, torch.Tensor]]) -> None:
    visual, want = golden
    found = wrap(visual).decompose(want["images"], tokens=True)
    assert error(found.embedding, want["embedding"]) <= GOLDEN * float(want["embedding"].abs().max())
    assert error(found.start_and_mlps(), want["mlps"]) <= GOLDEN
    assert error(found.heads(), want["attentions"].sum(2)) <= GOLDEN
    for layer in found.layers:
        assert error(found.tokens(layer), want["attentions"][:, layer]) <= GOLDEN


def test_maps_are_the_golden_tokens_projected(golden: tuple[VisionTransformer, dict[str, torch.Tensor]]) -> None:
    visual, want = golden
    texts = torch.eye(want["embedding"].shape[1])[:7]
    found = wrap(visual).decompose(want["images"], texts=texts, maps="per_head")
    assert error(found.maps, (want["attentions"] @ texts.T).transpose(2, 3)) <= GOLDEN


def test_float64_adds_up(golden: tuple[VisionTransformer, dict[str, torch.Tensor]]) -> None:
    visual, want = golden
    found = wrap(visual.double()).decompose(want["images"])
    assert found.embedding.dtype == torch.float64
    assert found.max_error() <= FLOAT64
