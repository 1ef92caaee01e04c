"""Kernels compiled side by side before they run, for a GPU that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from builders import ROOT


def test_kernels_are_compiled_ahead_and_nothing_is_decided(tmp_path: Path) -> None:
    """A way that fails leaves the others, and each kernel is compiled once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compiling_ahead.py")
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen.pop("ways") == seen.pop("all") > seen.pop("one") == 1
    assert seen == {"postponed inside": True, "postponed outside": False, "decided": False}
