"""Every kernel in every configuration compiles for GPUs that are not here, without spills, on tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT

from benchmarks import compiled

FOUND = compiled.Compiled("k", "64w4s2", 90, 100, 0, 1024, 2, 4, 500, 8)


def line(products: bool = True, **changes: int) -> compiled.Line:
    return compiled.Line("op", "case", products, compiled.Compiled(**{**FOUND.to_json(), **changes}))


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "benchmarks.compiled", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_generation(tmp_path: Path) -> None:
    """The committed table is of this run: what a kernel becomes changes with Triton, its rules do not."""
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    launches = json.loads((tmp_path / "compiled.json").read_text())["launches"]
    assert {each["capability"] for each in launches} == {80, 90, 100}
    assert all(each["faults"] == [] for each in launches)
    committed = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())["launches"]
    named = [
        {(e["operation"], e["case"], e["config"], e["capability"]) for e in each} for each in (launches, committed)
    ]
    assert named[0] == named[1], "run `python -m benchmarks.compiled` and commit its table"


def test_every_operation_with_a_kernel_is_in_the_table() -> None:
    from clipfast.kernels.dispatch import BACKENDS

    triton = next(backend for backend in BACKENDS if backend.name == "triton")
    committed = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())["launches"]
    # The values of text_maps_from_tokens are formed by torch, its maps by text_maps.
    assert {each["operation"] for each in committed} == set(triton.implementations()) - {"text_maps_from_tokens"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spills": 1}, "1 spills"),
        ({"shared": 228 * 1024}, f"{228 * 1024} bytes of shared memory"),
        ({"tensor_cores": 0}, "no tensor-core instruction"),
        ({"instructions": 3}, "an empty body"),
    ],
)
def test_what_breaks_a_rule_is_said(changes: dict[str, int], said: str) -> None:
    assert compiled.faults(line()) == []
    assert compiled.faults(line(**changes)) == [said]


def test_vector_kernels_need_no_tensor_cores() -> None:
    assert compiled.faults(line(products=False, tensor_cores=0)) == []


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        (32, 4, 0, 16),
        (128, 4, 0, 4),
        (255, 8, 0, 1),
        (64, 4, 100 * 1024, 2),
        (64, 4, 113 * 1024, 2),
        (64, 4, 115 * 1024, 1),
    ],
)
def test_programs_per_multiprocessor(registers: int, warps: int, shared: int, programs: int) -> None:
    """65,536 registers, 64 warps and 228 KB of shared memory, of which each program takes 1 KB more."""
    assert compiled.resident(registers, warps, shared, 90) == programs


@pytest.mark.slow
def test_nothing_is_compiled_where_triton_interprets() -> None:
    done = run(interpret=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.compiled: TRITON_INTERPRET is set: unset it to compile\n"
