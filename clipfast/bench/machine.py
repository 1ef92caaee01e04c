"""The machine, the versions and the commit of a result."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("clipfast", "torch", "open_clip_torch", "triton", "numpy")


def cpu_name() -> str:
    """Model name of the processor, as the operating system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: str) -> str:
    """The processor's name for ``"cpu"``, the accelerator's for any other device."""
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(torch.device(device))


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine: what does not change between two runs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug(described: dict[str, Any]) -> str:
    """A machine as part of a file name: ``amd-epyc-2-cores``."""
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*", " ", described["device_name"].lower())
    words = "-".join(re.findall(r"[a-z0-9]+", name))
    return words if described["device"] != "cpu" else f"{words}-{described['cores']}-cores"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that compute; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code(results: Sequence[Path] = ()) -> dict[str, Any]:
    """The commit of a checkout and whether files other than results differ from it; None for an installed package.

    Args:
        results: further folders of results.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:  # a virtual environment may lie inside another repository
        return {"commit": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    inside = [folder.resolve() for folder in results if folder.resolve().is_relative_to(ROOT)]
    left_out = [f":(exclude){folder.relative_to(ROOT)}" for folder in (ROOT / "benchmarks" / "results", *inside)]
    changes = _git("status", "--porcelain", "--", ".", *left_out)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def moment() -> dict[str, Any]:
    """What changes from run to run and may explain an outlier."""
    described: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0}
    torch = sys.modules.get("torch")
    if torch is not None:
        described["torch_threads"] = torch.get_num_threads()
    return described
