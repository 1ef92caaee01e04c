"""Arguments, quick answers, and what reaches the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import clipfast, inside, start

import clipfast as package
from clipfast.cli.app import COMMANDS, GROUPS
from clipfast.loading import BUNDLED


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_help_needs_nothing_heavy() -> None:
    heavy = ("torch", "open_clip", "numpy", "PIL", "safetensors")
    loaded = python(f"import sys, clipfast.cli; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.stdout.strip() == "[]"


EVERY = [[name] for name in COMMANDS if name not in GROUPS] + [[name, part] for name in GROUPS for part in GROUPS[name]]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
@pytest.mark.slow
def test_the_help_of_a_command_needs_nothing_heavy(words: list[str]) -> None:
    """In a process that refuses to import torch; every option has a help text."""
    code = f"""
import sys
sys.modules |= dict.fromkeys(["torch", "numpy", "PIL", "open_clip", "pyarrow", "zarr", "fsspec", "webdataset", "ray"])
from clipfast.cli.app import run
raise SystemExit(run([*{words!r}, "--help"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "300"}
    )
    options = [
        line for line in done.stdout.splitlines() if line.startswith(("│ --", "│ IMAGES", "│ NAME", "│ *", "│ PART"))
    ]
    assert options
    for option in options:
        names, _, text = option.strip("│ ").partition("  ")
        assert text.strip(), names


def test_parsing() -> None:
    version = inside("--version")
    assert (version.returncode, version.stdout) == (0, f"clipfast {package.__version__}\n")
    listed = inside("--help").stdout
    assert all(name in listed for name in COMMANDS)
    for wrong in (
        ["demo", "--no-such-option"],
        ["decompose", "a.jpg", "--dtype", "int8"],
        ["decompose", "a.jpg", "--batch-size", "0"],
        ["decompose"],
        ["no-such-command"],
    ):
        done = inside(*wrong)
        assert (done.returncode, done.stdout) == (2, ""), wrong
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: "), wrong


def test_only_warnings_of_clipfast_are_shown() -> None:
    code = """
import logging, warnings
from clipfast.commands import console
console.set_up()
logging.getLogger("clipfast").warning("two\\nlines")
logging.warning("from the root")
logging.getLogger("someone").error("from a library")
warnings.warn("from elsewhere")
warnings.warn_explicit("from\\nus", UserWarning, console.__file__, 1)
console.error("[bold]x" + "y" * 1000)
"""
    lines = python(code).stderr.splitlines()
    assert lines[:2] == ["warning: two lines", "warning: from us"]
    assert lines[2].startswith("error: [bold]xyyy")
    assert len(lines) == 3
    assert len(lines[2]) < 850


def test_an_interrupt_that_a_library_turns_into_an_error_exits_with_130() -> None:
    code = """
import os, signal
from clipfast.commands.outcome import exit_code_of
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
def body():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None
print(exit_code_of(body), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("130 True\n", "error: interrupted\n")


@pytest.mark.slow
def test_listing_into_a_pipe_that_closes() -> None:
    process = start("models", "--package", "openai")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in errors
    assert "Broken" not in errors


def test_doctor() -> None:
    done = clipfast("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["versions"]["clipfast"] == package.__version__
    assert report["backends"]["eager"] == []
    assert (report["native"]["instructions"] in report["native"]["known"]) == (report["backends"]["native"] == [])
    assert report["devices"] or report["no_devices_because"]
    assert report["bundled"].keys() == BUNDLED.keys()


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = clipfast("demo", "--scenes", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sum check" in done.stdout
    names = ["scene-00.png", "scene-01.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert sorted(path.name for path in (tmp_path / "heads").glob("*.png")) == names
    twice = clipfast("demo", "--scenes", 2, "--out", tmp_path / "again")
    assert (tmp_path / "again" / names[0]).read_bytes() == (tmp_path / names[0]).read_bytes()
    assert twice.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]  # the last line names the folder


@pytest.mark.slow
def test_demo_without_readable_images_prints_no_results(tmp_path: Path) -> None:
    done = clipfast("demo", tmp_path / "nowhere.jpg", "--scenes", 0, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.jpg: no such file" in done.stderr
