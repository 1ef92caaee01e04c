"""The application that commands are registered with."""

import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter

import clipfast
from clipfast.commands import console
from clipfast.commands.outcome import FAILED, exit_code_of

COMMANDS = (
    "demo",
    "decompose",
    "scenes",
    "collect",
    "collection",
    "plan",
    "stats",
    "textspan",
    "ablate",
    "segment",
    "explain",
    "retrieve",
    "report",
    "reproduce",
    "bench",
    "models",
    "doctor",
)
"""Folders of :mod:`clipfast.commands`: ``options.py`` has ``Options``, ``command.py`` has ``run(options)``."""

GROUPS = {"collection": ("info", "validate", "retry", "merge", "export")}
"""Commands with commands of their own, each a folder in the folder of the group."""
_GROUP_HELP = {"collection": "Say what a collection holds, check it, complete it, join parts, write it for others."}

app = App(
    name="clipfast",
    help="What CLIP's image encoder sees, as an exact sum over layers, heads and patches.",
    version=f"clipfast {clipfast.__version__}",
    help_flags=("-h", "--help"),
    version_flags="--version",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
for _name in COMMANDS:
    if _name in GROUPS:
        _group = App(name=_name, help=_GROUP_HELP[_name])
        for _part in GROUPS[_name]:
            _group.command(import_module(f"clipfast.commands.{_name}.{_part}.options").Options, name=_part)
        app.command(_group)
    else:
        app.command(import_module(f"clipfast.commands.{_name}.options").Options, name=_name)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; returns the exit code (see :mod:`clipfast.commands.outcome`)."""
    return exit_code_of(partial(_run, arguments))


def _run(arguments: Sequence[str]) -> int:
    try:
        options = app(arguments, console=console.help_console())
    except CycloptsError as error:
        console.error(f"{error} See `clipfast --help`")
        return FAILED
    if options is None:  # after --help and --version
        return 0
    # the command's module imports torch: only now, when it is clear that there is something to do
    module = type(options).__module__.rpartition(".")[0]
    code: int = import_module(f"{module}.command").run(options)
    return code


def main() -> NoReturn:
    """The program ``clipfast``."""
    code = run(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python shuts down prints no traceback
    sys.exit(code)
