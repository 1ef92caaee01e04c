"""``clipfast collection merge``: the parts of a pass, or passes over different images, as one collection."""

from clipfast.commands import console
from clipfast.commands.collect.command import summarise
from clipfast.commands.collection.merge.options import Options
from clipfast.commands.files import prepare_folder
from clipfast.commands.reopening import for_all
from clipfast.dataset.combining import merge
from clipfast.inputs import printable


def run(options: Options) -> int:
    """Joins parts and summarises the whole; returns the exit code.

    Raises:
        ClipfastError: parts that do not belong together, with every reason, or units that no part has.
        OSError: the folder cannot be written.
    """
    prepare_folder(options.out)
    with console.status("merging"):
        merged = merge(options.parts, options.out, duplicates="report" if options.allow_duplicates else "refuse")
    if merged.duplicates:
        console.warn(f"several of these have images of the same name: {', '.join(map(printable, merged.duplicates))}")
    for_all(merged.parts, options.out)
    return summarise(options.out, as_json=options.json)
