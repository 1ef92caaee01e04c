"""Which backend computes an operation, and why another one does not.

A backend is a name, the operations it implements and a test of whether it can run here. ``"auto"`` takes the first
that can; naming one that cannot is an error that lists every reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from clipfast.kernels import eager

AUTO = "auto"


class BackendUnavailable(ValueError):
    """The backend asked for does not exist or cannot run here; the message lists every reason."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        name: what ``backend=`` calls it.
        operations: a module with the functions of :mod:`clipfast.kernels.ops`.
        refusals: returns the reasons why it cannot run here, empty when it can.
    """

    name: str
    operations: ModuleType
    refusals: Callable[[], list[str]]


def _never() -> list[str]:
    return []


BACKENDS: tuple[Backend, ...] = (Backend("eager", eager, _never),)
"""In order of preference."""


def choose(name: str = AUTO) -> Backend:
    """The backend called ``name``, or the first that can run for ``"auto"``.

    Raises:
        BackendUnavailable: no backend of that name, or it cannot run here.
    """
    known = [backend.name for backend in BACKENDS]
    if name != AUTO and name not in known:
        raise BackendUnavailable(f"unknown backend {name!r}: choose {AUTO!r} or one of {', '.join(known)}")
    reasons: list[str] = []
    for backend in BACKENDS:
        if name not in (AUTO, backend.name):
            continue
        refused = backend.refusals()
        if not refused:
            return backend
        reasons.append(f"{backend.name}: {', '.join(refused)}")
    raise BackendUnavailable("; ".join(reasons))
