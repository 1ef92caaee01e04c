"""Peak memory of a callable, measured in a process of its own.

Both sides of a comparison start in the same way: a new process builds its inputs and its model, resets the high-water
mark, and runs the callable a few times. Without the reset, the memory needed while loading could hide that of the
forward. ``python -m clipfast.bench.memory TARGET ARGUMENTS`` is that process.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

CALLS = 2
"""The first call allocates what is kept; later calls show whether memory grows."""
MB = 1e6


class ProbeFailed(RuntimeError):
    """The measuring process ended without a figure; the message is its last line."""


@dataclass(frozen=True)
class Peak:
    """Memory of a process, in MB (10⁶ bytes).

    Attributes:
        loaded_mb: resident after inputs and model were built.
        peak_mb: highest resident size of the whole process from then on.
        method: how the peak was read.
        device_loaded_mb: allocated on the accelerator after loading, None without one.
        device_peak_mb: most allocated on the accelerator, None without one.
    """

    loaded_mb: float
    peak_mb: float
    method: str
    device_loaded_mb: float | None = None
    device_peak_mb: float | None = None

    @property
    def increment_mb(self) -> float:
        """Memory that the callable needed beyond what was loaded."""
        return self.peak_mb - self.loaded_mb

    def to_json(self) -> dict[str, Any]:
        """The peak in the layout of a result file."""
        return asdict(self) | {"increment_mb": self.increment_mb}


def memory_json(a: Peak, b: Peak) -> dict[str, Any]:
    """Both sides and their ratios in the layout of a result file."""
    ratios: dict[str, float | None] = {
        "peak_ratio_a_over_b": a.peak_mb / b.peak_mb,
        "increment_ratio_a_over_b": a.increment_mb / b.increment_mb if b.increment_mb > 0 else None,
    }
    if a.device_peak_mb and b.device_peak_mb:
        ratios["device_peak_ratio_a_over_b"] = a.device_peak_mb / b.device_peak_mb
    return {"a": a.to_json(), "b": b.to_json()} | ratios


def peak_memory(target: str, **arguments: Any) -> Peak:
    """Peak memory of the callable that ``target`` builds, measured in a fresh process.

    Args:
        target: ``"package.module:function"``; called with ``arguments`` it returns the callable to measure.
        arguments: values that JSON can represent.

    Raises:
        ProbeFailed: the process died, for lack of memory for example, or this system does not say what is used.
    """
    _check_system()
    command = [sys.executable, "-P", "-m", __name__, target, json.dumps(arguments)]
    # the child must find what this process imports, in the same order and from any working directory
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ProbeFailed(f"{target} ended with {done.returncode}: {message}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _check_system() -> None:
    """Raises :class:`ProbeFailed` where memory cannot be read."""
    if not Path("/proc/self/statm").exists():
        raise ProbeFailed("peak memory is read from /proc, which this system does not have: use --no-memory")


def _resident() -> int:
    """Resident bytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reset_high_water() -> bool:
    """Resets the process's high-water mark to its present size, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Highest resident bytes since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # Windows has none, and no /proc either: see _check_system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(call: Callable[[], object]) -> Peak:
    """Peak memory of a callable in this process; memory already in use counts as loaded.

    Use it for an accelerator, whose allocator counts exactly. For the CPU use :func:`peak_memory`.
    """
    torch = sys.modules.get("torch")
    on_device = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    device_loaded = device_peak = None
    if torch is not None and on_device:
        torch.cuda.synchronize()
        device_loaded = torch.cuda.memory_allocated() / MB
        torch.cuda.reset_peak_memory_stats()
    reset = _reset_high_water()
    loaded = _resident()
    for _ in range(CALLS):
        result = call()
        del result
    if torch is not None and on_device:
        torch.cuda.synchronize()
        device_peak = torch.cuda.max_memory_allocated() / MB
    return Peak(
        loaded / MB,
        _high_water() / MB,
        "VmHWM, reset after loading" if reset else "VmHWM of the whole process: loading included",
        device_loaded,
        device_peak,
    )


def main() -> None:
    """Builds the callable, measures it and prints one line of JSON."""
    module, _, function = sys.argv[1].partition(":")
    build = getattr(importlib.import_module(module), function)
    call = cast(Callable[[], object], build(**json.loads(sys.argv[2])))
    print(json.dumps(asdict(measure(call))))


if __name__ == "__main__":
    main()
