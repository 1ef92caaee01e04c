"""The command line: it parses arguments into a command's options and runs the command."""

from clipfast.cli.app import app, main

__all__ = ["app", "main"]
