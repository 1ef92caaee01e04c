"""Operations as ``torch.library`` custom ops: what makes them work under ``torch.compile`` and with fake tensors.

A folder of :mod:`clipfast.kernels` registers its operations with :func:`register`. Each becomes
``torch.ops.clipfast.NAME``. Its schema is inferred from the annotations of its fake, the function that gives shapes,
dtypes and layout of the results without computing them; the body asks :mod:`clipfast.kernels.dispatch` which backend
computes. Results are contiguous, whatever the backend. There are no gradients: a decomposition is read, not trained
through.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import clipfast.kernels
from clipfast.kernels import dispatch
from clipfast.kernels.examples import Examples


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation; called with its arguments in order and a backend's name last.

    Attributes:
        name: as in ``torch.ops.clipfast``.
        op: the custom op.
        mutated: positions of the arguments that it changes in place.
        example_arguments: makes small arguments, without the backend.
        compared: positions of the results by which implementations are compared; None for all in floating point.
    """

    name: str
    op: Callable[..., Any]
    mutated: tuple[int, ...]
    example_arguments: Callable[[Examples], list[Any]]
    compared: tuple[int, ...] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Computes it, through the custom op only where that makes a difference.

        The op costs 0.1 ms, more than a small kernel, and more still where the caches are cold. So plain tensors go
        straight to the backend, unless the call is compiled, observed by a dispatch mode (fake tensors, counters), or
        reached by gradients, which the op refuses.
        """
        *inputs, backend = arguments
        choice = self.direct(inputs, backend)
        return self.op(*arguments) if choice is None else choice.run(*inputs)

    def known(self, inputs: Sequence[Any], backend: str) -> dispatch.Choice | None:
        """What computes a call of a kind that was checked and computed before; None for any other.

        A call that asks this first need not check its arguments' shapes, dtypes and devices again.

        Args:
            inputs: the arguments without the backend.
            backend: its name.
        """
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return None
        return dispatch.known(self.name, inputs, backend)

    def direct(self, inputs: Sequence[Any], backend: str) -> dispatch.Choice | None:
        """What computes a call that need not be a custom op; None for one that must.

        Args:
            inputs: the arguments without the backend.
            backend: its name.
        """
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return None
        kind = dispatch.kind(inputs, torch.is_grad_enabled())
        return None if kind is None else dispatch.choose_known(self.name, inputs, backend, kind)


_OPERATIONS: dict[str, Operation] = {}


def register(
    name: str,
    fake: Callable[..., Any],
    example_arguments: Callable[[Examples], list[Any]],
    mutates_args: Sequence[str] = (),
    compared: tuple[int, ...] | None = None,
) -> Operation:
    """Registers an operation of the folder that ``fake`` is defined in.

    Args:
        name: of the operation.
        fake: gives results of the right shape, dtype and layout for tensors without data. The schema comes from its
            annotations; its last parameter is ``backend: str``.
        example_arguments: makes small arguments, without the backend.
        mutates_args: names of the arguments that are changed in place.
        compared: positions of the results by which implementations are compared when they are timed, where others may
            rightly differ, as picks of equal merit do; None for all in floating point.
    """

    def compute(*arguments: Any) -> Any:
        *inputs, backend = arguments  # of any shape: what is known of the calls by name has passed their checks
        return dispatch.choose(name, inputs, backend).run(*inputs)

    schema = torch.library.infer_schema(fake, mutates_args=mutates_args)
    op = torch.library.custom_op(f"clipfast::{name}", compute, mutates_args=mutates_args, schema=schema)
    op.register_fake(fake)
    positions = {parameter: position for position, parameter in enumerate(fake.__annotations__)}
    operation = Operation(name, op, tuple(positions[mutated] for mutated in mutates_args), example_arguments, compared)
    dispatch.add_operation(name, fake.__module__)
    _OPERATIONS[name] = operation
    return operation


def operations() -> Mapping[str, Operation]:
    """Every operation by name; imports all folders of :mod:`clipfast.kernels`."""
    for module in pkgutil.iter_modules(clipfast.kernels.__path__, f"{clipfast.kernels.__name__}."):
        if module.ispkg:
            importlib.import_module(module.name)
    return _OPERATIONS


def operation(name: str) -> Operation | None:
    """The operation of that name, None where there is none."""
    return _OPERATIONS.get(name) or operations().get(name)


def mutated_arguments(name: str) -> tuple[int, ...]:
    """Positions of the arguments that an operation changes in place; none where there is no such operation."""
    known = operation(name)
    return () if known is None else known.mutated
