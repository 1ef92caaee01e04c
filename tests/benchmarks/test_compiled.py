"""Every kernel configuration compiles without a GPU, uses tensor cores and spills no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT

from benchmarks import compiled
from clipfast.kernels.launch import Config, Launch

GOOD = compiled.Compiled("k", "64w4s2", 90, 100, 0, 1024, 2, 4, 500, 8)


def line(products: bool = True, **changes: int) -> compiled.Line:
    return compiled.Line("op", "case", products, compiled.Compiled(**{**GOOD.to_json(), **changes}))


COMMITTED = ROOT / "benchmarks" / "results"


def python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    return python("-m", "benchmarks.compiled", *arguments, interpret=interpret)


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compiled.json").read_text())


@pytest.mark.slow
def test_a_case_of_every_kernel_configuration_and_dtype_compiles_for_every_generation() -> None:
    """The committed table has all cases of today; its figures may differ with the version of Triton."""
    process = run("--sample")
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert all(launch["faults"] == [] for launch in table(COMMITTED)["launches"])


@pytest.mark.slow
def test_the_sample_has_every_kernel_and_every_configuration_of_its_own() -> None:
    code = """
from benchmarks import compiled
for capability in compiled.CAPABILITIES:
    sides = [make(capability) for make in (compiled._distinct, compiled._sample)]
    kernels = [{each.launch.kernel for each in side} for side in sides]
    kinds = [{(each.launch.kernel, str(each.launch.config)) for each in side} for side in sides]
    same = kernels[0] == kernels[1] and (kinds[0] == kinds[1] or capability in compiled.UNTUNED)
    print(same, len(sides[1]) < len(sides[0]))
"""
    process = python("-c", code)
    assert process.stdout.split() == ["True"] * 2 * len(compiled.CAPABILITIES), process.stderr[-2000:]


@pytest.mark.slow
def test_a_table_of_other_launches_is_noticed(tmp_path: Path) -> None:
    changed = table(COMMITTED)
    changed["launches"][0]["case"] = "N=50 E=64 fp8"
    (tmp_path / "compiled.json").write_text(json.dumps(changed))
    counts = ", ".join(f"outdated(Path({str(folder)!r}), [80])" for folder in (COMMITTED, tmp_path))
    process = python("-c", f"from pathlib import Path; from benchmarks.compiled import outdated; print({counts})")
    assert process.stdout == "0 2\n"


def test_every_operation_with_a_kernel_is_in_the_table() -> None:
    from clipfast.kernels.dispatch import BACKENDS

    triton = next(backend for backend in BACKENDS if backend.name == "triton")
    committed = table(COMMITTED)["launches"]
    # text_maps_from_tokens computes its values in torch and its maps with text_maps.
    assert {line["operation"] for line in committed} == set(triton.implementations()) - {"text_maps_from_tokens"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spills": 1}, "1 spills"),
        ({"shared": 228 * 1024}, f"{228 * 1024} bytes of shared memory"),
        ({"tensor_cores": 0}, "no tensor-core instruction"),
        ({"instructions": 3}, "an empty body"),
    ],
)
def test_faults_name_the_broken_rule(changes: dict[str, int], fault: str) -> None:
    assert compiled.faults(line()) == []
    assert compiled.faults(line(**changes)) == [fault]


@pytest.mark.parametrize("capability", compiled.UNTUNED)
def test_what_no_configuration_is_made_for_may_spill_but_must_fit(capability: int) -> None:
    assert compiled.faults(line(capability=capability, spills=9)) == []
    assert compiled.faults(line(capability=capability, spills=9, shared=100 * 1024)) == [
        "102400 bytes of shared memory"
    ]
    assert compiled.faults(line(capability=capability, tensor_cores=0)) == ["no tensor-core instruction"]


AMD_CODE = """
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[4:5], v[6:7], a[0:15]
\tglobal_load_dwordx4 v[0:3], v[0:1], off
\ts_endpgm
; %bb.0:
    .vgpr_count:     100
    .vgpr_spill_count: 3
"""


def test_figures_of_amds_assembly() -> None:
    launch = Launch(lambda: None, (1,), {}, {}, Config({"BLOCK": 64}, warps=4, stages=3))
    have = compiled.for_amd(launch, AMD_CODE, shared=20 * 1024, warps=4)
    assert (have.registers, have.spills, have.tensor_cores, have.instructions, have.wide_loads) == (100, 3, 2, 4, 1)
    assert (have.shared, have.programs, have.config) == (20 * 1024, 3, "64w4s3")


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
    """65,536 registers, 64 warps and 228 KB of shared memory; each program takes 1 KB more than it requests."""
    assert compiled.resident(registers, warps, shared, 90) == programs


@pytest.mark.parametrize(
    ("capability", "registers", "warps", "shared", "programs"),
    [
        (120, 32, 4, 0, 12),  # 48 warps
        (120, 168, 4, 0, 3),
        (120, 32, 4, 40 * 1024, 2),
        (compiled.GFX942, 64, 4, 0, 8),  # 4 x 8 warps of 64 threads
        (compiled.GFX942, 128, 4, 0, 4),
        (compiled.GFX942, 256, 8, 0, 1),
        (compiled.GFX942, 64, 4, 20 * 1024, 3),
    ],
)
def test_programs_per_multiprocessor_elsewhere(
    capability: int, registers: int, warps: int, shared: int, programs: int
) -> None:
    assert compiled.resident(registers, warps, shared, capability) == programs


@pytest.mark.slow
def test_command_is_rejected_with_the_interpreter() -> None:
    process = run(interpret=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "benchmarks.compiled: TRITON_INTERPRET is set: unset it to compile\n"
