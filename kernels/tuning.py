"""Finds the fastest variant of an operation by timing, and remembers it on disk.

Which kernel is fastest depends on the device, the shapes and the versions of torch and Triton, and no rule of thumb
holds everywhere. Where an operation has several variants, the first call of each kind runs every variant a few times
on the call's own arguments and remembers the fastest: in memory, and in one JSON file per device and versions in
``$CLIPFAST_CACHE`` (default ``~/.cache/clipfast``). ``CLIPFAST_TUNE=0`` takes the preferred variant untimed. The number
of images is rounded up to a power of two, so that a smaller last batch is not timed again.
"""

import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels.dispatch import VariantKey
from clipfast.kernels.registration import mutated_arguments

logger = logging.getLogger("clipfast")

ROUNDS = 7
"""Timed rounds per variant, in turn; their median counts."""
_RUNS = 4  # per round: the first hides the launch of the next
_WARMUP = 3
_PACKAGES = ("torch", "triton", "clipfast")


def enabled() -> bool:
    """Whether variants are timed at all (``CLIPFAST_TUNE``)."""
    return os.environ.get("CLIPFAST_TUNE", "1") != "0"


def folder() -> Path:
    """Where choices are kept."""
    own = os.environ.get("CLIPFAST_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipfast"
    except RuntimeError:  # no HOME, and no entry in the list of users: no folder can exist there, nothing is kept
        return Path(os.devnull) / "clipfast"


def file_for(device: torch.device) -> Path:
    """The file of choices for a device and the versions installed here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = [name]
    for package in _PACKAGES:
        try:
            parts.append(f"{package}-{version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package}-none")
    return folder() / f"{re.sub(r'[^A-Za-z0-9.+_-]+', '-', '_'.join(parts))}.json"


def key(operation: str, arguments: Sequence[Any]) -> str:
    """What calls of one kind share: shapes (images as a power of two), dtypes, layout, other arguments."""
    return f"{operation}({', '.join(_describe(argument) for argument in arguments)})"


def _describe(argument: Any) -> str:
    if isinstance(argument, Tensor):
        first, *others = argument.shape or (1,)
        shape = "x".join(str(size) for size in (1 << max(first - 1, 0).bit_length(), *others))
        return f"{str(argument.dtype).removeprefix('torch.')}[{shape}]{'' if argument.is_contiguous() else 's'}"
    if isinstance(argument, list | tuple):
        return f"{len(argument)}*{_describe(argument[0])}" if argument else "none"
    return str(argument)


class Choices:
    """Choices by key, in memory and in one file.

    Attributes:
        path: the file; it is read once, and written whole under another name and then renamed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("the choices of kernels in %s cannot be read (%s): timing again", self.path, error)
            return {}
        return content if isinstance(content, dict) else {}

    def get(self, call: str) -> VariantKey | None:
        """The variant chosen for a call, None when it was never timed."""
        entry = self._known.get(call)
        try:
            backend, variant = entry["chosen"]  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            return None
        return str(backend), str(variant)

    def items(self) -> Mapping[str, Any]:
        """Everything known: key → ``{"chosen": [backend, variant], "milliseconds": {…}}``."""
        return self._known

    def put(self, call: str, chosen: VariantKey, seconds: Mapping[VariantKey, float]) -> None:
        """Remembers a choice with the times it is based on."""
        milliseconds = {"/".join(variant).rstrip("/"): round(1e3 * taken, 5) for variant, taken in seconds.items()}
        self._known[call] = {"chosen": list(chosen), "milliseconds": milliseconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            merged = self._read() | self._known  # another process may have added others meanwhile
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(merged, file, indent=1, sort_keys=True)
            Path(file.name).replace(self.path)
        except OSError as error:
            logger.debug("the choice of a kernel is not kept: %s", error)


@cache
def choices(path: Path) -> Choices:
    """The choices in a file, read once per process."""
    return Choices(path)


def fastest(
    operation: str,
    arguments: Sequence[Any],
    variants: Mapping[VariantKey, Callable[..., Any]],
    *,
    known: Choices | None = None,
) -> tuple[VariantKey, bool]:
    """The fastest of ``variants`` for these arguments, timed at the first call of their kind.

    Args:
        operation: its name.
        arguments: what each variant is called with; those that the operation changes are copied before.
        variants: the computations, the preferred first.
        known: where choices are kept; default the file of the first argument's device.

    Returns:
        The variant, and whether it was found by timing (else it is the preferred one).
    """
    preferred = next(iter(variants))
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    known = choices(file_for(device)) if known is None else known
    call = key(operation, arguments)
    chosen = known.get(call)
    if chosen in variants:
        return chosen, True  # type: ignore[return-value]
    if not enabled() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return preferred, False
    try:
        changed = mutated_arguments(operation)
        own = [argument.clone() if i in changed else argument for i, argument in enumerate(arguments)]
        seconds = time_each(variants, own)
    except torch.OutOfMemoryError:
        logger.debug("no memory to time %s: taking %s", call, "/".join(preferred))
        return preferred, False
    best = min(seconds, key=lambda variant: seconds[variant])
    known.put(call, best, seconds)
    return best, True


def time_each(variants: Mapping[VariantKey, Callable[..., Any]], arguments: Sequence[Any]) -> dict[VariantKey, float]:
    """Median seconds of every variant; they run in turn on the arguments themselves.

    A variant that fails (a kernel that needs more shared memory than this device has) is logged and left out, unless
    all fail.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    working: dict[VariantKey, Callable[..., Any]] = {}
    failed: list[Exception] = []
    for variant, run in variants.items():
        try:
            for _ in range(_WARMUP):
                run(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.debug("%s cannot run here: %s", "/".join(variant), error)
            failed.append(error)
        else:
            working[variant] = run
    if not working:
        raise failed[0]
    seconds: dict[VariantKey, list[float]] = {variant: [] for variant in working}
    for _ in range(ROUNDS):
        for variant, run in working.items():
            seconds[variant].append(_seconds(run, arguments, device))
    return {variant: statistics.median(times) for variant, times in seconds.items()}


def _seconds(run: Callable[..., Any], arguments: Sequence[Any], device: torch.device) -> float:
    """Mean time of a few runs: on the GPU's own clock where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(_RUNS):
            run(*arguments)
        return (time.perf_counter() - start) / _RUNS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        for _ in range(_RUNS):
            run(*arguments)
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _RUNS
