"""The application that commands are registered with, and how one ends."""

import functools
from collections.abc import Callable
from typing import Annotated

import typer

import clipfast

app = typer.Typer(
    help="What CLIP's image encoder sees, as an exact sum over layers, heads and patches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clipfast {clipfast.__version__}")
        raise typer.Exit


@app.callback()
def _clipfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Registers a function as the command of its name; what it returns becomes the exit code, errors one line."""

    @functools.wraps(function)
    def answered(**arguments: object) -> None:
        from clipfast.commands.outcome import exit_codes

        with exit_codes():
            code = function(**arguments)
        raise typer.Exit(code)

    app.command()(answered)
    return function


def main() -> None:
    """Runs the command line; exit codes are those of :mod:`clipfast.commands.outcome`."""
    app(prog_name="clipfast")
