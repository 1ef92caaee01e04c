"""Chooses the backend that computes a call, and says why the others do not.

A backend is a name and two tests: can it run on this machine, and should ``"auto"`` consider it for a tensor? It has
an operation where the operation's folder has a file of its name, ``attention/triton.py``, whose ``IMPLEMENTATIONS``
say which arguments they support. These files are imported when they are first needed.

``"auto"`` chooses per call: the backends are tried in order of preference, and where several support the arguments on
a GPU, the fastest is found by running them once (:mod:`clipfast.kernels.tuning`). A backend chosen by name must
support the call, else the error lists every reason. Only operations that a named backend does not have at all are
computed by ``eager``, which has all of them.

A choice is made once per :func:`kind` of call and device, and then kept with its reasons: a known call reads no file
and asks no backend. The kind has everything that a reason may depend on.
"""

import importlib
import importlib.util
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from clipfast.kernels import cuda, native

AUTO = "auto"
Variant = tuple[str, Callable[..., Any]]
"""One way to run an implementation: its label and the function."""
VariantKey = tuple[str, str]
"""A backend's name and the label of one of its variants."""


class BackendUnavailable(ValueError):
    """The requested backend does not exist, or cannot run here; the message lists every reason."""


_NO_REASONS: list[str] = []


def _no_reasons(*arguments: Any) -> list[str]:
    return _NO_REASONS


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of one operation.

    Attributes:
        run: computes it from the operation's arguments.
        unsupported_reasons: the reasons why ``run`` cannot take given arguments, empty when it can.
        variants: labelled variants of ``run`` for given arguments, the preferred first; None where there is only one.
        auto_skip_reasons: the reasons why ``"auto"`` passes it over for given arguments although it supports them.
    """

    run: Callable[..., Any]
    unsupported_reasons: Callable[..., list[str]] = _no_reasons
    variants: Callable[..., Sequence[Variant]] | None = None
    auto_skip_reasons: Callable[..., list[str]] = _no_reasons


@dataclass(frozen=True)
class Backend:
    """A set of implementations that share their requirements.

    Attributes:
        name: what ``backend=`` calls it, and the name of its file in an operation's folder.
        unsupported_reasons: the reasons why it cannot run on this machine, empty when it can.
        auto_skip_reasons: the reasons why ``"auto"`` passes it over for a tensor although it could run.
    """

    name: str
    unsupported_reasons: Callable[[], list[str]] = _no_reasons
    auto_skip_reasons: Callable[[Tensor], list[str]] = _no_reasons

    def implementation(self, operation: str) -> Implementation | None:
        """Its implementation of an operation, None where it has none."""
        return implementation(operation, self.name)

    def implementations(self) -> Mapping[str, Implementation]:
        """All its implementations by operation."""
        from clipfast.kernels.registration import operations

        pairs = ((operation, self.implementation(operation)) for operation in operations())
        return {operation: own for operation, own in pairs if own is not None}


# ------------------------------------------------------------------------------------ operations and their folders

_PACKAGES: dict[str, str] = {}  # operation → the package of its folder


def add_operation(name: str, package: str) -> None:
    """Makes an operation known, with the package that holds the backends' files."""
    _PACKAGES[name] = package


@cache
def implementation(operation: str, backend: str) -> Implementation | None:
    """A backend's implementation of an operation, None where the operation's folder has no file for it."""
    if operation not in _PACKAGES:
        from clipfast.kernels.registration import operations

        operations()
    module = f"{_PACKAGES[operation]}.{backend}"
    if importlib.util.find_spec(module) is None:
        return None
    implementations: Mapping[str, Implementation] = importlib.import_module(module).IMPLEMENTATIONS
    return implementations.get(operation)


# ------------------------------------------------------------------------------------------------------ the backends


@cache
def _triton_import() -> str | None:
    """Why Triton cannot be imported, None when it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in its own ways
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _interpreter_faults() -> list[str]:
    """Why Triton's interpreter cannot run: before 3.8 it passes arrays to ``range``, which numpy 2.4 rejects."""
    import numpy
    import triton

    old, new = (tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy))
    if old < (3, 8) and new >= (2, 4):
        return [f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}"]
    return []


@cache
def _triton_unsupported() -> list[str]:
    failed = _triton_import()
    if failed is not None:
        return [failed]
    if _is_interpreted():
        return _interpreter_faults()
    if torch.cuda.is_available():
        return []
    return ["no GPU (TRITON_INTERPRET=1 set before the start interprets it on the CPU, slowly, for tests)"]


_NOT_ON_GPU, _NOT_ON_CPU = ["the tensors are not on a GPU"], ["the tensors are not on the CPU"]


def _skip_unless_on_gpu(tensor: Tensor) -> list[str]:
    return _NO_REASONS if tensor.is_cuda else _NOT_ON_GPU


def _skip_unless_on_cpu(tensor: Tensor) -> list[str]:
    return _NO_REASONS if tensor.is_cpu else _NOT_ON_CPU


def _triton_skip(tensor: Tensor) -> list[str]:
    if not tensor.is_cuda:
        return _NOT_ON_GPU
    if _triton_import() is not None:
        return []  # then that is the reason
    return ["TRITON_INTERPRET=1 interprets the kernels: backend='triton' asks for that"] if _is_interpreted() else []


EAGER = Backend("eager")
BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", cuda.unsupported_reasons, _skip_unless_on_gpu),
    Backend("triton", _triton_unsupported, _triton_skip),
    Backend("native", native.unsupported_reasons, _skip_unless_on_cpu),
    EAGER,
)
"""In order of preference."""


def check(name: str) -> None:
    """Raises unless ``backend=name`` can be used here: ``"auto"``, or a backend that can run on this machine.

    Raises:
        BackendUnavailable: no backend of that name, or it cannot run here.
    """
    if name != AUTO:
        _by_name(name)


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            reasons = backend.unsupported_reasons()
            if reasons:
                raise BackendUnavailable(f"{name}: {', '.join(reasons)}")
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise BackendUnavailable(f"unknown backend {name!r}: choose {AUTO!r} or one of {known}")


# ------------------------------------------------------------------------------------------------------- the choice


def unsupported_reasons(backend: Backend, operation: str, arguments: Sequence[Any]) -> list[str]:
    """Every reason why a backend cannot compute an operation with these arguments.

    Args:
        backend: which.
        operation: its name.
        arguments: what the operation is called with, a tensor first.
    """
    reasons = backend.unsupported_reasons()
    if reasons:
        return reasons
    own = implementation(operation, backend.name)
    return [f"has no {operation}"] if own is None else own.unsupported_reasons(*arguments)


def _auto_reasons(backend: Backend, operation: str, arguments: Sequence[Any]) -> list[str]:
    """Every reason why ``"auto"`` does not take a backend for a call, whether it could compute it or not."""
    reasons = backend.auto_skip_reasons(arguments[0]) or backend.unsupported_reasons()
    if reasons:
        return reasons
    own = implementation(operation, backend.name)
    if own is None:
        return [f"has no {operation}"]
    return own.auto_skip_reasons(*arguments) or own.unsupported_reasons(*arguments)


def kind(arguments: Sequence[Any], grad_enabled: bool) -> tuple[Hashable, ...] | None:
    """What a choice may depend on, equal for calls that the same implementation computes.

    Of a tensor that is shape, strides, dtype, device, the alignment of its address to 16 bytes, whether it has one, and
    whether it is a negated view; of anything else its value; and whether gradients are enabled. The number of images is
    not rounded here, as it is where variants are timed: backends may support one number and not the next.

    Args:
        arguments: what the operation is called with, a tensor first.
        grad_enabled: ``torch.is_grad_enabled()``.

    Returns:
        None for a call that torch must see, since gradients reach a tensor or it is of a subclass; an empty tuple where
        a tensor cannot be compared, since it has no strides or no memory.
    """
    facts: list[Hashable] = [grad_enabled]
    try:
        for argument in arguments:
            type_ = type(argument)
            if type_ is Tensor or type_ is Parameter:
                if grad_enabled and argument.requires_grad:
                    return None
                address = argument.data_ptr()
                facts += (
                    argument.shape,
                    argument.stride(),
                    argument.dtype,
                    argument.device,
                    address & 15 if address else -1,
                    argument.is_neg(),
                )
            elif type_ is list or type_ is tuple:
                own = kind(argument, grad_enabled)
                if not own:
                    return own
                facts.append(own)
            elif isinstance(argument, Tensor):
                return None
            else:
                facts.append(argument)
    except RuntimeError:  # no strides or no memory
        return ()
    return tuple(facts)


class Choice(NamedTuple):
    """What computes one call.

    Attributes:
        backend: its name.
        variant: label of the variant, empty where there is only one.
        run: the computation.
        skipped: reasons of the backends that were tried before it, by name.
        tuned: whether it was found by timing.
        final: whether it holds for later calls of the kind, too: not where timing was put off.
    """

    backend: str
    variant: str
    run: Callable[..., Any]
    skipped: Mapping[str, Sequence[str]]
    tuned: bool = False
    final: bool = True


class _Known:
    """The choices of one device's calls.

    Attributes:
        choices: by operation, backend and kind. Read without a lock; entries are only added, and all go at once.
        lock: held while a choice is made: timing is not disturbed by another, and no kind is timed twice.
    """

    def __init__(self) -> None:
        self.choices: dict[Hashable, Choice] = {}
        self.lock = threading.RLock()


MOST_KNOWN = 4096
"""Kinds of calls known per device, about 1 kB each; with more, all are forgotten."""
_known: dict[torch.device, _Known] = {}
_known_backends: tuple[Backend, ...] = BACKENDS


def forget() -> None:
    """Forgets all choices, and which files backends have: for tests that change what there is."""
    global _known, _known_backends
    _known, _known_backends = {}, BACKENDS
    implementation.cache_clear()


def known_calls(device: torch.device) -> int:
    """How many kinds of calls are known for a device."""
    return len(_known[device].choices) if device in _known else 0


def known(operation: str, arguments: Sequence[Any], name: str) -> Choice | None:
    """The choice that was made for calls of this kind, None where none is known.

    Args:
        operation: its name.
        arguments: what the operation is called with, a tensor first.
        name: ``"auto"`` or a backend's name.
    """
    if _known_backends is not BACKENDS:
        return None
    of_device = _known.get(arguments[0].device)
    if of_device is None:
        return None
    return of_device.choices.get((operation, name, kind(arguments, torch.is_grad_enabled())))


def choose_known(
    operation: str, arguments: Sequence[Any], name: str = AUTO, own: tuple[Hashable, ...] | None = None
) -> Choice:
    """:func:`choose`, made once for all calls of a kind.

    Args:
        operation: its name.
        arguments: what the operation is called with, a tensor first.
        name: ``"auto"`` or a backend's name.
        own: :func:`kind` of the arguments, where it was computed before.

    Raises:
        BackendUnavailable: as for :func:`choose`.
    """
    own = kind(arguments, torch.is_grad_enabled()) if own is None else own
    if not own:
        return choose(operation, arguments, name)
    if _known_backends is not BACKENDS:
        forget()
    device, key = arguments[0].device, (operation, name, own)
    of_device = _known.get(device) or _known.setdefault(device, _Known())  # setdefault is atomic
    choice = of_device.choices.get(key)
    if choice is not None:
        return choice
    with of_device.lock:
        choice = of_device.choices.get(key)
        if choice is None:
            choice = choose(operation, arguments, name)
            if choice.final:
                if len(of_device.choices) >= MOST_KNOWN:
                    of_device.choices.clear()
                of_device.choices[key] = choice
    return choice


def choose(operation: str, arguments: Sequence[Any], name: str = AUTO) -> Choice:
    """Chooses what computes one call, whether calls of its kind are known or not.

    Args:
        operation: its name.
        arguments: what the operation is called with, a tensor first.
        name: ``"auto"`` or a backend's name.

    Raises:
        BackendUnavailable: no backend of that name, or it does not support these arguments; with every reason.
    """
    if name == AUTO:
        return _choose_automatically(operation, arguments)
    backend = _by_name(name)
    if implementation(operation, name) is None:
        backend = EAGER
    reasons = unsupported_reasons(backend, operation, arguments)
    if reasons:
        raise BackendUnavailable(f"{backend.name} cannot compute {operation}: {', '.join(reasons)}")
    return _fastest(operation, arguments, [backend], {})


def candidates(
    operation: str, arguments: Sequence[Any], limit: int | None = None
) -> tuple[list[Backend], dict[str, Sequence[str]]]:
    """The backends that ``"auto"`` may take for a call, the preferred first, and the reasons of the others by name.

    Args:
        operation: its name.
        arguments: what the operation is called with, a tensor first.
        limit: stop after this many candidates; None tries every backend.
    """
    usable: list[Backend] = []
    skipped: dict[str, Sequence[str]] = {}
    for backend in BACKENDS:
        reasons = _auto_reasons(backend, operation, arguments)
        if reasons:
            skipped[backend.name] = reasons
            continue
        usable.append(backend)
        if len(usable) == limit:
            break
    return usable, skipped


def _choose_automatically(operation: str, arguments: Sequence[Any]) -> Choice:
    # Only on a GPU several backends are timed against each other.
    usable, skipped = candidates(operation, arguments, None if arguments[0].is_cuda else 1)
    if not usable:
        reasons = "; ".join(f"{backend}: {', '.join(own)}" for backend, own in skipped.items())
        raise BackendUnavailable(f"nothing computes {operation}: {reasons}")
    return _fastest(operation, arguments, usable, skipped)


def variants(
    operation: str, arguments: Sequence[Any], backends: Sequence[Backend]
) -> dict[VariantKey, Callable[..., Any]]:
    """Every variant that these backends have for a call, the preferred first.

    Args:
        operation: its name.
        arguments: what the operation is called with.
        backends: which; each has the operation.
    """
    runs: dict[VariantKey, Callable[..., Any]] = {}
    for backend in backends:
        own = backend.implementation(operation)
        assert own is not None
        labelled = [("", own.run)] if own.variants is None else own.variants(*arguments)
        runs |= {(backend.name, label): run for label, run in labelled}
    return runs


def _fastest(
    operation: str, arguments: Sequence[Any], usable: Sequence[Backend], skipped: Mapping[str, Sequence[str]]
) -> Choice:
    if len(usable) == 1 or not arguments[0].is_cuda:
        preferred = implementation(operation, usable[0].name)
        assert preferred is not None
        if preferred.variants is None:
            return Choice(usable[0].name, "", preferred.run, skipped)
    runs = variants(operation, arguments, usable)
    if len(runs) == 1 or not arguments[0].is_cuda:
        (backend_name, label), run = next(iter(runs.items()))
        return Choice(backend_name, label, run, skipped)
    from clipfast.kernels import tuning

    (backend_name, label), tuned = tuning.fastest(operation, arguments, runs)
    final = tuned or not tuning.postponed(arguments[0].device)
    return Choice(backend_name, label, runs[backend_name, label], skipped, tuned, final)
