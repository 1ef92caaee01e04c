"""``clipfast stats``: one pass over images, and what every head writes of them.

The folder given as ``--out`` is a collection (:mod:`clipfast.dataset.collection`), which the other analyses take in
place of the images; ``stats.json`` has every head's share of the variance and its rank.
"""

from dataclasses import replace

from clipfast.commands import console
from clipfast.commands.collecting import collect
from clipfast.commands.files import write_json
from clipfast.commands.heads import head_rows
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.stats.options import Options

FORMAT = "clipfast.stats/1"
_SHOWN = 12


def run(options: Options) -> int:
    """Collects and summarises; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    found = collect(replace(options.inputs, moments_only=options.moments_only), options.out)
    moments = found.collection.moments
    heads = head_rows(moments) if moments.count > 1 else []
    result = {
        "format": FORMAT,
        "complete": found.complete,
        "images": moments.count,
        "failed": found.failed,
        "collection": str(found.collection.folder),
        "heads": heads,
    }
    write_json(found.collection.folder / "stats.json", result)
    if options.json:
        console.say((found.collection.folder / "stats.json").read_text(encoding="utf-8").rstrip())
    else:
        rows = sorted(heads, key=lambda row: -row["variance"])[:_SHOWN]
        console.table(
            ("head", "share of the heads' variance", "rank"),
            [(f"L{row['layer']}.H{row['head']}", f"{row['share']:.1%}", str(row["rank"])) for row in rows],
            title=f"{moments.count} images, the heads that vary most",
        )
    if not found.complete:
        return INTERRUPTED
    console.note(f"collected in {found.collection.folder}: give that folder to the other analyses")
    return FAILED if found.failed else 0
