"""Which backend computes an operation, and why another one does not.

A backend is a name, a test of whether it can run on this machine, and its implementations, one per operation; an
implementation says of given arguments whether it can take them. ``"auto"`` chooses per call: the backends are asked in
order of preference, and where several can take the arguments on a GPU the fastest is found by running them once
(:mod:`clipfast.kernels.tuning`). A backend that is named must be able to: else the error lists every reason. Only
operations that a named backend does not have at all are left to ``eager``, which has all of them.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import cuda, native

AUTO = "auto"
Variant = tuple[str, Callable[..., Any]]


class BackendUnavailable(ValueError):
    """The backend asked for does not exist or cannot run here; the message lists every reason."""


def _nothing(*arguments: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Implementation:
    """One backend's way of computing one operation.

    Attributes:
        run: the computation, with the operation's arguments.
        refuses: the reasons why it cannot take given arguments, empty when it can.
        variants: named ways to run it for given arguments, the preferred first; ``run`` alone where there is one.
    """

    run: Callable[..., Any]
    refuses: Callable[..., list[str]] = _nothing
    variants: Callable[..., Sequence[Variant]] | None = None


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        name: what ``backend=`` calls it.
        module: the module with its ``IMPLEMENTATIONS``, imported when it is first needed.
        refusals: returns the reasons why it cannot run on this machine, empty when it can.
        unasked: returns the reasons why ``"auto"`` leaves it alone for a tensor although it could run.
    """

    name: str
    module: str
    refusals: Callable[[], list[str]] = _nothing
    unasked: Callable[[Tensor], list[str]] = _nothing

    def implementations(self) -> Mapping[str, Implementation]:
        """Its implementations by operation."""
        module = sys.modules.get(self.module) or importlib.import_module(self.module)
        found: Mapping[str, Implementation] = module.IMPLEMENTATIONS
        return found


@cache
def _triton_import() -> str | None:
    """Why Triton cannot be imported, None when it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in its own ways
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _interpreter_faults() -> list[str]:
    """Why Triton's interpreter cannot run: before 3.8 it hands arrays to ``range``, which numpy 2.4 refuses."""
    import numpy
    import triton

    old, new = (tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy))
    if old < (3, 8) and new >= (2, 4):
        return [f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}"]
    return []


@cache
def _triton_refusals() -> list[str]:
    failed = _triton_import()
    if failed is not None:
        return [failed]
    if _interpreted():
        return _interpreter_faults()
    if torch.cuda.is_available():
        return []
    return ["no GPU (TRITON_INTERPRET=1 set before the start interprets it on the CPU, slowly, for tests)"]


def _cuda_unasked(tensor: Tensor) -> list[str]:
    return [] if tensor.is_cuda else ["the tensors are not on a GPU"]


def _native_unasked(tensor: Tensor) -> list[str]:
    return [] if tensor.is_cpu else ["the tensors are not on the CPU"]


def _triton_unasked(tensor: Tensor) -> list[str]:
    if not tensor.is_cuda:
        return ["the tensors are not on a GPU"]
    if _triton_import() is not None:
        return []  # then that is the reason
    return ["TRITON_INTERPRET=1 interprets the kernels: name the backend to have that"] if _interpreted() else []


EAGER = Backend("eager", "clipfast.kernels.eager")
BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", "clipfast.kernels.cuda_ops", cuda.refusals, _cuda_unasked),
    Backend("triton", "clipfast.kernels.triton_ops", _triton_refusals, _triton_unasked),
    Backend("native", "clipfast.kernels.native_ops", native.refusals, _native_unasked),
    EAGER,
)
"""In order of preference."""


def check(name: str) -> None:
    """Raises unless a backend can be named here: ``"auto"``, or one that exists and can run on this machine.

    Raises:
        BackendUnavailable: no backend of that name, or it cannot run here.
    """
    if name != AUTO:
        _named(name)


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            refused = backend.refusals()
            if refused:
                raise BackendUnavailable(f"{name}: {', '.join(refused)}")
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise BackendUnavailable(f"unknown backend {name!r}: choose {AUTO!r} or one of {known}")


def refusals(backend: Backend, operation: str, arguments: Sequence[Any], *, asked: bool) -> list[str]:
    """Every reason why a backend does not compute an operation with these arguments.

    Args:
        backend: which.
        operation: its name in :mod:`clipfast.kernels.ops`.
        arguments: what the operation is called with, a tensor first.
        asked: whether it was named, or is considered by ``"auto"``.
    """
    reasons = ([] if asked else backend.unasked(arguments[0])) or backend.refusals()
    if reasons:
        return reasons
    implementation = backend.implementations().get(operation)
    return [f"has no {operation}"] if implementation is None else implementation.refuses(*arguments)


@dataclass(frozen=True)
class Choice:
    """What computes one call.

    Attributes:
        backend: its name.
        variant: which of its ways, empty where it has one.
        run: the computation.
        refused: the other backends' reasons, by name.
        tuned: whether it was found by timing.
    """

    backend: str
    variant: str
    run: Callable[..., Any]
    refused: Mapping[str, Sequence[str]]
    tuned: bool = False


def choose(operation: str, arguments: Sequence[Any], name: str = AUTO) -> Choice:
    """The implementation for one call.

    Args:
        operation: its name in :mod:`clipfast.kernels.ops`.
        arguments: what the operation is called with, a tensor first.
        name: ``"auto"`` or a backend's name.

    Raises:
        BackendUnavailable: no backend of that name, or it cannot take these arguments; with every reason.
    """
    if name == AUTO:
        return _best(operation, arguments)
    backend = _named(name)
    if operation not in backend.implementations():
        backend = EAGER
    reasons = refusals(backend, operation, arguments, asked=True)
    if reasons:
        raise BackendUnavailable(f"{backend.name} cannot compute {operation}: {', '.join(reasons)}")
    return _fastest(operation, arguments, [backend], {})


def candidates(
    operation: str, arguments: Sequence[Any], most: int | None = None
) -> tuple[list[Backend], dict[str, Sequence[str]]]:
    """The backends that ``"auto"`` may take for a call, the preferred first, and the reasons of the others by name.

    Args:
        operation: its name in :mod:`clipfast.kernels.ops`.
        arguments: what the operation is called with, a tensor first.
        most: how many are enough: no more are asked; None asks all.
    """
    able: list[Backend] = []
    refused: dict[str, Sequence[str]] = {}
    for backend in BACKENDS:
        reasons = refusals(backend, operation, arguments, asked=False)
        if reasons:
            refused[backend.name] = reasons
            continue
        able.append(backend)
        if len(able) == most:
            break
    return able, refused


def _best(operation: str, arguments: Sequence[Any]) -> Choice:
    timed = arguments[0].is_cuda  # only there several are timed against each other
    able, refused = candidates(operation, arguments, None if timed else 1)
    if not able:
        told = "; ".join(f"{backend}: {', '.join(reasons)}" for backend, reasons in refused.items())
        raise BackendUnavailable(f"nothing computes {operation}: {told}")
    return _fastest(operation, arguments, able, refused)


def ways(
    operation: str, arguments: Sequence[Any], backends: Sequence[Backend]
) -> dict[tuple[str, str], Callable[..., Any]]:
    """Every way that these backends have for a call, by backend and variant, the preferred first."""
    found: dict[tuple[str, str], Callable[..., Any]] = {}
    for backend in backends:
        implementation = backend.implementations()[operation]
        if implementation.variants is None:
            found[backend.name, ""] = implementation.run
        else:
            found |= {(backend.name, label): run for label, run in implementation.variants(*arguments)}
    return found


def _fastest(
    operation: str, arguments: Sequence[Any], able: Sequence[Backend], refused: Mapping[str, Sequence[str]]
) -> Choice:
    first = able[0].implementations()[operation]
    if first.variants is None and (len(able) == 1 or not arguments[0].is_cuda):
        return Choice(able[0].name, "", first.run, refused)
    known = ways(operation, arguments, able)
    if len(known) == 1 or not arguments[0].is_cuda:
        (backend_name, variant), run = next(iter(known.items()))
        return Choice(backend_name, variant, run, refused)
    from clipfast.kernels import tuning

    (backend_name, variant), tuned = tuning.fastest(operation, arguments, known)
    return Choice(backend_name, variant, known[backend_name, variant], refused, tuned)
