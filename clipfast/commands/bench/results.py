"""``clipfast bench --compare`` and ``--chart``: what is made of result files, without measuring or loading anything."""

from pathlib import Path

from clipfast.bench import chart, compare
from clipfast.bench.document import read
from clipfast.commands import console
from clipfast.errors import InputError
from clipfast.files import write_text


def compare_files(a: Path, b: Path) -> int:
    """Prints two result files side by side; returns the exit code.

    Raises:
        InputError: a file that is missing or no result, or files without a case in common.
    """
    first, second = read(a), read(b)
    console.say(compare.markdown(first, second, (str(a), str(b))))
    if not compare.in_both(first, second):
        raise InputError(f"no case is measured in both {a} and {b}")
    return 0


def draw(results: Path) -> int:
    """Draws the chart of a result file beside it; returns the exit code.

    Raises:
        InputError: a file that is missing or no result.
        OSError: the chart cannot be written.
    """
    result = read(results)
    path = results.with_suffix(".svg")
    write_text(path, chart.svg(result))
    console.say(f"chart: {path}")
    return 0
