"""Finds the fastest variant of an operation by timing, and remembers it on disk.

Which kernel is fastest depends on the device, the shapes and the versions of torch and Triton, and no rule of thumb
holds everywhere. Where an operation has several variants, the first call of each kind compiles them side by side,
compares each result with the operation in plain torch at a higher precision, and times those that agree, as CUDA
graphs of a few runs so that no launch is timed. The fastest is remembered: in memory, and with all times in one JSON
file per device and versions in ``$CLIPFAST_CACHE`` (default ``~/.cache/clipfast``). The number of images is rounded up
to a power of two, so that a smaller last batch is not timed again.

Orders of variants per compute capability ship with the package (``defaults/``), see :class:`Defaults`.
``CLIPFAST_TUNE`` says when they count: 0 always takes their first, untimed; 1 never; by default where they were
measured on such a GPU for this kind of call. It is read when a kind of call is seen for the first time.
"""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels.dispatch import VariantKey
from clipfast.kernels.measuring import (
    Measured,
    Submit,
    compiling,
    copies,
    device_of,
    label,
    measure,
    progress,
    tensors_in,
)

logger = logging.getLogger("clipfast")

_PACKAGES = ("torch", "triton", "clipfast")


def enabled() -> bool:
    """Whether variants are timed at all: not with ``CLIPFAST_TUNE=0``."""
    return os.environ.get("CLIPFAST_TUNE") != "0"


def always() -> bool:
    """Whether they are timed even where the package has measured defaults: with ``CLIPFAST_TUNE=1``."""
    return os.environ.get("CLIPFAST_TUNE") == "1"


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
    return folder() / _file_name(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


@cache
def _file_name(device: str) -> str:
    parts = [device]
    for package in _PACKAGES:
        try:
            parts.append(f"{package}-{version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package}-none")
    return f"{re.sub(r'[^A-Za-z0-9.+_-]+', '-', '_'.join(parts))}.json"


def key(operation: str, arguments: Sequence[Any]) -> str:
    """What calls of one kind share: shapes, dtypes, layout, other arguments; images as a power of two.

    Images are the first size of the first tensor, and any other tensor's where it is the same.
    """
    images = next((argument.shape[0] for argument in tensors_in(arguments) if argument.ndim), -1)
    return f"{operation}({', '.join(_describe(argument, images) for argument in arguments)})"


def _describe(argument: Any, images: int) -> str:
    if isinstance(argument, Tensor):
        first, *others = argument.shape or (1,)
        first = 1 << max(first - 1, 0).bit_length() if first == images else first
        shape = "x".join(str(size) for size in (first, *others))
        return f"{str(argument.dtype).removeprefix('torch.')}[{shape}]{'' if argument.is_contiguous() else 's'}"
    if isinstance(argument, list | tuple):
        return f"{len(argument)}*{_describe(argument[0], images)}" if argument else "none"
    return str(argument)


class Choices:
    """Choices by key, in memory and in one file. Threads may share them.

    Attributes:
        path: the file; it is read once, and written whole under another name and then renamed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = self._read()
        self._lock = threading.Lock()

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
        """Everything known: key → ``{"chosen": [backend, variant], "milliseconds": {…}, "dropped": {…}}``."""
        with self._lock:
            return dict(self._known)

    def put(self, call: str, chosen: VariantKey, measured: "Measured") -> None:
        """Remembers a choice with what it is based on."""
        entry = {
            "chosen": list(chosen),
            "milliseconds": {label(way): round(1e3 * taken, 5) for way, taken in measured.seconds.items()},
        }
        if measured.dropped:
            entry["dropped"] = {label(way): reason for way, reason in measured.dropped.items()}
        with self._lock:
            self._known[call] = entry
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


_choices_lock = threading.Lock()


def choices(path: Path) -> Choices:
    """The choices in a file, read once per process."""
    with _choices_lock:
        return _choices(path)


@cache
def _choices(path: Path) -> Choices:
    return Choices(path)


# --------------------------------------------------------------------------------------------------------- defaults


class Defaults:
    """Orders of variants that ship with the package, for GPUs of one compute capability.

    ``defaults/sm_90.json`` has ``source``, ``"modelled"`` or ``"measured"``; ``device``, the GPU that was measured; and
    ``orders``: key of a call (:func:`key`) → labels, the fastest first. A call of another number of images takes the
    order of the nearest number.

    Attributes:
        measured: whether the orders were timed on such a GPU.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.measured = document.get("source") == "measured"
        self._orders: dict[str, list[str]] = dict(document.get("orders", {}))
        self._by_images: dict[str, list[tuple[float, str]]] = {}
        for call in self._orders:
            general, images = _without_images(call)
            self._by_images.setdefault(general, []).append((images, call))

    def first(self, call: str, variants: Mapping[VariantKey, Any], *, exact: bool = False) -> VariantKey | None:
        """The first variant of the order for a call that is among ``variants``, None where there is none.

        Args:
            call: its key.
            variants: those that there are.
            exact: for this number of images alone.
        """
        order = self._orders.get(call)
        if order is None and not exact:
            general, images = _without_images(call)
            known = self._by_images.get(general)
            order = None if not known else self._orders[min(known, key=lambda each: abs(each[0] - images))[1]]
        by_label = {label(way): way for way in variants}
        return next((by_label[name] for name in order or () if name in by_label), None)


_FIRST_SIZE = re.compile(r"(?<=\[)\d+")


def _without_images(call: str) -> tuple[str, float]:
    """A key without the first size of the tensor that comes first, and that size's logarithm."""
    found = _FIRST_SIZE.search(call)
    if found is None:
        return call, 0.0
    images = found.group()
    # Other tensors' first sizes are images, too, where they are the same number.
    return re.sub(rf"(?<=\[){images}(?=[x\]])", "B", call), math.log2(max(1, int(images)))


DEFAULTS = Path(__file__).parent / "defaults"


@cache
def defaults(capability: int) -> Defaults:
    """Those for a GPU's compute capability (80, 90, 100), or for its generation (86 → 80); empty ones for others."""
    for known in dict.fromkeys((capability, capability // 10 * 10)):
        file = DEFAULTS / f"sm_{known}.json"
        if file.is_file():
            return Defaults(json.loads(file.read_text(encoding="utf-8")))
    return Defaults({})


def orders(entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """The order of every call's variants by their times, from :meth:`Choices.items`, as :class:`Defaults` has them."""
    return {
        call: sorted(entry["milliseconds"], key=entry["milliseconds"].__getitem__)
        for call, entry in sorted(entries.items())
        if isinstance(entry, Mapping) and entry.get("milliseconds")
    }


def defaults_document(
    capability: int, added: Mapping[str, Sequence[str]], *, source: str, device: str | None = None
) -> dict[str, Any]:
    """The content of ``defaults/sm_CAPABILITY.json``; orders that it has already are kept where none is added.

    Args:
        capability: of the GPU, 80, 90, 100.
        added: :func:`orders` of what was measured.
        source: ``"measured"`` or ``"modelled"``; a measured file holds no modelled orders.
        device: name of the GPU that was measured.
    """
    file = DEFAULTS / f"sm_{capability}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = before.get("orders", {}) if before.get("source") == source else {}
    merged = {call: list(order) for call, order in sorted((kept | dict(added)).items())}
    return {"capability": capability, "source": source, "device": device, "orders": merged}


def _default(device: torch.device, call: str, variants: Mapping[VariantKey, Any], exact: bool) -> VariantKey | None:
    """The shipped default of a call on a GPU; with ``exact`` one that was measured for this number of images."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    shipped = defaults(10 * major + minor)
    return shipped.first(call, variants, exact=exact) if shipped.measured or not exact else None


# ----------------------------------------------------------------------------------------------------------- timing


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
        The variant, and whether it was found by timing (else it is a default or the preferred one).
    """
    device = device_of(arguments)
    known = choices(file_for(device)) if known is None else known
    call = key(operation, arguments)
    chosen = known.get(call)
    if chosen in variants:
        return chosen, True  # type: ignore[return-value]
    if _thread.ahead is not None:
        _thread.ahead.add(operation, arguments, variants)
        return next(iter(variants)), False
    if not enabled():
        return _default(device, call, variants, exact=False) or next(iter(variants)), False
    default = None if always() else _default(device, call, variants, exact=True)
    if default is not None:
        return default, True
    if postponed(device):  # a capture may not wait for the GPU
        return _default(device, call, variants, exact=False) or next(iter(variants)), False
    try:
        with progress(f"timing {len(variants)} ways of {operation}, once on this machine"):
            measured = measure(operation, arguments, variants)
    except torch.OutOfMemoryError:
        logger.debug("no memory to time %s: taking %s", call, label(next(iter(variants))))
        return next(iter(variants)), False
    best = min(measured.seconds, key=lambda variant: measured.seconds[variant])
    known.put(call, best, measured)
    return best, True


def postponed(device: torch.device) -> bool:
    """Whether nothing is timed now that may be later: in a capture, and while kernels are compiled ahead."""
    return _thread.ahead is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


# ------------------------------------------------------------------------------------------------------------ ahead


class _Ahead:
    """Collects the kinds of calls of a forward whose kernels are not run, and has their kernels compiled."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._seen: set[str] = set()

    def add(self, operation: str, arguments: Sequence[Any], variants: Mapping[VariantKey, Any]) -> None:
        call = key(operation, arguments)
        if call not in self._seen:
            self._seen.add(call)
            self._submit(variants, copies(operation, arguments))


class _Thread(threading.local):
    ahead: _Ahead | None = None


_thread = _Thread()


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """A context whose calls compile the kernels of all their variants, side by side, and run no kernel of Triton's.

    Results in it are memory that nobody wrote. A forward in it takes milliseconds; at the end all its kernels, 65 or so
    for a model, are waited for. One after the other they take about a minute.
    """
    with compiling() as submit:
        _thread.ahead = _Ahead(submit)
        try:
            yield
        finally:
            _thread.ahead = None
