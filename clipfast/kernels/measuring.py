"""Compiles, checks and times the variants of an operation on the arguments of a call.

Their kernels are compiled side by side. Each result is compared with the operation in plain torch at a higher
precision. Those that agree are timed as CUDA graphs of a few runs, so that no launch is timed, and as they run where
they cannot be captured.
"""

import contextlib
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.dispatch import VariantKey
from clipfast.kernels.registration import mutated_arguments
from clipfast.kernels.registration import operation as find_operation

logger = logging.getLogger("clipfast")

ROUNDS = 7
"""Timed rounds per variant, in turn; their median counts."""
_RUNS = 4
"""Runs in a graph, and between two readings of a clock."""
_WARMUP = 3

AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error of a result, in its norm and by its dtype, above which a variant is dropped. Far above rounding: what
is to be seen are kernels that were compiled wrong or read beside their tensors."""
TF32_AGREEMENT = 5e-3
"""The same for float32 where a product may be in TF32."""


def label(way: VariantKey) -> str:
    """``"triton/128x64w8s4"``, or the backend alone where it has one variant."""
    return "/".join(way).rstrip("/")


@dataclass
class Measured:
    """What was found about an operation's variants.

    Attributes:
        seconds: median of every variant that agrees with the reference.
        dropped: why the others are out.
    """

    seconds: dict[VariantKey, float] = field(default_factory=dict)
    dropped: dict[VariantKey, str] = field(default_factory=dict)


def measure(operation: str, arguments: Sequence[Any], variants: Mapping[VariantKey, Callable[..., Any]]) -> Measured:
    """Compiles, checks and times variants on copies of what the operation changes among the arguments.

    A variant is dropped that fails (a kernel that needs more shared memory than this device has), or whose result
    differs from the operation's in plain torch at a higher precision by more than :data:`AGREEMENT`.

    Raises:
        Exception: what the first variant raised, where all fail.
        RuntimeError: all run, and no result agrees.
    """
    device = device_of(arguments)
    measured, working, failed = Measured(), dict(variants), []
    with _on(device):
        _compile(variants, copies(operation, arguments))
        expected = _reference(operation, arguments)
        for way, run in variants.items():
            try:
                reason = _disagreement(operation, run, arguments, expected)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                failed.append(error)
            if reason:
                logger.debug("%s of %s %s", label(way), operation, reason)
                measured.dropped[way] = reason
                del working[way]
        del expected
        if not working and failed:
            raise failed[0]
        if not working:
            raise RuntimeError(f"no implementation of {operation} agrees with its definition: {measured.dropped}")
        measured.seconds = time_each(working, copies(operation, arguments))
    return measured


def device_of(arguments: Sequence[Any]) -> torch.device:
    """Where the first tensor among the arguments is."""
    return next(argument.device for argument in arguments if isinstance(argument, Tensor))


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def copies(operation: str, arguments: Sequence[Any]) -> list[Any]:
    """The arguments with copies of those that the operation changes."""
    changed = mutated_arguments(operation)
    return [argument.clone() if i in changed else argument for i, argument in enumerate(arguments)]


def _results(operation: str, run: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """What is compared of a run: everything that it returns and changes in floating point, or what the operation says.

    ``arguments`` are changed where the operation changes them.
    """
    result = run(*arguments)
    known = find_operation(operation)
    listed = list(result) if isinstance(result, tuple | list) else [result]
    if known is not None and known.compared is not None:
        listed = [listed[i] for i in known.compared]
    if known is not None:
        listed += [arguments[i] for i in known.mutated]
    return [each for each in listed if isinstance(each, Tensor) and each.is_floating_point()]


def _reference(operation: str, arguments: Sequence[Any]) -> list[Tensor] | None:
    """The operation in plain torch at a higher precision; None where there is no such, no memory, or no finite result.

    Arguments in 16 bits are widened to float32, others to float64.
    """
    if find_operation(operation) is None:
        return None
    plain = dispatch.implementation(operation, dispatch.EAGER.name)
    assert plain is not None
    low = any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors_in(arguments))
    wide = torch.float32 if low else torch.float64

    def widened(argument: Any, to: torch.dtype | None) -> Any:
        if isinstance(argument, list | tuple):
            return [widened(each, to) for each in argument]
        if isinstance(argument, Tensor) and argument.is_floating_point():
            dtype = argument.dtype if to is None else torch.promote_types(argument.dtype, to)
            return argument.to(dtype, copy=True)
        return argument

    for to in (wide, None):  # an operation may be defined for the dtypes it is given alone
        try:
            results = _results(operation, plain.run, [widened(argument, to) for argument in arguments])
            return results if all(bool(result.isfinite().all()) for result in results) else None
        except torch.OutOfMemoryError:
            logger.debug("no memory to compute %s at a higher precision: its variants are not compared", operation)
            return None
        except (RuntimeError, ValueError, TypeError) as error:
            logger.debug("%s is not computed in %s: %s", operation, to or "its own precision", error)
    return None


def tensors_in(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Every tensor among the arguments, and in lists of them."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _disagreement(
    operation: str, run: Callable[..., Any], arguments: Sequence[Any], expected: list[Tensor] | None
) -> str:
    """How a variant's result differs from what is expected by too much, empty where it does not."""
    have = _results(operation, run, copies(operation, arguments))
    if expected is None:
        return ""
    lowest = max((AGREEMENT[t.dtype] for t in tensors_in(arguments) if t.dtype in AGREEMENT), default=0.0)
    for result, reference in zip(have, expected, strict=True):
        if result.shape != reference.shape:
            return f"gives the shape {list(result.shape)}, expected {list(reference.shape)}"
        allowed = max(lowest, AGREEMENT.get(result.dtype, 0.0))
        if result.is_cuda and _tf32():
            allowed = max(allowed, TF32_AGREEMENT)
        norm = float(reference.norm())
        error = float((result.to(reference.dtype) - reference).norm()) / (norm or 1.0)
        if not error <= allowed:
            return f"disagrees: relative error {error:.2g}, allowed {allowed:g}"
    return ""


def _tf32() -> bool:
    """Whether products of float32 on a GPU may be in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def time_each(variants: Mapping[VariantKey, Callable[..., Any]], arguments: Sequence[Any]) -> dict[VariantKey, float]:
    """Median seconds of every variant; they run in turn on the arguments themselves."""
    device = device_of(arguments)
    with _on(device):
        timers = {variant: _timer(run, arguments, device) for variant, run in variants.items()}
        seconds: dict[VariantKey, list[float]] = {variant: [] for variant in variants}
        for _ in range(ROUNDS):
            for variant, timer in timers.items():
                seconds[variant].append(timer())
    return {variant: statistics.median(times) for variant, times in seconds.items()}


def _timer(run: Callable[..., Any], arguments: Sequence[Any], device: torch.device) -> Callable[[], float]:
    """Gives the mean seconds of a few runs: on the GPU's own clock, of a replayed graph if they can be captured."""

    def several() -> None:
        for _ in range(_RUNS):
            run(*arguments)

    if device.type != "cuda":
        for _ in range(_WARMUP):
            run(*arguments)

        def on_cpu() -> float:
            start = time.perf_counter()
            several()
            return (time.perf_counter() - start) / _RUNS

        return on_cpu
    try:
        graph = capture(several, device, warmup=1)
        launch: Callable[[], Any] = graph.replay
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.debug("timed without a graph: %s", error)
        launch = several
    launch()

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / _RUNS

    return on_gpu


def capture(run: Callable[[], Any], device: torch.device, warmup: int, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``run``, captured on a stream of its own after a few runs there.

    What the current stream does before is waited for, and it waits for all of this. Other threads may go on using
    their devices.

    Args:
        run: queues work and keeps what the graph's results are; it may not wait for the GPU.
        device: whose work it is.
        warmup: runs before, for what libraries allocate per stream.
        pool: memory to share with other graphs that are never replayed at the same time; None for memory of its own.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(warmup):
                run()
        graph = torch.cuda.CUDAGraph()
        # The stream is named: torch's own for captures is one for all devices, on that of the first capture.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            run()
        current.wait_stream(side)
    return graph


# ------------------------------------------------------------------------------------------------------ compilation


def _compile(variants: Mapping[VariantKey, Callable[..., Any]], arguments: Sequence[Any]) -> None:
    """Compiles the kernels of all variants side by side; what fails says so when it runs."""
    if device_of(arguments).type != "cuda" or all(backend != "triton" for backend, _ in variants):
        return
    with compiling() as submit:
        submit(variants, arguments)


Submit = Callable[[Mapping[VariantKey, Callable[..., Any]], Sequence[Any]], None]


@contextlib.contextmanager
def compiling() -> Iterator[Submit]:
    """Gives a function that has the kernels of variants compiled in threads; waits for them at the end."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode

        from clipfast.kernels import launch
    except ImportError:  # an older Triton: each is compiled as it runs
        yield lambda variants, arguments: None
        return

    def submit(variants: Mapping[VariantKey, Callable[..., Any]], arguments: Sequence[Any]) -> None:
        for (backend, _), run in variants.items():
            if backend == "triton":
                with contextlib.suppress(Exception):
                    run(*arguments)

    workers = max(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        mode = AsyncCompileMode(pool, ignore_errors=True)
        with mode:
            with launch.instead(launch.Launch.compile):
                yield submit
            futures = list(getattr(mode, "raw_futures", ()))
            total = len(futures)
            with progress(f"compiling {total} kernels, once on this machine") as say:
                for done, _ in enumerate(as_completed(futures), 1):
                    say(f"{done} of {total} kernels compiled")


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that goes away at the end, and a message of the log at INFO."""
    logger.info("%s", text)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()

    def say(now: str) -> None:
        if on_terminal:
            sys.stderr.write(f"\r\x1b[Kclipfast: {now}")
            sys.stderr.flush()

    say(text)
    try:
        yield say
    finally:
        if on_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
