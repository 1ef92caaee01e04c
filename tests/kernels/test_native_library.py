"""The library in C++: what is said when it cannot be used, or cannot compute with given tensors."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import ROOT
from contracting import draw
from measures import error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import dispatch, native, ops, reference

BUILT = pytest.mark.skipif(bool(native.refusals()), reason="; ".join(native.refusals()))
SPAN = (draw(0, 5, 100, 12), draw(1, 5, 12, 12), 12)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    monkeypatch.delenv(native.OTHER, raising=False)
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
    assert choice.skipped["native"] == native.refusals()


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


def test_a_library_of_another_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "other.so"
    monkeypatch.setenv(native.OTHER, str(other))
    assert_refused(f"CLIPFAST_NATIVE_LIBRARY is '{other}', and there is no such file$")
    other.write_text("x", encoding="utf-8")
    native.load.cache_clear()
    assert_refused(r"other.so cannot be loaded \(OSError: ")
    if not (ROOT / "kernels" / "_native.so").is_file():
        return
    shutil.copyfile(ROOT / "kernels" / "_native.so", other)
    native.load.cache_clear()
    assert native.refusals() == []
    assert native.path() == other


@pytest.mark.skipif(native.OTHER not in os.environ, reason="no library was named")
def test_the_library_that_was_named_is_the_one_under_test() -> None:
    """``make sanitize`` names one, and must not pass because it cannot be loaded and all tests are skipped."""
    assert native.refusals() == []
    assert str(native.path()) in Path("/proc/self/maps").read_text(encoding="utf-8")


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


# ---------------------------------------------------------------------------------- what it cannot read or change


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


NORM = torch.ones(8), torch.zeros(8), 1e-5


def layer_norm(x: Tensor, backend: str = "native") -> Tensor:
    return ops.add_layer_norm(x, None, *NORM, backend=backend)


@BUILT
def test_tensors_without_memory_of_their_own() -> None:
    """torch hands out tensors at no address, which only its own operations can read."""
    x = draw(0, 3, 4, 8)
    want = torch.nn.functional.layer_norm(x, (8,))
    for transformed in (torch.vmap, torch.func.functionalize):
        with pytest.raises(dispatch.BackendUnavailable, match="x has no memory of its own"):
            transformed(layer_norm)(x)
        have = transformed(lambda x: layer_norm(x, "auto"))(x)
        assert error(have, want) <= OP_FLOAT32
    for unwritten in (torch._efficientzerotensor((4, 8)), torch.zeros(4, 8).to_sparse(), torch.zeros(4, 8).to_mkldnn()):
        with pytest.raises(dispatch.BackendUnavailable, match="x has no memory of its own"):
            layer_norm(unwritten)


@BUILT
def test_what_would_change_while_it_is_read_is_refused() -> None:
    """Rows that overlap, and a term that lies in the stream's own memory: threads would race for them."""
    memory = draw(0, 40)
    with pytest.raises(dispatch.BackendUnavailable, match=r"x has strides \[4, 1\]$"):
        layer_norm(memory.as_strided((5, 8), (4, 1)))
    x, delta = memory[:32].view(4, 8), memory[8:].view(4, 8)
    with pytest.raises(dispatch.BackendUnavailable, match=r"delta shares memory with x$"):
        ops.add_layer_norm(x, delta, *NORM, backend="native")
    for beside in (memory[8:16].view(1, 8), memory.clone()[8:16].view(1, 8)):
        row = memory[:8].view(1, 8)
        want = row + beside
        ops.add_layer_norm(row, beside, *NORM, backend="native")
        assert torch.equal(row, want)
    want = memory[:8].view(1, 8) * 2
    ops.add_layer_norm(memory[:8].view(1, 8), memory[:8].view(1, 8), *NORM, backend="native")
    assert torch.equal(memory[:8].view(1, 8), want)


@BUILT
def test_codes_that_are_no_floating_point_numbers_are_left_to_others() -> None:
    """Of 2⁵³ float32, to which smaller formats are widened, would keep 24 bits."""
    codes, shared, centre = torch.full((1, 1, 1), 2**53 - 1), torch.zeros(1, 0), torch.zeros(1, 1)
    total, second = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    with pytest.raises(dispatch.BackendUnavailable, match=r"codes is torch.int64$"):
        ops.moments(codes, shared, centre, total, second, backend="native")
    ops.moments(codes, shared, centre, total, second)
    assert total.item() == 2**53 - 1


@BUILT
@pytest.mark.parametrize("unit", [1, 1e-160, 1e-200, 1e200])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e160, 1e300])
def test_variances_beyond_what_float64_holds_end_the_picks(scale: float, unit: float) -> None:
    """Squares that overflow or vanish, of texts or of all: no crash, no endless loop, no pick twice."""
    texts, factor = SPAN[0].double() * scale, SPAN[1].double() * unit
    picks, variance, _ = ops.span(texts, factor, 12, backend="native")
    for row in picks.tolist():
        picked = [pick for pick in row if pick >= 0]
        assert len(picked) == len({*picked})
        assert row == picked + [-1] * (12 - len(picked))
    assert not variance[picks < 0].any()
