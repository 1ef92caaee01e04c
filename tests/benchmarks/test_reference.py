"""The process that runs the published code, with a small substitute for the checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases
from benchmarks.checkout import NotACheckout, validate
from benchmarks.reference import Reference, ReferenceFailed
from clipfast.bench import naive

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
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
