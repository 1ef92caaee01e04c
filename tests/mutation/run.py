"""Mutation testing: do the tests notice when the mathematics is changed?

``python tests/mutation/run.py`` draws a sample of the small changes that cosmic-ray's operators make to the files in
:data:`SUITES` (another operator, another number, a negated condition, a removed decorator, …), runs the tests of that
file with each, and prints the share that some test notices. No file is changed: every mutant is a fork of this process
that imports its module from a changed source. Annotations are left alone, as they do not run. The operators in
:data:`OMITTED` are left out: ``==`` → ``is`` and ``!=`` → ``is not`` compute the same for the words and small numbers
that are compared here, of which the interpreter keeps one object each.

``survivors.toml`` lists the mutants that no test can notice, each with the reason: they compute the same, or what they
change is not part of the contract. A survivor that is not listed makes the run fail, and so does a score below
:data:`BAR`, listed survivors counted as survivors.
"""

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import re
import signal
import sys
import time
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
LISTED = Path(__file__).with_name("survivors.toml")

BAR = 0.9
TIMEOUT = 240.0
"""Seconds; a mutant that runs longer counts as noticed."""

OMITTED = re.compile(r"_(Eq_Is|NotEq_IsNot|BitAnd|BitOr|BitXor|LShift|RShift|Invert)$")


@dataclass(frozen=True)
class Suite:
    """The tests of one file.

    Attributes:
        module: the file as it is imported.
        mutants: how many are drawn.
        tests: files in tests/, the quickest to notice first.
    """

    module: str
    mutants: int
    tests: tuple[str, ...]


SUITES = {
    "clipfast/kernels/reference.py": Suite(
        "clipfast.kernels.reference",
        50,
        (
            "kernels/test_kernel_definitions.py",
            "kernels/test_ops_by_hand.py",
            "kernels/test_heads_by_hand.py",
            "kernels/test_layers_by_hand.py",
            "kernels/test_rows_by_hand.py",
            "kernels/test_maps_by_hand.py",
        ),
    ),
    **{
        f"clipfast/forward/{name}.py": Suite(
            f"clipfast.forward.{name}",
            30,
            (
                "test_golden.py",
                "test_by_hand.py",
                "test_forward.py",
                "test_contributions.py",
                "test_model.py",
                "test_definition.py",
                "towers/test_families.py",
            ),
        )
        for name in ("rows", "collector")
    },
    **{
        f"clipfast/forward/{name}.py": Suite(
            f"clipfast.forward.{name}",
            20,
            ("towers/test_families.py", "towers/test_sizes.py", "towers/test_timm_sizes.py"),
        )
        for name in ("tokens", "pooling", "upstream")
    },
    "clipfast/basis.py": Suite(
        "clipfast.basis",
        50,
        (
            "test_basis.py",
            "test_golden.py",
            "test_by_hand.py",
            "test_sharing.py",
            "test_contributions.py",
            "towers/test_families.py",
        ),
    ),
    "clipfast/analyses/moments.py": Suite(
        "clipfast.analyses.moments",
        60,
        (
            "analyses/test_moments.py",
            "analyses/test_textspan_float32.py",
            "analyses/test_ablation.py",
            "test_saving.py",
            "presentation/test_presentation.py",
        ),
    ),
    "clipfast/analyses/textspan.py": Suite(
        "clipfast.analyses.textspan",
        60,
        (
            "analyses/test_textspan.py",
            "analyses/test_textspan_float32.py",
            "analyses/test_moments.py",
            "presentation/test_presentation.py",
        ),
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: from the root of the repository.
        operator: of cosmic-ray.
        occurrence: which place of the file the operator changes.
        line: where.
        before: that line.
        after: that line, changed.
        source: the whole file, changed.
    """

    file: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """The file, the line as it is and as it was changed: what does not move when other lines do."""
        return f"{self.file}: {self.before} -> {self.after}"


def annotation_lines(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end, as (line, column), of every annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for each in annotations:
            if isinstance(each, ast.expr):
                spans.append(((each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0)))
    return spans


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every change that the operators make to a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / file).read_text(encoding="utf-8")
    lines, annotations = source.splitlines(), annotation_lines(source)
    tree = get_ast(source)
    for name in operator_names():
        operator_class = get_operator(name)
        if OMITTED.search(name) or operator_class.arguments():
            continue
        operator = operator_class()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if any(first <= start and end <= last for first, last in annotations):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or changed == source:
                continue
            after = next((new for old, new in zip(lines, changed.splitlines(), strict=False) if old != new), "")
            line = next(
                (n for n, (old, new) in enumerate(zip(lines, changed.splitlines(), strict=False)) if old != new), 0
            )
            yield Mutant(file, name, occurrence, line + 1, lines[line].strip(), after.strip(), changed)


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source that is not the file's."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def _child(mutant: Mutant | None, suite: Suite) -> None:
    """Runs the tests with the change and ends this process: 0 where they passed."""
    os.setsid()
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if mutant is not None:
        path = ROOT / mutant.file
        sys.meta_path.insert(0, _Changed(suite.module, path, mutant.source))
    code = 1
    try:
        import pytest

        code = int(
            pytest.main(
                ["-x", "-q", "-p", "no:benchmark", "-p", "no:xdist", *(str(TESTS / test) for test in suite.tests)]
            )
        )
    finally:
        os._exit(code)


def unnoticed(mutants: Sequence[Mutant | None], suite: Suite, workers: int, timeout: float) -> list[Mutant | None]:
    """Those with which every test passes, ``workers`` at a time; None stands for the file as it is."""
    waiting, running, alive = list(mutants)[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop()
            pid = os.fork()  # this process has one thread
            if not pid:
                _child(mutant, suite)
            running[pid] = (mutant, time.monotonic() + timeout)
        for pid, (mutant, end) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            if done:
                del running[pid]
                if status == 0:
                    alive.append(mutant)
        time.sleep(0.02)
    return alive


def import_packages() -> None:
    """What every fork shares: the packages, and nothing of clipfast."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    for package in ("hypothesis", "numpy", "open_clip", "pytest", "triton"):
        importlib.import_module(package)
    import torch

    torch.set_num_threads(1)
    assert not any(name.split(".")[0] == "clipfast" for name in sys.modules)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sample and prints what survived."""
    parser = argparse.ArgumentParser(description="Mutation testing of the mathematics.")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--file", action="append", choices=SUITES, help="only this file; repeat")
    options = parser.parse_args(arguments)
    import_packages()
    listed = {each["mutant"] for each in tomllib.loads(LISTED.read_text(encoding="utf-8")).get("survivor", [])}
    total, survivors = 0, []
    for file in options.file or SUITES:
        suite = SUITES[file]
        if not unnoticed([None], suite, 1, 10 * TIMEOUT):
            print(f"{file}: its tests fail without any change")
            return 1
        every = list(mutants_of(file))
        drawn = random.Random(options.seed).sample(every, min(suite.mutants, len(every)))
        alive = [mutant for mutant in unnoticed(drawn, suite, options.workers, TIMEOUT) if mutant is not None]
        total += len(drawn)
        survivors += alive
        print(f"{file}: {len(drawn) - len(alive)} of {len(drawn)} noticed ({len(every)} possible)", flush=True)
        for mutant in alive:
            mark = "listed" if mutant.name in listed else "NOT LISTED"
            print(f"  {mark} {mutant.operator} line {mutant.line}: {mutant.before} -> {mutant.after}", flush=True)
    score = 1 - len(survivors) / max(1, total)
    print(f"{total} mutants, {score:.1%} noticed (bar {BAR:.0%})")
    return int(score < BAR or any(mutant.name not in listed for mutant in survivors))


if __name__ == "__main__":
    sys.exit(main())
