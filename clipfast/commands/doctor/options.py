"""Options of ``clipfast doctor``."""

from dataclasses import dataclass

from clipfast.commands.options import Flag


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what this installation has: versions, processor, devices, backends, the bundled model.

    Attributes:
        json: Print JSON instead of the table.
    """

    json: Flag = False
