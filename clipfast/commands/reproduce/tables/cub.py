"""The ablations of the paper on CUB-200-2011, one of the data sets of the published code."""

from clipfast.commands.reproduce.results import Result
from clipfast.commands.reproduce.tables import ablations
from clipfast.commands.reproduce.workbench import Workbench


def run(bench: Workbench) -> Result:
    """Measures the table."""
    return ablations.run(bench, "cub", "cub")
