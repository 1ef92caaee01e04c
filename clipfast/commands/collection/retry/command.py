"""``clipfast collection retry``: units with failures that may be gone, with the settings and the plan of their pass."""

import contextlib
from dataclasses import replace

from clipfast.commands.collect.command import collect
from clipfast.commands.collection.retry.options import Options
from clipfast.commands.reopening import kept_options
from clipfast.dataset.manifest import Manifest


def run(options: Options) -> int:
    """Computes units again; returns the exit code.

    Raises:
        ClipfastError: no collection, or a model or images that are not there any more.
        KeyboardInterrupt: a signal has arrived; what is done is kept.
        OSError: a file cannot be written.
    """
    folder = Manifest(options.collection).folder.absolute()
    base, before = kept_options(folder)
    again = replace(
        before,
        data=replace(before.data, device=options.device),
        retry_failed=True,
        run=options.run,
        json=options.json,
    )
    with contextlib.chdir(base):  # where relative paths are from
        return collect(again, folder=folder, retry_changed=options.changed)
