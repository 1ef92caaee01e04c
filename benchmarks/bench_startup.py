"""The time of ``import clipfast`` and ``clipfast --help``.

Every run starts a new process. The times include the start of the interpreter, which is measured separately as well.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Check, quantiles, require, seconds

QUESTION = "startup"
SENTENCE = "How long do `import clipfast` and `clipfast --help` take, as real processes?"
RUNS = 7
PROGRAM = str(Path(sys.executable).parent / "clipfast")
CASES: dict[str, tuple[list[str], str, float]] = {
    "import clipfast": ([sys.executable, "-c", "import clipfast; print(clipfast.__version__)"], ".", 0.15),
    "clipfast --help": ([PROGRAM, "--help"], "decompose", 0.5),
}
"""Command, text that its output must contain, most seconds."""


def start(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command until it ends."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_startup(benchmark: BenchmarkFixture, name: str, results: Results, say: Any) -> None:
    command, expected, limit = CASES[name]
    if command[0] == PROGRAM and not (Path(PROGRAM).is_file() and importlib.util.find_spec("clipfast.cli")):
        pytest.skip("the clipfast command is not installed")
    done = start(command)
    failed = done.returncode != 0 or expected not in done.stdout
    checks = [Check(f"{name} ends well and says {expected!r}", float(failed), 0.0)]
    require(checks)
    bare = [seconds(lambda: start([sys.executable, "-c", "pass"])) for _ in range(RUNS)]
    times = [seconds(lambda: start(command)) for _ in range(RUNS)]
    bar = Bar(f"{name}: seconds", quantiles(times)["median"], limit, at_least=False)
    results.write(
        name,
        {
            "settings": {"command": [Path(command[0]).name, *command[1:]], "runs": RUNS},
            "checks": [check.to_json() for check in checks],
            "a": {"name": name, "seconds": quantiles(times), "all": times},
            "b": {"name": "python -c pass", "seconds": quantiles(bare), "all": bare},
            "bars": [bar.to_json()],
        },
    )
    say(bar)
    benchmark.extra_info |= {"median": bar.value}
    benchmark.pedantic(start, args=(command,), rounds=3)  # type: ignore[no-untyped-call]
