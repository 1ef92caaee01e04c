"""Options and test collection of the benchmarks: ``pytest benchmarks --benchmark-only``."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkout import NotACheckout, validate
from benchmarks.results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clipfast benchmarks")
    group.addoption("--pairs", type=int, default=7, help="interleaved pairs per comparison (7)")
    group.addoption("--threads", type=int, default=2, help="threads of torch (2)")
    group.addoption("--device", default="cpu", help="device to compute on: cpu (default) or cuda")
    group.addoption("--reference", metavar="PATH", help="a checkout of the published code to compare with")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--reference")
    if path is not None:
        try:
            validate(Path(path))
        except NotACheckout as error:
            raise pytest.UsageError(str(error)) from error


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collects ``bench_*.py`` in this folder, which pytest's default pattern ``test_*.py`` does not match."""
    if not fnmatch(file_path.name, "bench_*.py") or parent.session.isinitpath(file_path):
        return None  # files named on the command line are collected by pytest itself
    if any(fnmatch(file_path.name, pattern) for pattern in parent.config.getini("python_files")):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Settings of every benchmark: threads and device."""
    return {"threads": pytestconfig.getoption("--threads"), "device": pytestconfig.getoption("--device")}


@pytest.fixture(scope="session")
def pairs(pytestconfig: pytest.Config) -> int:
    """Interleaved pairs per comparison."""
    return int(pytestconfig.getoption("--pairs"))


@pytest.fixture
def say(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Prints lines that are visible without ``-s``."""
    manager: Any = pytestconfig.pluginmanager.getplugin("capturemanager")

    def write(*lines: object) -> None:
        with manager.global_and_fixture_disabled():
            print("", *lines, sep="\n  ", end="", flush=True)

    return write


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Results:
    """The result file of a module, named by its ``QUESTION`` and ``SENTENCE``."""
    return Results(request.module.QUESTION, request.module.SENTENCE, device=settings["device"])
