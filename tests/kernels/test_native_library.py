"""The library in C++: the reasons when it cannot be loaded or cannot compute with given tensors, and its bindings."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT
from contracting import draw
from measures import error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import dispatch, manifest, native, ops, reference

BUILT = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))


def forget() -> None:
    """Loads the library anew, and chooses anew."""
    native.load.cache_clear()
    dispatch.forget()


SPAN = (draw(0, 5, 100, 12), draw(1, 5, 12, 12), 12)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
    kernels = tmp_path / "clipfast" / "kernels"
    kernels.mkdir(parents=True)
    for name in ("LIBRARY", "FAILURE"):
        monkeypatch.setattr(native, name, kernels / getattr(native, name).name)
    monkeypatch.setattr(native, "HERE", kernels)
    forget()
    yield kernels
    forget()


@pytest.fixture
def copied(folder: Path) -> Path:
    """A copy of the built library and its record in that folder. A test that loads it must not change it afterwards."""
    built = ROOT / "clipfast" / "kernels" / native.LIBRARY.name
    if not built.is_file():
        pytest.skip("the library was not built")
    shutil.copyfile(built, native.LIBRARY)
    shutil.copyfile(manifest.path_for(built), manifest.path_for(native.LIBRARY))
    return native.LIBRARY


def assert_unsupported(reason: str) -> None:
    """A named backend gives the reason, and ``auto`` takes another."""
    assert native.isa() == ""
    with pytest.raises(dispatch.BackendUnavailable, match=f"^native: {reason}"):
        ops.span(*SPAN, backend="native")
    choice = dispatch.choose("span", [*SPAN, 1e-10])
    assert choice.backend == "eager"
    assert choice.skipped["native"] == native.unsupported_reasons()


NAME = re.escape(native.LIBRARY.name)


def test_library_not_built(folder: Path) -> None:
    assert_unsupported(rf"{NAME} was not built: install the package \(pip install -e \. in a checkout\)$")


def test_failed_build(folder: Path) -> None:
    native.FAILURE.write_text("no compiler\n", encoding="utf-8")
    assert_unsupported("its build failed: no compiler$")


def test_truncated_library_is_not_mapped(copied: Path) -> None:
    """Mapping one that is cut off ends the process with SIGBUS."""
    size = copied.stat().st_size
    for kept in (size - 1, size // 2, 4096, 0):
        with copied.open("r+b") as file:
            file.truncate(kept)
        forget()
        assert_unsupported(
            rf"{NAME} is damaged: it has {kept:,} bytes, its build left {size:,}: install the package again"
        )


@pytest.mark.slow
@BUILT
def test_doctor_reports_a_truncated_library_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, which used to end with SIGBUS."""
    installed = tmp_path / "clipfast" / "kernels"
    ignored = shutil.ignore_patterns("__pycache__", "_native*", "_cuda*")
    shutil.copytree(ROOT / "clipfast", installed.parent, ignore=ignored)
    built = ROOT / "clipfast" / "kernels" / native.LIBRARY.name
    (installed / built.name).write_bytes(built.read_bytes()[:100_000])
    shutil.copyfile(manifest.path_for(built), manifest.path_for(installed / built.name))
    script = "import sys; from clipfast.cli import main; sys.argv[1:] = ['doctor', '--json']; main()"
    environment = {name: value for name, value in os.environ.items() if name != native.LIBRARY_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [reason] = json.loads(done.stdout)["backends"]["native"]
    assert "is damaged: it has 100,000 bytes" in reason
    assert len(reason.splitlines()) == 1


def test_library_with_a_changed_byte_is_not_loaded(copied: Path) -> None:
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 1
    copied.write_bytes(content)
    assert_unsupported(f"{NAME} is damaged: its bytes are not those of its build: install the package again")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is missing"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"size": 1}', "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_library_without_a_usable_record_is_not_loaded(copied: Path, content: bytes | None, problem: str) -> None:
    record = manifest.path_for(copied)
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    assert_unsupported(f"{re.escape(record.name)}, the record of its build, {problem}: install the package again")


def test_recorded_file_that_is_not_a_library(folder: Path) -> None:
    native.LIBRARY.write_text("x", encoding="utf-8")
    manifest.write(native.LIBRARY, folder)
    assert_unsupported(rf"{NAME} cannot be loaded \(ImportError: ")


def test_sources_changed_after_the_build(copied: Path, tmp_path: Path) -> None:
    """Their contents count, not their times, which a checkout sets anew."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "span.cpp"
    source.touch()
    assert native.unsupported_reasons() == []
    forget()
    source.write_bytes(source.read_bytes() + b"\n")
    assert_unsupported(f"csrc/ was changed after {NAME} was built: install the package again")


def test_library_named_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder / "other.so"
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(other))
    assert_unsupported(f"CLIPFAST_NATIVE_LIBRARY is '{other}', and there is no such file$")
    other.write_text("x", encoding="utf-8")
    forget()
    assert_unsupported(r"other.so cannot be loaded \(ImportError: ")
    built = ROOT / "clipfast" / "kernels" / native.LIBRARY.name
    if not built.is_file():
        return
    shutil.copyfile(built, other)
    forget()
    assert native.unsupported_reasons() == []
    assert native.path() == other


@pytest.mark.skipif(native.LIBRARY_VARIABLE not in os.environ, reason="no library is named")
def test_named_library_is_the_one_under_test() -> None:
    """``make sanitize`` names one, and must not pass because it cannot be loaded and all tests are skipped."""
    assert native.unsupported_reasons() == []
    assert str(native.path()) in Path("/proc/self/maps").read_text(encoding="utf-8")


@BUILT
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    forget()
    try:
        assert_unsupported("CLIPFAST_NATIVE_ISA is 'mmx': choose one of generic, avx2, avx512, avx512_bf16$")
        monkeypatch.setenv(native.ISA_VARIABLE, "generic")
        forget()
        assert native.isa() == "generic"
    finally:
        forget()
        native.limit(native.ISAS[-1])


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_failing_compiler_leaves_its_reason(tmp_path: Path, compiler: str) -> None:
    if not can_build():
        pytest.skip("no setuptools or no pybind11 to build with")
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


@pytest.mark.slow
def test_sdist_and_wheel_carry_the_library(tmp_path: Path) -> None:
    """Built from the sdist, which must contain the sources, and run outside the checkout."""
    if not can_build():
        pytest.skip("no setuptools or no pybind11 to build with")
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
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}" in wheel.name  # the library is built for this Python and this platform
    assert not wheel.name.endswith("-any.whl")
    installed = tmp_path / "installed"
    run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], tmp_path)
    script = "from clipfast.kernels import native; print(native.LIBRARY, native.unsupported_reasons(), native.isa())"
    done = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(installed))
    expected = installed / "clipfast" / "kernels" / native.LIBRARY.name
    if native.unsupported_reasons():  # no compiler here: then there was none for the wheel
        assert "its build failed" in done
    else:
        assert done.split()[:2] == [str(expected), "[]"]


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def can_build() -> bool:
    try:
        setuptools = importlib.util.find_spec("setuptools.command.bdist_wheel")
    except ModuleNotFoundError:
        return False
    return setuptools is not None and importlib.util.find_spec("pybind11") is not None


# ------------------------------------------------------------------------------------------------------ bindings


def parameters_in(signature: str) -> list[str]:
    """The names in "f(x: torch.Tensor, heads: torch.Tensor | None) -> None"."""
    return re.findall(r"(?:\(|, )(\w+): ", signature)


@BUILT
def test_signatures_for_type_checkers_are_those_of_the_library() -> None:
    declared = {name: member for name, member in vars(native.Library).items() if not name.startswith("_")}
    bound = {name: member for name, member in vars(native.library()).items() if not name.startswith("_")}
    assert declared.keys() == bound.keys()
    for name, function in declared.items():
        signature = bound[name].__doc__.splitlines()[0]
        assert parameters_in(signature) == list(inspect.signature(function).parameters)[1:], signature


@BUILT
def test_arguments_of_other_types_are_refused() -> None:
    for qkv in (None, 3, [1.0], draw(0, 1, 2, 3, 1, 4).numpy()):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.library().attention_unsupported_reasons(qkv)  # type: ignore[arg-type]


def float32(*shape: int) -> Tensor:
    return torch.zeros(shape)


QKV, OUT, ALPHA = float32(2, 5, 3, 2, 8), float32(2, 5, 2, 8), float32(2, 2, 5)
ROWS = float32(2, 4, 2, 5)


@BUILT
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QKV[0], False, OUT, None), r"qkv has shape \[5, 3, 2, 8\], expected \[\?, \?, 3, \?, \?\]"),
        (
            (QKV[..., ::2], False, OUT[..., :4], None),
            r"qkv has strides .* expected a contiguous last axis; out has str",
        ),
        (
            (QKV, False, OUT.transpose(0, 1), None),
            r"out has shape \[5, 2, 2, 8\], expected \[2, 5, 2, 8\]; out has strides",
        ),
        ((QKV, False, OUT.bfloat16(), None), "out is torch.bfloat16, qkv is torch.float32"),
        (
            (QKV.double(), False, OUT, None),
            "qkv is torch.float64, expected torch.float32, torch.bfloat16 or torch.float16",
        ),
        ((QKV, False, OUT, ALPHA.double()), "alpha is torch.float64, expected torch.float32"),
        ((QKV, False, OUT, ALPHA[:1]), r"alpha has shape \[1, 2, 5\], expected \[2, 2, 5\]"),
        ((QKV, True, OUT, None), "a mean takes alpha and two tokens or more"),
        ((QKV.to("meta"), False, OUT, None), "qkv is on meta"),
        ((QKV, False, torch._neg_view(OUT), None), "out is a negated view"),
    ],
)
def test_wrong_arguments_of_the_library_raise_one_line(arguments: tuple[Any, ...], message: str) -> None:
    """The last line of defence: nothing that Python passes makes the library read or write beside a tensor."""
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        native.library().attention(*arguments)


@BUILT
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QKV[0], ROWS[:, :, 0], ROWS), r"qkv has shape \[5, 3, 2, 8\], expected \[\?, \?, 3, \?, \?\]"),
        ((QKV, ROWS, ROWS), r"weights has shape \[2, 4, 2, 5\], expected \[\?, \?, \?\]"),
        ((QKV, ROWS[:1, :, 0], ROWS), r"weights has shape \[1, 4, 5\], expected \[2, 4, 5\]"),
        ((QKV, ROWS[:, :, 0], ROWS), r"weights has strides"),
        ((QKV, float32(2, 4, 5).double(), ROWS), "weights is torch.float64, expected torch.float32"),
        ((QKV, float32(2, 4, 5), ROWS[:, :3]), r"out has shape \[2, 3, 2, 5\], expected \[2, 4, 2, 5\]"),
        ((QKV, float32(2, 4, 5), ROWS.double()), "out is torch.float64, expected torch.float32"),
        ((QKV[..., ::2], float32(2, 4, 5), ROWS), r"qkv has strides .* expected a contiguous last axis"),
        ((QKV[..., :0], float32(2, 4, 5), ROWS), "queries have no entries"),
    ],
)
def test_wrong_arguments_of_weighted_rows_raise_one_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^weighted_rows: {message}"):
        native.library().weighted_rows(*arguments)


@BUILT
def test_heads_that_do_not_exist_are_refused() -> None:
    alpha, value, basis, out = float32(1, 2, 5), float32(1, 5, 2, 4), float32(2, 4, 32), float32(1, 5, 3)
    for head in (2, -1):
        with pytest.raises(ValueError, match=f"^text_maps: there is no head {head} of 2$"):
            native.library().text_maps(alpha, value, basis, torch.tensor([0, head]), out)


@BUILT
def test_activation_refuses_output_that_it_would_overwrite_while_reading() -> None:
    memory = draw(0, 100)
    x, beside = memory[:40].view(4, 10), memory[5:45].view(4, 10)
    with pytest.raises(ValueError, match=r"^activation: out shares memory with x$"):
        native.library().activation(x, None, None, beside)
    with pytest.raises(ValueError, match=r"^activation: out shares memory with x$"):
        native.library().activation(memory[:16].view(4, 4).T, None, None, memory[:16].view(4, 4))
    with pytest.raises(ValueError, match=r"^activation: there is no activation 'relu'$"):
        native.library().activation(x, None, "relu", x)
    native.library().activation(x, None, "gelu", x)


@BUILT
def test_the_gil_is_released_while_computing() -> None:
    """Another thread runs Python in the meantime."""
    texts, factor = draw(0, 8, 4000, 64).double(), draw(1, 8, 64, 64).double()
    turns, stop = 0, threading.Event()

    def run() -> None:
        nonlocal turns
        while not stop.wait(0.0005):
            turns += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(100):
            before = turns
            ops.span(texts, factor, 64, backend="native")
            if turns - before >= 10:  # between bytecodes it would have one or two
                break
        else:
            pytest.fail("no other thread ran while span was computed")
    finally:
        stop.set()
        thread.join()


@BUILT
def test_memory_that_cannot_be_allocated_is_a_memory_error() -> None:
    """In a process of its own, which may allocate little more than it has."""
    script = """
import resource, torch
from clipfast.kernels import ops
texts, factor = torch.ones(1, 1, 1).expand(1, 3_000_000, 64), torch.eye(64)[None]
ops.span(texts[:, :10], factor, 3, backend="native")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
try:
    ops.span(texts, factor, 3, backend="native")
except MemoryError as error:
    print(error)
"""
    asan = f"{os.environ.get('ASAN_OPTIONS', '')}:allocator_may_return_null=1"  # under make sanitize
    assert run([sys.executable, "-c", script], ROOT, ASAN_OPTIONS=asan) == "span: not enough memory\n"


# -------------------------------------------------------------------------------- tensors it cannot read or change


@BUILT
def test_negated_views_and_other_devices_are_refused() -> None:
    """Their memory does not contain the tensor's values."""
    texts, factor, size = SPAN
    negated = torch.complex(torch.zeros_like(texts), texts).conj().imag
    assert negated.is_neg()
    with pytest.raises(dispatch.BackendUnavailable, match=r"^native cannot compute span: texts is a negated view$"):
        ops.span(negated, factor, size, backend="native")
    with pytest.raises(dispatch.BackendUnavailable, match=r"^native cannot compute span: texts is on meta, factor is"):
        ops.span(texts.to("meta"), factor.to("meta"), size, backend="native")
    expected = reference.span(-texts.double(), factor.double(), size, 1e-10)[0]
    assert ops.span(negated, factor, size)[0].tolist() == expected.tolist()


NORM = torch.ones(8), torch.zeros(8), 1e-5


def layer_norm(x: Tensor, backend: str = "native") -> Tensor:
    return ops.add_layer_norm(x, None, *NORM, backend=backend)


@BUILT
def test_tensors_without_memory_are_refused() -> None:
    """Some of torch's tensors have no address: only its own operations can read them."""
    x = draw(0, 3, 4, 8)
    expected = torch.nn.functional.layer_norm(x, (8,))
    for transformed in (torch.vmap, torch.func.functionalize):
        with pytest.raises(dispatch.BackendUnavailable, match="x has no memory of its own"):
            transformed(layer_norm)(x)
        have = transformed(lambda x: layer_norm(x, "auto"))(x)
        assert error(have, expected) <= OP_FLOAT32
    with pytest.raises(dispatch.BackendUnavailable, match="x has no memory of its own"):
        layer_norm(torch._efficientzerotensor((4, 8)))
    for opaque, layout in (
        (torch.zeros(4, 8).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(4, 8).to_mkldnn(), "torch._mkldnn"),
    ):
        with pytest.raises(dispatch.BackendUnavailable, match=rf"x is not strided \({layout}\)"):
            layer_norm(opaque)


@BUILT
def test_add_layer_norm_refuses_overlapping_memory() -> None:
    """Rows that overlap, and a delta in the memory of x: threads would race for them."""
    memory = draw(0, 40)
    with pytest.raises(
        dispatch.BackendUnavailable,
        match=r"x has strides \[4, 1\], expected a contiguous last axis and rows at two strides that do not overlap$",
    ):
        layer_norm(memory.as_strided((5, 8), (4, 1)))
    x, delta = memory[:32].view(4, 8), memory[8:].view(4, 8)
    with pytest.raises(dispatch.BackendUnavailable, match=r"delta shares memory with x$"):
        ops.add_layer_norm(x, delta, *NORM, backend="native")
    for beside in (memory[8:16].view(1, 8), memory.clone()[8:16].view(1, 8)):
        row = memory[:8].view(1, 8)
        expected = row + beside
        ops.add_layer_norm(row, beside, *NORM, backend="native")
        assert torch.equal(row, expected)
    expected = memory[:8].view(1, 8) * 2
    ops.add_layer_norm(memory[:8].view(1, 8), memory[:8].view(1, 8), *NORM, backend="native")
    assert torch.equal(memory[:8].view(1, 8), expected)


@BUILT
def test_integer_codes_are_left_to_other_backends() -> None:
    """Float32, to which smaller dtypes are widened, would keep 24 bits of 2⁵³ − 1."""
    codes, shared, centre = torch.full((1, 1, 1), 2**53 - 1), torch.zeros(1, 0), torch.zeros(1, 1)
    total, second = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    with pytest.raises(dispatch.BackendUnavailable, match=r"codes is torch.int64, expected floating point$"):
        ops.moments(codes, shared, centre, total, second, backend="native")
    ops.moments(codes, shared, centre, total, second)
    assert total.item() == 2**53 - 1


@BUILT
@pytest.mark.parametrize("unit", [1, 1e-160, 1e-200, 1e200])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e160, 1e300])
def test_variances_that_overflow_or_underflow_end_the_picks(scale: float, unit: float) -> None:
    """No crash, no endless loop, no text picked twice."""
    texts, factor = SPAN[0].double() * scale, SPAN[1].double() * unit
    picks, variance, _ = ops.span(texts, factor, 12, backend="native")
    for row in picks.tolist():
        picked = [pick for pick in row if pick >= 0]
        assert len(picked) == len({*picked})
        assert row == picked + [-1] * (12 - len(picked))
    assert not variance[picks < 0].any()
