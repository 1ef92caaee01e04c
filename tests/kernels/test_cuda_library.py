"""The library in CUDA: what is said when there is none, how it is built, and its machine code. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from builders import ROOT

from clipfast.kernels import cuda, dispatch, manifest

NVCC = shutil.which("nvcc")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    kernels = tmp_path / "clipfast" / "kernels"
    kernels.mkdir(parents=True)
    for name in ("LIBRARY", "FAILURE"):
        monkeypatch.setattr(cuda, name, kernels / getattr(cuda, name).name)
    monkeypatch.setattr(cuda, "HERE", kernels)
    cuda.forget()
    dispatch.forget()
    yield kernels
    cuda.forget()
    dispatch.forget()


def test_a_library_that_was_not_built_is_missed_where_there_is_a_gpu(place: Path) -> None:
    reason = "_cuda.so was not built: install the package where nvcc is on the PATH or in CUDA_HOME"
    assert cuda.load().reason == reason
    assert cuda.unsupported_reasons() == [reason if torch.cuda.is_available() else "no GPU"]


def test_a_build_that_failed_is_told_everywhere(place: Path) -> None:
    cuda.FAILURE.write_text("nvcc failed\n", encoding="utf-8")
    assert cuda.unsupported_reasons()[-1] == "its build failed: nvcc failed"


def test_a_file_that_is_no_library(place: Path) -> None:
    cuda.LIBRARY.write_text("x", encoding="utf-8")
    manifest.write(cuda.LIBRARY, place)
    assert cuda.load().reason.startswith("_cuda.so cannot be loaded (OSError: ")


def test_truncated_library_is_not_mapped(place: Path) -> None:
    cuda.LIBRARY.write_bytes(bytes(1000))
    manifest.write(cuda.LIBRARY, place)
    cuda.LIBRARY.write_bytes(bytes(999))
    assert cuda.load().reason.startswith("_cuda.so is damaged: it has 999 bytes, its build left 1,000: ")


def test_sources_that_were_changed_after_the_build(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "csrc" / "cuda" / "span.cu"
    source.parent.mkdir(parents=True)
    source.touch()
    cuda.LIBRARY.write_text("x", encoding="utf-8")
    manifest.write(cuda.LIBRARY, source.parent)
    source.write_text("// changed", encoding="utf-8")
    assert cuda.load().reason.startswith("cuda/ was changed after _cuda.so was built: install the package again")


# ------------------------------------------------------------------------------------ the build


def build(folder: Path, *command: str, nvcc: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with a compiler for C++ that fails, and an nvcc that is such a shell script, or none."""
    home = folder / "home"
    (home / "bin").mkdir(parents=True)
    if nvcc is not None:
        script = home / "bin" / "nvcc"
        script.write_text(f"#!/bin/sh\n{nvcc}\n", encoding="utf-8")
        script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "CLIPFAST_CUDA"}
    environment = kept | {"CC": "false", "CXX": "false", "CUDA_HOME": str(home)} | variables
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


FAILS = "echo 'nvcc fatal   : no such architecture' >&2; exit 1"
WORKS = 'while [ "$1" != -o ]; do shift; done; echo library >"$2"'
ASKED = "CLIPFAST_CUDA=1 asks for it, and nvcc is neither in CUDA_HOME nor on the PATH"
BUILDS = [
    pytest.param(None, "", None, id="no nvcc"),
    pytest.param(None, "1", ASKED, id="no nvcc, asked for"),
    pytest.param(FAILS, "", "nvcc failed: nvcc fatal : no such architecture", id="nvcc fails"),
    pytest.param(FAILS, "0", None, id="not wanted"),
    pytest.param(WORKS, "yes", "CLIPFAST_CUDA is 'yes': expected 0 or 1", id="neither 0 nor 1"),
]


@pytest.mark.parametrize(("nvcc", "wanted", "reason"), BUILDS)
def test_what_a_build_without_the_library_leaves(
    tmp_path: Path, nvcc: str | None, wanted: str, reason: str | None
) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="the setuptools here are too old to build with")
    command = "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")
    done = build(tmp_path, *command, nvcc=nvcc, CLIPFAST_CUDA=wanted)
    built = tmp_path / "lib" / "clipfast" / "kernels"
    assert not (built / cuda.LIBRARY.name).exists()
    failure = built / cuda.FAILURE.name
    if reason is None:
        assert not failure.exists()
        assert "cuda" not in (done.stdout + done.stderr).lower()
    else:
        assert failure.read_text(encoding="utf-8") == f"{reason} (pip install -v shows more)\n"


def test_sdist_and_wheel_carry_sources_and_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="the setuptools here are too old to build with")
    folder = str(tmp_path / "base")
    command = "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path), "build", "-b", folder, "bdist_wheel"
    build(tmp_path, *command, "-d", str(tmp_path), nvcc=WORKS)
    [sdist], [wheel] = tmp_path.glob("clipfast-*.tar.gz"), tmp_path.glob("clipfast-*.whl")
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {"csrc/cuda/span.cu", "csrc/cuda/span_kernel.h"} <= inside
    with zipfile.ZipFile(wheel) as file:
        inside = {*file.namelist()}
        assert file.read("clipfast/kernels/_cuda.so") == b"library\n"
    assert "clipfast/kernels/_native_failed.txt" in inside
    assert "clipfast/kernels/_cuda_failed.txt" not in inside


# ------------------------------------------------------------------------------------ the machine code


@pytest.fixture(scope="module")
def library() -> Path:
    """What was built when the package was installed here; it must have been where there is nvcc."""
    if NVCC is None or os.environ.get("CLIPFAST_CUDA") == "0":
        pytest.skip("no nvcc on the PATH" if NVCC is None else "CLIPFAST_CUDA=0 leaves the library out")
    assert cuda.load().reason == ""
    return cuda.LIBRARY


def run(tool: str, *arguments: str | Path, folder: Path | None = None) -> str:
    result = shutil.which(tool, path=f"{TOOLS}:{os.environ['PATH']}")
    if result is None:
        pytest.skip(f"no {tool}")
    done = subprocess.run([result, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_it_is_machine_code_for_hopper_alone(library: Path) -> None:
    """Listed with what it was compiled for; beside it is what comes with CUDA's runtime, which is no code."""
    names = re.findall(r"sm_\w+|compute_\w+", run("cuobjdump", "-lelf", "-lptx", library))
    assert {*names} == {"sm_90a"}


def test_no_register_is_spilled_and_three_blocks_fit_on_a_multiprocessor(library: Path) -> None:
    told = run("cuobjdump", "-res-usage", library)
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert len(usage) == 2  # texts in float32, and in float64
    for name, registers, stack, local in usage:
        assert "span_heads" in name
        assert int(registers) * 256 * 3 <= 65536
        assert stack == local == "0"


def most_products(code: str) -> tuple[int, int]:
    """Fused multiply-adds and conversions in the loop that has most of both."""
    loops = [(loop.count("DFMA"), loop.count("F2F.F64.F32")) for loop in re.split(r"^\.L_x_\d+:", code, flags=re.M)]
    return max(loops, key=min)


def test_a_cluster_waits_for_its_blocks_and_a_loop_holds_products_alone(library: Path, tmp_path: Path) -> None:
    run("cuobjdump", "-xelf", "all", library, folder=tmp_path)
    codes = [run("nvdisasm", "-c", file) for file in tmp_path.glob("*.cubin")]
    code = next(text for text in codes if "span_heads" in text)
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert "UCGABAR_ARV" in code  # arrives at a barrier of the cluster
    assert "UCGABAR_WAIT" in code
    assert "SR_CgaCtaId" in code  # where shared memory of the cluster's blocks begins
    assert re.search(r"\bLD\.E", code)  # a text, from the block that has it
    assert re.search(r"\bST\.E", code)  # to other blocks; to its own it is STS
    assert most_products(code) == (16, 8)  # of two texts and four coordinates, as benchmarks.span_costs counts
