"""Makes the ``benchmarks`` package, which is not installed, importable; a small substitute for the published code."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SIZES = "image_size=16, patch_size=8, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=12"
FACTORY = f"""
import torch
from open_clip.transformer import VisionTransformer

class Clip(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = VisionTransformer({SIZES})
        self.logger = None
    def encode_image(self, images, attn_method="direct", normalize=True):
        assert not normalize and attn_method == ("head" if self.logger.spatial else "head_no_spatial")
        self.logger.images = images
        return self.visual(images)

def create_model_and_transforms(name, pretrained=None):
    print("output of the published code")
    return Clip(), None, None
"""
HOOK = f"""
import sys
sys.path.append({str(ROOT)!r})
from clipfast.bench import naive

class Logger:
    def reinit(self):
        self.images = None
    def finalize(self, representation):
        result = naive.decompose(self.visual, self.images, spatial=self.spatial)
        return result.attentions, result.start_and_mlps

def hook_prs_logger(model, device, spatial=True):
    logger = model.logger = Logger()
    logger.visual, logger.spatial = model.visual, spatial
    return logger
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the published code's files and functions, which computes with the naive implementation."""
    folder = tmp_path / "checkout"
    (folder / "utils").mkdir(parents=True)
    (folder / "utils" / "factory.py").write_text(FACTORY)
    (folder / "prs_hook.py").write_text(HOOK)
    return folder


@pytest.fixture(scope="module")
def visual() -> Any:
    """A tower of the substitute's sizes."""
    torch.manual_seed(5)
    tower = eval(f"VisionTransformer({SIZES})", {"VisionTransformer": VisionTransformer}).eval()
    from benchmarks import cases

    cases.randomize(tower)
    return tower
