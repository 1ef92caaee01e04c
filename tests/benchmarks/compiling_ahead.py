"""Run by ``test_compiled_ahead.py`` where Triton compiles and does not interpret; prints what happened as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiled import offline
from clipfast.kernels import measuring, tuning
from clipfast.kernels.layer_norm import triton as layer_norm

X = torch.empty(2, 3, 704, dtype=torch.bfloat16, device="meta")
WEIGHT = torch.empty(704, dtype=torch.bfloat16, device="meta")
ARGUMENTS = [X, None, WEIGHT, WEIGHT, 1e-5]
WAYS: dict[tuple[str, str], Any] = {("triton", label): run for label, run in layer_norm.variants(*ARGUMENTS)}


def compiled() -> int:
    """Kernels that Triton has at hand for the GPU that is compiled for."""
    return len(layer_norm._add_layer_norm_kernel.device_caches[90][0])


def broken(*arguments: Any) -> None:
    """A way that cannot be compiled."""
    raise RuntimeError("no such kernel")


def main() -> None:
    """Compiles the ways of one operation, first one and then all, one of which fails."""
    known = tuning.Choices(Path(sys.argv[1]) / "here.json")
    seen: dict[str, Any] = {"ways": len(WAYS)}
    with offline(90):
        first = dict([next(iter(WAYS.items()))])
        with measuring.compiling() as submit:
            submit({("triton", "broken"): broken} | first, ARGUMENTS)
        seen["one"] = compiled()
        with tuning.compiling_ahead():
            found = [tuning.fastest("add_layer_norm", ARGUMENTS, WAYS, known=known) for _ in range(2)]
            seen["postponed inside"] = tuning.postponed(X.device)
        seen["all"] = compiled()
    seen["postponed outside"] = tuning.postponed(X.device)
    seen["decided"] = bool(known.items()) or found != [(next(iter(WAYS)), False)] * 2
    print(json.dumps(seen))


main()
