"""``clipfast stats``: the earlier name of ``clipfast collect``."""

from clipfast.commands import console
from clipfast.commands.collect import command
from clipfast.commands.stats.options import Options


def run(options: Options) -> int:
    """As ``clipfast collect``, after a note about its name."""
    console.note("`clipfast stats` is now `clipfast collect`: the next version has the new name only")
    return command.run(options)
