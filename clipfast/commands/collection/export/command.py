"""``clipfast collection export``: a collection in the layout of other programs."""

from pathlib import Path

from clipfast.commands import console
from clipfast.commands.collection.export import text_span
from clipfast.commands.collection.export.options import Options
from clipfast.commands.files import prepare_folder
from clipfast.commands.heads import chosen_heads
from clipfast.commands.quantities import plural
from clipfast.dataset.exporting import export
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.merging import load_basis


def run(options: Options) -> int:
    """Writes the images of a collection; returns the exit code.

    Raises:
        ClipfastError: no finished collection, a damaged one, or something that was not kept.
        OSError: the files cannot be written.
    """
    options.check()
    out = options.out or Path("out/export.parquet" if options.layout == "parquet" else "out/export")
    if options.layout == "clip_text_span":
        prepare_folder(out.parent)
        count = text_span.export(options.collection, out, options.text_span, options.heads)
        console.say(f"{plural(count, 'image')} in {out}")
        return 0
    manifest = Manifest(options.collection)
    heads = None
    if options.heads is not None:
        layers = manifest.settings.model["layers"]
        heads = chosen_heads(options.heads, load_basis(options.collection), range(layers))
    prepare_folder(out.parent)
    total = sum(record.count for record in manifest.records())
    with console.progress("exporting", total) as advance:
        count = export(options.collection, out, options.layout, heads=heads, dtype=options.dtype, progress=advance)
    console.say(f"{plural(count, 'image')} in {out}")
    return 0
