"""Every term against golden arrays that an independent program made from forward hooks alone.

``tests/golden/make_golden.py`` is that program. Where arrays of another implementation of the paper lie beside the
checkout they are compared too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ROOT
from golden.make_golden import SIZES, TOWERS, build
from measures import error
from open_clip.transformer import QuickGELU, VisionTransformer
from tolerances import FLOAT64, GOLDEN
from torch import Tensor, nn

import clipfast
from clipfast import wrap

FOLDER = Path(__file__).parent / "golden"
OTHERS = ROOT.parent / "shared" / "golden"


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def load_weights(visual: VisionTransformer, saved: dict[str, Tensor]) -> VisionTransformer:
    visual.load_state_dict(
        {name.removeprefix("weights/"): value for name, value in saved.items() if name.startswith("weights/")}
    )
    return visual.eval()


def test_every_tower_has_its_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.npz")} == {*TOWERS, "textspan"}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("centring", ["uniform", "termwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_term(name: str, centring: Any, dtype: torch.dtype) -> None:
    limit = GOLDEN if dtype == torch.float32 else FLOAT64
    saved = arrays(FOLDER / f"{name}.npz")
    config = json.loads(bytes(saved["config"].numpy()))
    assert config == TOWERS[name]
    model = wrap(load_weights(build(config), saved).to(dtype))
    texts = torch.nn.functional.normalize(torch.eye(SIZES["output_dim"], dtype=torch.float64)[:5] + 0.1, dim=1)
    options = {"maps": "per_head", "attention": True, "tokens": True, "centring": centring}
    made = model.decompose(saved["images"].to(dtype), texts=texts.to(dtype), **options)
    expected = {key.removeprefix(f"{centring}/"): value for key, value in saved.items() if key.startswith(centring)}
    assert error(made.embedding, expected["embedding"]) <= limit * float(expected["embedding"].abs().max())
    assert error(made.attention, expected["attention"]) <= limit
    assert error(made.start, expected["start"]) <= limit
    assert error(made.mlps, expected["mlps"]) <= limit
    assert error(made.heads(), expected["tokens"].sum(2)) <= limit
    for layer in range(SIZES["layers"]):
        assert error(made.tokens(layer), expected["tokens"][:, layer]) <= limit
    assert error(made.maps, (expected["tokens"] @ texts.T).permute(0, 1, 3, 2, 4)) <= limit
    assert made.max_error() <= limit


def test_textspan() -> None:
    saved = arrays(FOLDER / "textspan.npz")
    span = clipfast.textspan(
        saved["head_outputs"], saved["text_features"], len(saved["picks"]), rank=int(saved["rank"])
    )
    assert list(span.picks) == saved["picks"].tolist()
    assert error(span.reconstruct(), saved["reconstruction"]) <= FLOAT64 * float(saved["reconstruction"].abs().max())


@pytest.mark.parametrize("name", ["tower_gelu.npz", "tower_quickgelu.npz"])
def test_another_implementation(name: str) -> None:
    path = OTHERS / name
    if not path.is_file():
        pytest.skip(f"no arrays of another implementation beside this checkout: {name}")
    saved = arrays(path)
    config = json.loads(bytes(saved["config"].numpy()))
    quick_gelu = config.pop("quick_gelu")
    config.pop("seed")
    visual = load_weights(VisionTransformer(**config, act_layer=QuickGELU if quick_gelu else nn.GELU), saved)
    texts = torch.eye(config["output_dim"])[:7]
    made = wrap(visual).decompose(saved["images"], texts=texts, maps="per_head", tokens=True)
    assert error(made.embedding, saved["embedding"]) <= GOLDEN * float(saved["embedding"].abs().max())
    assert error(torch.cat([made.start[:, None], made.mlps], 1), saved["mlps"]) <= GOLDEN
    assert error(made.heads(), saved["attentions"].sum(2)) <= GOLDEN
    for layer in made.layers:
        assert error(made.tokens(layer), saved["attentions"][:, layer]) <= GOLDEN
    assert error(made.maps, (saved["attentions"] @ texts.T).transpose(2, 3)) <= GOLDEN
