"""The published code, side by side: a checkout of it runs in a process of its own.

The checkout (github.com/yossigandelsman/clip_prs) is a folder of scripts whose packages are called ``utils`` and
``prs_hook``: it must be first on ``sys.path`` and must not share a process with anything else. The process is kept
alive and asked for one run at a time, so that runs of both sides still interleave; it measures nothing but itself.
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

    Use as a context manager. ``seconds`` of the last run is the time the process itself measured.
    """

    def __init__(
        self, checkout: Path, name: str, visual: Any, images: Tensor, *, spatial: bool, threads: int, folder: Path
    ) -> None:
        device = str(images.device)
        self._answer = folder / "answer.safetensors"
        given = folder / "given.safetensors"
        weights = {f"visual.{key}": tensor.cpu().contiguous() for key, tensor in visual.state_dict().items()}
        save_file(weights | {"images": images.cpu()}, given)
        request: dict[str, Any] = {"model": name, "given": str(given), "answer": str(self._answer)}
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
            if line.startswith("{"):  # anything else is the published code's own printing
                return dict(json.loads(line))
        _, said = self._process.communicate()
        raise ReferenceFailed(f"the published code stopped: {(said.strip().splitlines() or ['no message'])[-1]}")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _read says why it ended
            print(word, file=self._process.stdin, flush=True)
        return self._read()

    def run(self) -> float:
        """One decomposition; the process's own seconds."""
        return float(self._ask("run")["seconds"])

    def result(self) -> Result:
        """One decomposition, with its arrays."""
        self._ask("write")
        arrays = load_file(self._answer)
        return Result(arrays["embedding"], arrays["attentions"], arrays["mlps"])

    def peak(self) -> dict[str, float]:
        """``loaded_mb`` and ``peak_mb`` of the process since it loaded, ``device_peak_mb`` with an accelerator."""
        return {key: float(value) for key, value in self._ask("peak").items()}


def to(result: Result, device: torch.device) -> Result:
    """A result on another device."""
    return Result(result.embedding.to(device), result.attentions.to(device), result.start_and_mlps.to(device))
