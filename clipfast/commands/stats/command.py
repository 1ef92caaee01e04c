"""``clipfast stats``: one pass over images, and how much every head's output varies over them.

The folder given as ``--out`` is a collection (:mod:`clipfast.dataset.collection`), which the other analyses take in
place of the images. ``stats.json`` has every head's share of the variance and its rank.
"""

from clipfast.commands import console
from clipfast.commands.collecting import EXACT, collect
from clipfast.commands.files import write_json
from clipfast.commands.heads import head_rows
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.stats.options import Options
from clipfast.dataset.passes import PassOptions

FORMAT = "clipfast.stats/1"
_SHOWN = 12


def run(options: Options) -> int:
    """Collects the images and summarises them; returns the exit code.

    An unfinished collection is summarised too, with a warning and exit code 2.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    how = PassOptions(retry_failed=True) if options.moments_only else EXACT
    collected = collect(options.inputs, options.out, unfinished=True, how=how)
    collection = collected.collection
    moments = collection.moments
    heads = head_rows(moments) if moments.count > 1 else []
    result = {
        "format": FORMAT,
        "complete": collection.complete,
        "images": moments.count,
        "failed": collection.failed,
        "device": str(collected.model.device),
        "collection": str(collection.folder),
        "heads": heads,
    }
    write_json(collection.folder / "stats.json", result)
    if options.json:
        console.say((collection.folder / "stats.json").read_text(encoding="utf-8").rstrip())
    else:
        rows = sorted(heads, key=lambda row: -row["variance"])[:_SHOWN]
        console.table(
            ("head", "share of the heads' variance", "rank"),
            [(f"L{row['layer']}.H{row['head']}", f"{row['share']:.1%}", str(row["rank"])) for row in rows],
            title=f"{moments.count} images, the heads that vary most",
        )
    if not collected.complete:
        return INTERRUPTED
    if not collection.complete:
        return FAILED
    console.note(f"collected in {collection.folder}: give that folder to the other analyses")
    return FAILED if collected.failed else 0
