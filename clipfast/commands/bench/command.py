"""``clipfast bench``: measures, or makes something of results that are there; only measuring loads torch."""

from clipfast.commands.bench.options import Options
from clipfast.commands.bench.results import compare_files, draw


def run(options: Options) -> int:
    """Does what the options say; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a file that is no result.
        OSError: a result that cannot be written.
    """
    if options.compare is not None:
        return compare_files(*options.compare)
    if options.chart is not None:
        return draw(options.chart)
    from clipfast.commands.bench.measure import run as measure

    return measure(options)
