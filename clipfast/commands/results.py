"""The folder that a command writes its results into."""

from pathlib import Path

from clipfast.commands.files import prepare_folder
from clipfast.commands.options import ImageOptions
from clipfast.dataset.manifest import is_collection, refuse_collection


def prepare_results(folder: Path, inputs: ImageOptions | None = None) -> Path:
    """Creates the folder of ``--out`` and checks that files can be written in it, before anything slow begins.

    Args:
        folder: the folder.
        inputs: for commands that collect the images they are given into this same folder, which may then hold the
            collection of an earlier run; None for others.

    Raises:
        InputError: it holds a collection, or it cannot be written.
    """
    collects = inputs is not None and not (len(inputs.images) == 1 and is_collection(inputs.images[0]))
    if not collects:
        refuse_collection(folder)
    return prepare_folder(folder)
