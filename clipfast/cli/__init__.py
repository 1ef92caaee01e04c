"""The command line: argument parsing and nothing else.

One file per group of commands; what a command does is imported when it runs, so that ``clipfast --help`` answers at
once.
"""

from clipfast.cli import ablating, looking, measuring, naming, reporting, retrieving, segmenting
from clipfast.cli.app import app, main

__all__ = ["ablating", "app", "looking", "main", "measuring", "naming", "reporting", "retrieving", "segmenting"]
