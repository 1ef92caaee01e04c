"""The library in C++: what is said when it cannot be used, and that threads and instruction sets change nothing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import ROOT
from contracting import draw
from torch import Tensor

from clipfast.kernels import dispatch, native, ops, reference

BUILT = pytest.mark.skipif(bool(native.refusals()), reason="; ".join(native.refusals()))
SPAN = (draw(0, 5, 100, 12), draw(1, 5, 12, 12), 12)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for name in ("LIBRARY", "FAILURE"):
        monkeypatch.setattr(native, name, kernels / getattr(native, name).name)
    monkeypatch.setattr(native, "HERE", kernels)
    native.load.cache_clear()
    yield kernels
    native.load.cache_clear()


def assert_refused(reason: str) -> None:
    """It is said once and for all, and what ``auto`` computes is computed elsewhere."""
    assert native.isa() == ""
    with pytest.raises(dispatch.BackendUnavailable, match=f"^native: {reason}"):
        ops.span(*SPAN, backend="native")
    choice = dispatch.choose("span", [*SPAN, 1e-10])
    assert choice.backend == "eager"
    assert choice.refused["native"] == native.refusals()


def test_a_library_that_was_not_built(place: Path) -> None:
    assert_refused(r"_native.so was not built: install the package \(pip install -e \. in a checkout\)$")


def test_a_build_that_failed(place: Path) -> None:
    native.FAILURE.write_text("no compiler\n", encoding="utf-8")
    assert_refused("its build failed: no compiler$")


def test_a_file_that_is_no_library(place: Path) -> None:
    native.LIBRARY.write_text("x", encoding="utf-8")
    assert_refused(r"_native.so cannot be loaded \(OSError: ")


@BUILT
def test_sources_that_were_changed_after_the_build(place: Path, tmp_path: Path) -> None:
    shutil.copyfile(ROOT / "kernels" / "_native.so", native.LIBRARY)
    source = tmp_path / "csrc" / "span.cpp"
    source.parent.mkdir()
    source.touch()
    os.utime(source, (0, 0))
    assert native.refusals() == []
    native.load.cache_clear()
    os.utime(native.LIBRARY, (0, 0))
    source.touch()
    assert_refused("csrc/ was changed after the build")


@BUILT
def test_an_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "mmx")
    native.load.cache_clear()
    try:
        assert_refused("CLIPFAST_NATIVE_ISA is 'mmx': choose one of generic, avx2, avx512, avx512_bf16$")
        monkeypatch.setenv(native.VARIABLE, "generic")
        native.load.cache_clear()
        assert native.isa() == "generic"
    finally:
        native.load.cache_clear()
        native.limit(native.ISAS[-1])


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_the_reason(tmp_path: Path, compiler: str) -> None:
    if not has_setuptools():
        pytest.skip("the setuptools here are too old to build with")
    built, objects = tmp_path / "lib", tmp_path / "temp"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", built, "-t", objects],
        cwd=ROOT,
        env=os.environ | {"CC": compiler, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reason = (built / "clipfast" / "kernels" / native.FAILURE.name).read_text(encoding="utf-8")
    assert compiler in reason
    assert len(reason.splitlines()) == 1


def test_sdist_and_wheel_carry_the_library(tmp_path: Path) -> None:
    """From the sdist, which must hold the sources, and run from a folder that has nothing else of the checkout."""
    if not has_setuptools():
        pytest.skip("the setuptools here are too old to build with")
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(
        ".*", "build", "dist", "out", "runs", "*.egg-info", "_native*", "_cuda*", "model", "*.png"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], source)
    sdist = next(tmp_path.glob("clipfast-*.tar.gz"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]
    wheel_of = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path, sdist]
    run(wheel_of, tmp_path, CLIPFAST_CUDA="0")
    wheel = next(tmp_path.glob("clipfast-*.whl"))
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    installed = tmp_path / "installed"
    run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], tmp_path)
    script = "from clipfast.kernels import native; print(native.LIBRARY, native.refusals(), native.isa())"
    done = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(installed))
    expected = installed / "clipfast" / "kernels" / native.LIBRARY.name
    if native.refusals():  # no compiler here: then there was none for the wheel
        assert "its build failed" in done
    else:
        assert done.split()[:2] == [str(expected), "[]"]


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def has_setuptools() -> bool:
    try:
        return importlib.util.find_spec("setuptools.command.bdist_wheel") is not None
    except ModuleNotFoundError:
        return False


# ------------------------------------------------------------------------------------ one answer


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def moments(codes: Tensor, shared: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    groups, columns = centre.shape
    total, second = (torch.zeros(groups, *[columns] * n, dtype=torch.float64) for n in (1, 2))
    ops.moments(codes, shared, centre, total, second, backend="native")
    return total, second


COMPUTATIONS: dict[str, Callable[[], tuple[Tensor | None, ...]]] = {
    "span": lambda: ops.span(*SPAN, backend="native"),
    "add_layer_norm": lambda: (
        ops.add_layer_norm(draw(0, 60, 700), draw(1, 60, 700), draw(2, 700), draw(3, 700), 1e-5, backend="native"),
    ),
    "attention": lambda: ops.attention(draw(0, 3, 19, 3, 2, 24), "mean", backend="native"),
    "linear_activation": lambda: (
        ops.linear_activation(draw(0, 60, 3), draw(1, 700, 3), draw(2, 700), "gelu", backend="native"),
    ),
    "moments": lambda: moments(draw(0, 300, 7, 20), draw(1, 300, 3), draw(2, 7, 23)),
}


@BUILT
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_the_number_of_threads_changes_nothing(name: str, threads: None) -> None:
    torch.set_num_threads(1)
    want = COMPUTATIONS[name]()
    for count in range(2, (os.cpu_count() or 1) + 3):
        torch.set_num_threads(count)
        for have, one in zip(COMPUTATIONS[name](), want, strict=True):
            assert torch.equal(have, one)


@BUILT
def test_memory_that_does_not_hold_what_a_tensor_says() -> None:
    """A negated view; a tensor of another device. Computed wrongly they would look like any other."""
    texts, factor, size = SPAN
    negated = torch.complex(torch.zeros_like(texts), texts).conj().imag
    assert negated.is_neg()
    with pytest.raises(dispatch.BackendUnavailable, match=r"^native cannot compute span: texts is a negated view$"):
        ops.span(negated, factor, size, backend="native")
    with pytest.raises(dispatch.BackendUnavailable, match=r"^native cannot compute span: texts is on meta, factor is"):
        ops.span(texts.to("meta"), factor.to("meta"), size, backend="native")
    want = reference.span(-texts.double(), factor.double(), size, 1e-10)[0]
    assert ops.span(negated, factor, size)[0].tolist() == want.tolist()


@BUILT
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e300])
def test_variances_beyond_what_float64_holds_end_the_picks(scale: float) -> None:
    """Squares that overflow or vanish: no crash, no endless loop, no pick twice."""
    texts, factor = SPAN[0].double() * scale, SPAN[1].double()
    picks, variance, _ = ops.span(texts, factor, 12, backend="native")
    for row in picks.tolist():
        picked = [pick for pick in row if pick >= 0]
        assert len(picked) == len({*picked})
        assert row == picked + [-1] * (12 - len(picked))
    assert not variance[picks < 0].any()
