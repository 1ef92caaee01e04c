"""The published code for comparison: a checkout of it runs in its own process.

The checkout (github.com/yossigandelsman/clip_prs) is a folder of scripts with packages named ``utils`` and
``prs_hook``. It must come first on ``sys.path`` and cannot share a process with other code. The process stays alive
and performs one run per request, so the runs of the two sides interleave. It times its own runs.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkout import validate
from clipfast.bench.naive import Result

WORKER = Path(__file__).resolve().parent / "reference_worker.py"


class ReferenceFailed(RuntimeError):
    """The published code raised; the message is its last line."""


class Reference:
    """A running process of the published code with given weights and images.

    Use as a context manager.
    """

    def __init__(
        self, checkout: Path, name: str, visual: Any, images: Tensor, *, spatial: bool, threads: int, folder: Path
    ) -> None:
        device = str(images.device)
        self._answer = folder / "answer.safetensors"
        inputs = folder / "inputs.safetensors"
        weights = {f"visual.{key}": tensor.cpu().contiguous() for key, tensor in visual.state_dict().items()}
        save_file(weights | {"images": images.cpu()}, inputs)
        request: dict[str, Any] = {"model": name, "inputs": str(inputs), "answer": str(self._answer)}
        request |= {"spatial": spatial, "threads": threads, "device": device}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(validate(checkout)), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = self._read()

    def __enter__(self) -> "Reference":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # other lines are printed by the published code
                return dict(json.loads(line))
        _, stderr = self._process.communicate()
        raise ReferenceFailed(f"the published code stopped: {(stderr.strip().splitlines() or ['no message'])[-1]}")

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read reports why the process ended
            print(command, file=self._process.stdin, flush=True)
        return self._read()

    def run(self) -> float:
        """Runs one decomposition and returns its seconds, measured in the process."""
        return float(self._ask("run")["seconds"])

    def result(self) -> Result:
        """Runs one decomposition and returns its arrays."""
        self._ask("write")
        arrays = load_file(self._answer)
        return Result(arrays["embedding"], arrays["attentions"], arrays["mlps"])

    def peak(self) -> dict[str, float]:
        """``loaded_mb`` and ``peak_mb`` of the process after loading; ``device_peak_mb`` with an accelerator."""
        return {key: float(value) for key, value in self._ask("peak").items()}


def to(result: Result, device: torch.device) -> Result:
    """Moves a result to a device."""
    return Result(result.embedding.to(device), result.attentions.to(device), result.start_and_mlps.to(device))
