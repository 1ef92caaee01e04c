"""The tables: a module each, with ``run(bench)``, named as in :data:`clipfast.commands.reproduce.options.TABLES`."""

from collections.abc import Callable
from importlib import import_module

from clipfast.commands.reproduce.results import Result
from clipfast.commands.reproduce.workbench import Workbench


def table(name: str) -> Callable[[Workbench], Result]:
    """What measures a table."""
    run: Callable[[Workbench], Result] = import_module(f"{__name__}.{name}").run
    return run
