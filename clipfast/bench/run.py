"""Measuring a plan: checks, then peak memory and interleaved pairs; one entry of the result file per output.

An output that cannot be measured becomes an entry with the reason, and the run continues.
"""

import contextlib
import gc
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import torch
from torch import nn

from clipfast.bench.checks import Gate
from clipfast.bench.inputs import DTYPES, module
from clipfast.bench.machine import moment
from clipfast.bench.measuring import Call, Check, Comparison, WrongResult, compare, require
from clipfast.bench.memory import Peak, ProbeFailed, measure, peak_memory
from clipfast.bench.outputs import COMPILED, NAIVE_FORM, PLAIN, Case, build, call
from clipfast.bench.plan import Plan, Setup
from clipfast.errors import ClipfastError, UnsupportedTower, is_out_of_memory
from clipfast.kernels.dispatch import BackendUnavailable

EVERY = "every output"
"""The output of an entry that says why a combination could not be measured at all."""
WRONG = "wrong result"
"""The kind of failure that is a defect of clipfast."""

Entry = dict[str, Any]


class Failed(Exception):
    """An output that could not be measured.

    Attributes:
        kind: ``"refused"``, ``"out of memory"``, ``"cannot run"`` or :data:`WRONG`.
        checks: the checks made before it failed.
    """

    def __init__(self, kind: str, reason: str, checks: tuple[Check, ...] = ()) -> None:
        super().__init__(reason)
        self.kind = kind
        self.checks = checks


@contextlib.contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Turns errors after which a run can continue into :class:`Failed`.

    The exception is not chained, because its traceback would keep alive the tensors that filled the memory.
    """
    failed = None
    try:
        yield
    except Exception as error:
        failed = _explained(error, what)
        if failed is None:
            raise
    if failed is not None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise failed


def _explained(error: Exception, what: str) -> Failed | None:
    reason = " ".join(str(error).split())
    if isinstance(error, Failed):
        return error
    if isinstance(error, WrongResult):
        return Failed(WRONG, reason)
    if is_out_of_memory(error):
        return Failed("out of memory", "try a smaller --batch")
    if isinstance(error, UnsupportedTower):
        return Failed("refused", "; ".join(error.reasons))
    if isinstance(error, ClipfastError | BackendUnavailable):
        return Failed("refused", reason)
    # a dtype without a kernel on this device, or an error inside the compiler
    if what == COMPILED or isinstance(error, NotImplementedError) or "not implemented for" in reason:
        return Failed("cannot run", f"{type(error).__name__}: {reason[:300]}")
    return None


def measure_plan(plan: Plan) -> Iterator[Entry]:
    """Measures everything, one entry at a time, and restores the torch settings that it changes.

    Convolutions compute in float32. By default cuDNN uses TF32, with which the plain forward would round its patches to
    11 bits and fail every check.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precision, threads = convolutions.fp32_precision, torch.get_num_threads()
    convolutions.fp32_precision = "ieee"
    torch.set_num_threads(plan.threads)
    index = torch.device(plan.device).index
    if index is not None:
        torch.cuda.set_device(index)  # the device that timing synchronises and memory is read from
    try:
        for (name, dtype), setups in groupby(plan.setups(), lambda setup: (setup.model, setup.dtype)):
            yield from _of_one_model(plan, name, dtype, list(setups))
    finally:
        convolutions.fp32_precision = precision
        torch.set_num_threads(threads)


def _of_one_model(plan: Plan, name: str, dtype: str, setups: list[Setup]) -> Iterator[Entry]:
    try:
        with _reasons(name):
            built = module(name, plan.device, dtype=DTYPES[dtype], image_size=plan.image_size)
    except Failed as failed:
        yield from (_failure(setup, EVERY, failed) for setup in setups)
        return
    for setup in setups:
        try:
            measured = _Measured(plan, setup, built)
        except Failed as failed:
            yield _failure(setup, EVERY, failed)
            continue
        for output in plan.rows():
            try:
                yield measured.entry(output)
            except Failed as failed:
                yield _failure(setup, output, failed)
        del measured


def _head(setup: Setup, output: str) -> Entry:
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    return setup.to_json() | {"output": output, "taken": taken} | moment()


def _failure(setup: Setup, output: str, failed: Failed) -> Entry:
    checks = [check.to_json() for check in failed.checks]
    return _head(setup, output) | {"failed": {"kind": failed.kind, "reason": str(failed)}, "checks": checks}


class _Measured:
    """One combination: its callables, their checks, and their timing.

    On an accelerator the peak of the plain forward is read first, before the model's basis is folded. The checks of all
    outputs come next, so that their float64 tensors are freed before anything is timed.

    Raises:
        Failed: not even the plain forward runs.
    """

    def __init__(self, plan: Plan, setup: Setup, built: nn.Module) -> None:
        self.plan = plan
        self.setup = setup
        self._peaks: dict[str, Peak] = {}
        self._checks: dict[str, tuple[Check, ...]] = {}
        self._calls: dict[str, Call] = {}
        self._failed: dict[str, Failed] = {}
        with _reasons(PLAIN):
            case = Case.of(built, setup.batch, backend=setup.backend, texts=plan.texts)
            self._plain = call(case, PLAIN)
            if plan.device != "cpu" and plan.memory:
                self._peaks[PLAIN] = measure(self._plain)
            gate = Gate(case)
        for output in plan.rows():
            try:
                self._prepare(case, gate, output)
            except (
                Failed
            ) as failed:  # a new exception: the traceback of this one would keep the tensors of the checks alive
                self._failed[output] = Failed(failed.kind, str(failed), failed.checks)

    def _prepare(self, case: Case, gate: Gate, output: str) -> None:
        """Builds an output's callable and checks it."""
        with _reasons(output):
            subject = call(case, output)
            checks = tuple(gate.verify(output, subject))
            try:
                require(checks)
            except WrongResult as wrong:
                raise Failed(WRONG, str(wrong).removeprefix(f"{WRONG}, "), checks) from None
            self._calls[output], self._checks[output] = subject, checks

    def entry(self, output: str) -> Entry:
        """Measures one output.

        Raises:
            Failed: a check failed, or it does not fit in memory.
        """
        if output in self._failed:
            raise self._failed[output]
        checks = self._checks[output]
        head = _head(self.setup, output)
        with _reasons(output):
            baselines = [PLAIN]
            if output in NAIVE_FORM:
                baselines += [name for name in (COMPILED, NAIVE_FORM[output]) if name in self._calls]
            against = {baseline: self._against(output, baseline) for baseline in baselines}
            memory = self._memory(output) if self.plan.memory else None
        typical = against[PLAIN].to_json(output, PLAIN)["a"]["seconds"]["median"]
        return head | {
            "failed": None,
            "checks": [check.to_json() for check in checks],
            "largest_error": max(check.error for check in checks),
            "milliseconds": typical * 1e3,
            "images_per_second": self.setup.batch / typical,
            "against": {name: _timing(comparison, output, name) for name, comparison in against.items()},
            "memory": memory,
        }

    def _against(self, output: str, baseline: str) -> Comparison:
        checks = self._checks[output]
        slow = {output, baseline} & set(NAIVE_FORM.values())  # the checks have run it already
        warmup = min(self.plan.warmup, 1) if slow else self.plan.warmup
        sides = self._calls[output], self._plain if baseline == PLAIN else self._calls[baseline]
        return compare(*sides, lambda: checks, count=self.plan.pairs, warmup=warmup)

    def _memory(self, output: str) -> Entry:
        """Peak memory: on the CPU of a new process, on an accelerator of the device's allocator in this process."""
        try:
            if self.plan.device != "cpu":
                peak = self._peaks.get(output) or measure(self._calls[output])
                return peak.to_json() | {"shown_mb": peak.device_peak_mb, "of": "device"}
            settings = {name: getattr(self.plan, name) for name in ("texts", "threads", "image_size")}
            arguments = self.setup.to_json() | settings
            peak = peak_memory(f"{build.__module__}:{build.__name__}", output=output, **arguments)
            return peak.to_json() | {"shown_mb": peak.peak_mb, "of": "process"}
        except ProbeFailed as failed:
            return {"shown_mb": None, "of": "process", "failed": " ".join(str(failed).split())}


def _timing(comparison: Comparison, output: str, baseline: str) -> Entry:
    """A comparison in the layout of a result file, without the checks, which the entry has already."""
    written = comparison.to_json(output, baseline)
    return {key: value for key, value in written.items() if key != "checks"}
