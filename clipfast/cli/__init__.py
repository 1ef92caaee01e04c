"""The command line: argument parsing and nothing else.

One file per group of commands; what a command does is imported when it runs, so that ``clipfast --help`` answers at
once.
"""

from clipfast.cli import looking, measuring, naming
from clipfast.cli.app import app, main

__all__ = ["app", "looking", "main", "measuring", "naming"]
