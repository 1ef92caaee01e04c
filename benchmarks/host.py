"""Counts and times the Python of a decomposition: what a GPU would wait for, without one.

Every size is tiny, so that next to nothing but Python and torch's own bookkeeping is left. Three paths are measured:
``cpu``, as it is; ``gpu``, in which ``"auto"`` takes Triton's kernels, every launch is made and not run, and torch's
own products are not computed; and ``graph``, a call of a shape that was there before, which a GPU replays as a CUDA
graph: everything but the replay. Calls of functions are counted by the interpreter's profiler and are the same in every
run; times are of the thread, the fastest of several rounds taken in turn. ``python -m benchmarks.host`` prints a table;
its exit code is 1 if a budget is exceeded.

The budget: an operation takes :data:`MICROSECONDS_PER_OPERATION` of Python on the ``gpu`` path, on average over a
forward and without its launches, and a ``graph`` call :data:`MILLISECONDS_PER_CALL` over the module's own forward.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from open_clip.transformer import VisionTransformer

import clipfast
from benchmarks.launchless import triton_everywhere
from clipfast import forward, graphs
from clipfast.bench import machine
from clipfast.forward import rows
from clipfast.forward.stream import Stream
from clipfast.kernels import ops
from clipfast.kernels.linear import eager as eager_linear

MICROSECONDS_PER_OPERATION = 25.0
MILLISECONDS_PER_CALL = 0.3
PATHS = ("cpu", "gpu", "graph")
LAYERS, WIDTH, HEADS, TEXTS = 12, 64, 2, 3
"""As many layers as ViT-B has, and little in them: five tokens of width 64."""

_ROUNDS = 9


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        python: functions in Python that it enters, itself included.
        c: functions in C that those call.
        microseconds: of the thread.
    """

    python: int
    c: int
    microseconds: float


@dataclass(frozen=True)
class Row:
    """One operation of a forward.

    Attributes:
        operation: its name.
        calls: in one forward.
        cost: of a call, the mean over its calls.
    """

    operation: str
    calls: int
    cost: Cost


@dataclass(frozen=True)
class Report:
    """Where the Python of a decomposition goes.

    Attributes:
        path: one of :data:`PATHS`.
        rows: the operations, none on the ``graph`` path.
        own: the module's own forward.
        decompose: ``Model.decompose`` with attention rows.
    """

    path: str
    rows: tuple[Row, ...]
    own: Cost
    decompose: Cost

    @property
    def operations(self) -> int:
        """Calls of operations in a forward."""
        return sum(row.calls for row in self.rows)

    @property
    def per_operation(self) -> float:
        """Microseconds of an operation, on average over a forward."""
        return sum(row.calls * row.cost.microseconds for row in self.rows) / max(1, self.operations)

    @property
    def over_own(self) -> float:
        """Milliseconds by which a decomposition takes longer than the module's own forward."""
        return (self.decompose.microseconds - self.own.microseconds) / 1e3


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Functions in Python and in C that ``run`` calls."""
    counts = {"call": 0, "c_call": 0}

    def note(frame: object, event: str, argument: object) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"] - 1  # sys.setprofile(None) is one


def costs(runs: Sequence[Callable[[], object]], repeats: int) -> list[Cost]:
    """What a call of each costs once it was called before; they are timed in turn.

    Args:
        runs: what is called.
        repeats: calls per round; 0 counts and times nothing.
    """
    for run in runs:
        for _ in range(3):
            run()
    counts = [counted(run) for run in runs]
    best = [float("inf") if repeats else 0.0] * len(runs)
    for _ in range(_ROUNDS if repeats else 0):
        for place, run in enumerate(runs):
            start = time.thread_time()
            for _ in range(repeats):
                run()
            best[place] = min(best[place], 1e6 * (time.thread_time() - start) / repeats)
    return [Cost(python, c, taken) for (python, c), taken in zip(counts, best, strict=True)]


@contextmanager
def noted_operations() -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """A context that lists the operations called in it with their arguments."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    originals = {name: getattr(ops, name) for name in ops.__all__}

    def noting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, arguments, options))
            return originals[name](*arguments, **options)

        return call

    try:
        for name in originals:
            setattr(ops, name, noting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


class _Uncomputed:
    """A module of torch's whose products allocate their results and leave them as they are; all else is torch's."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """``torch.addmm`` into ``out``."""
        return out

    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``torch.nn.functional.linear``."""
        return x.new_empty((*x.shape[:-1], len(weight)))


class _Replay:
    """A captured forward that a GPU replays without Python."""

    def replay(self) -> None:
        """Nothing: the results stay as the capture left them."""


def _captured(run: Callable[[], None], device: torch.device, warmup: int, pool: object) -> _Replay:
    run()
    return _Replay()


def _adding_stream(tower: Any, x: Any, blocks: Any, mlps: Any, adds_products: Any, backend: str) -> Stream:
    return Stream(tower, x, blocks, mlps, True, backend)


@contextmanager
def as_on_a_gpu(model: clipfast.Model, path: str) -> Iterator[None]:
    """A context in which a model on the CPU does in Python what it does on a GPU.

    Weights are read for changes once a second, memory comes from torch, products add themselves to the stream and are
    not computed, and on the ``graph`` path neither is a forward of a known kind.
    """
    weights: Any = model._weights
    with triton_everywhere(), ExitStack() as stack:

        def patch(place: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(place, name, value))

        patch(weights, "of_tower", weights._once_a_second)
        patch(eager_linear, "torch", _Uncomputed(torch))
        patch(eager_linear, "F", _Uncomputed(torch.nn.functional))
        patch(forward.buffers, "reuse", lambda device: nullcontext())
        patch(rows, "Stream", _adding_stream)
        patch(graphs, "current_stream", lambda device: 0)
        patch(graphs, "new_pool", lambda: None)
        patch(graphs, "reserved", lambda device: 0)
        patch(graphs, "capture", _captured)
        run = model._replayed if path == "graph" else lambda *arguments: forward.decompose(*arguments[:-1])
        patch(model, "_run", run)
        yield


def report(path: str, repeats: int = 20) -> Report:
    """Measures one path.

    Args:
        path: one of :data:`PATHS`.
        repeats: calls per round; 0 counts only.
    """
    torch.manual_seed(0)
    module = VisionTransformer(
        image_size=32, patch_size=16, width=WIDTH, layers=LAYERS, heads=HEADS, mlp_ratio=4.0, output_dim=32
    ).eval()
    model = clipfast.wrap(module)
    images = torch.randn(1, 3, 32, 32)
    place = nullcontext() if path == "cpu" else as_on_a_gpu(model, path)
    with place, torch.no_grad():
        own, decompose = costs([lambda: module(images), lambda: model.decompose(images, attention=True)], repeats)
        with noted_operations() as calls:
            model.decompose(images, attention=True)
        each = costs([partial(getattr(ops, name), *given, **options) for name, given, options in calls], repeats)
    by_name: dict[str, list[Cost]] = {}
    for (name, _, _), of_call in zip(calls, each, strict=True):
        by_name.setdefault(name, []).append(of_call)
    return Report(path, tuple(Row(name, len(all_), _mean(all_)) for name, all_ in by_name.items()), own, decompose)


def _mean(costs: Sequence[Cost]) -> Cost:
    python, c, microseconds = (sum(getattr(each, name) for each in costs) / len(costs) for name in _FIELDS)
    return Cost(round(python), round(c), microseconds)


_FIELDS = ("python", "c", "microseconds")


def markdown(reports: Sequence[Report]) -> str:
    """The reports as a table."""
    lines = ["| path | what | calls | Python functions | C functions | µs |", "|---|---|---|---|---|---|"]
    for each in reports:
        rows = [
            *(("ops." + row.operation, row.calls, row.cost) for row in each.rows),
            ("the module's own forward", 1, each.own),
            ("decompose", 1, each.decompose),
        ]
        for name, calls, own in rows:
            lines.append(f"| {each.path} | {name} | {calls} | {own.python} | {own.c} | {own.microseconds:.1f} |")
    return "\n".join(lines)


def within_budget(reports: Sequence[Report]) -> bool:
    """Whether the times are within the budget."""
    by_path = {each.path: each for each in reports}
    return (
        by_path["gpu"].per_operation <= MICROSECONDS_PER_OPERATION
        and by_path["graph"].over_own <= MILLISECONDS_PER_CALL
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and the budget; returns 1 if the budget of the GPU's path is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="calls per round (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    reports = [report(path, settings.repeats) for path in PATHS]
    print(f"{machine.cpu_name()}, {machine.cores()} cores, torch {torch.__version__}, one thread\n")
    print(markdown(reports))
    print()
    for each in reports:
        inside = f"{each.operations} operations of {each.per_operation:.1f} µs, " if each.rows else ""
        print(f"{each.path}: {inside}{each.over_own:+.2f} ms over the module's own forward")
    kept = within_budget(reports)
    print(
        f"budget: {MICROSECONDS_PER_OPERATION:g} µs per operation on the gpu path, {MILLISECONDS_PER_CALL:g} ms per "
        f"call over the module's own forward on the graph path: {'kept' if kept else 'EXCEEDED'}"
    )
    if settings.json is not None:
        document = {"machine": machine.machine(), "reports": [asdict(each) for each in reports]}
        settings.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
