"""A checkout without symbolic links, as on Windows, where ``clipfast/kernels`` is a text file or not there at all."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT


@pytest.fixture(params=["text file", "nothing"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "_native*", "_cuda*", "model", "*.png", "*.txt")
    for folder in ("clipfast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skipped)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    link = copy / "clipfast" / "kernels"
    assert link.is_symlink()
    link.unlink()
    if request.param == "text file":
        link.write_text("../kernels")
    return copy


def test_the_error_is_one_line_where_it_is_not_installed(checkout: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(checkout)!r}); import clipfast"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: clipfast.kernels is not found: clipfast/kernels is no link to ../kernels in this checkout; "
        "install it with `pip install -e .`"
    )


def can_build() -> bool:
    """Setuptools as new as pyproject.toml asks for, and pybind11."""
    try:
        setuptools = importlib.util.find_spec("setuptools.command.bdist_wheel")
    except ModuleNotFoundError:
        return False
    return setuptools is not None and importlib.util.find_spec("pybind11") is not None


def test_an_editable_install_works(checkout: Path, tmp_path: Path) -> None:
    if not can_build():
        pytest.skip("no setuptools or no pybind11 to build with")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input", "install", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(site), "-e", str(checkout)]
    quick = {"CC": "false", "CXX": "false", "CLIPFAST_CUDA": "0"}  # nothing is compiled
    run(command, tmp_path, **quick)
    packages = [str(site), *(path for path in sys.path if "site-packages" in path)]
    script = (
        f"import site, sys; sys.path[:0] = {packages!r}; site.addsitedir({str(site)!r})\n"
        "import clipfast, clipfast.kernels.ops, clipfast.kernels.span.eager as span\n"
        "print(clipfast.__file__, span.__file__)"
    )
    package, span = map(Path, run([sys.executable, "-S", "-c", script], tmp_path).split())
    assert package == checkout / "clipfast" / "__init__.py"
    assert span == checkout / "kernels" / "span" / "eager.py"


def run(command: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
