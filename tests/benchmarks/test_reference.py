"""The process that runs the published code, with a small substitute for the checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer

from benchmarks import cases
from benchmarks.checkout import NotACheckout, validate
from benchmarks.reference import Reference, ReferenceFailed
from clipfast.bench import naive

ROOT = Path(__file__).resolve().parents[2]
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
    folder = tmp_path / "checkout"
    (folder / "utils").mkdir(parents=True)
    (folder / "utils" / "factory.py").write_text(FACTORY)
    (folder / "prs_hook.py").write_text(HOOK)
    return folder


@pytest.fixture(scope="module")
def visual() -> Any:
    torch.manual_seed(5)
    tower = eval(f"VisionTransformer({SIZES})", {"VisionTransformer": VisionTransformer}).eval()
    cases.randomize(tower)
    return tower


def test_process_decomposes_the_given_weights_and_images(checkout: Path, visual: Any, tmp_path: Path) -> None:
    images = cases.noise(visual, 2)
    with Reference(checkout, "any", visual, images, spatial=True, threads=1, folder=tmp_path) as other:
        result = other.result()
        assert other.run() > 0
        assert other.peak()["peak_mb"] >= other.peak()["loaded_mb"] * 0.99
    expected = naive.decompose(visual, images)
    assert cases.relative(result.attentions, expected.attentions) < 1e-5
    assert cases.relative(result.start_and_mlps, expected.start_and_mlps) < 1e-5
    assert cases.difference(result.embedding, expected.embedding) < 1e-5


def test_failing_checkout_reports_its_error(checkout: Path, visual: Any, tmp_path: Path) -> None:
    (checkout / "prs_hook.py").write_text("import a_missing_package\ndef hook_prs_logger(): ...\n")
    images = cases.noise(visual, 1)
    with pytest.raises(ReferenceFailed, match="No module named 'a_missing_package'"):
        Reference(checkout, "any", visual, images, spatial=True, threads=1, folder=tmp_path)


def test_folder_that_is_not_a_checkout_is_rejected(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(NotACheckout, match=r"it has no prs_hook\.py"):
        validate(tmp_path)
    (checkout / "utils" / "factory.py").write_text("")
    with pytest.raises(NotACheckout, match=r"utils/factory\.py has no create_model_and_transforms"):
        validate(checkout)


def test_invalid_reference_option_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_reference.py", "--reference", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 4
    assert process.stderr.strip().startswith(f"ERROR: --reference {tmp_path} is not a checkout of the published code")
    assert len(process.stderr.strip().splitlines()) == 1
