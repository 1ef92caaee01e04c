"""Zero-shot segmentation beside other methods: experiment 7 of the paper."""

from typing import Any, get_args

from clipfast.analyses.groundtruth import MaskProtocol
from clipfast.commands import console
from clipfast.commands.options import ClassOptions, InputOptions
from clipfast.commands.reproduce.results import Column, Result
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.commands.segment.command import segment
from clipfast.commands.segment.options import Options as SegmentOptions

PROTOCOL = (
    "The map of the class that the whole image is taken for, among all classes, less the mean of the maps of all "
    "classes; summed over layers and heads, without the class token, enlarged bilinearly, negative values cut off, "
    "spread from 0 to 1 per image, and cut at the image's mean. All methods get the same direction and the same steps.",
    "Pixel accuracy and mIoU (of foreground and background) are over the pixels of all images, mAP is the mean over "
    "images. The published code's mAP is over foreground and background together: the column mAP of both.",
    "Aligned masks are resized and cropped as the image was. Published masks are squashed to the model's input while "
    "the image is cropped, as in the published code; the two differ for every image that is not square, and only the "
    "rows with published masks can be compared with published numbers.",
)


def run(bench: Workbench) -> Result:
    """Measures the table with both kinds of masks.

    Raises:
        KeyboardInterrupt: a signal has arrived.
    """
    folders, named = bench.masked(), bench.classes_of_segmentation()
    classes, options = bench.write_classes(named), bench.options
    rows: list[dict[str, Any]] = []
    figures: list[str] = []
    images, failed = 0, 0
    for protocol in get_args(MaskProtocol):
        out = bench.out / "figures" / f"segmentation-{protocol}"
        console.note(f"segmentation with {protocol} masks")
        done = segment(
            SegmentOptions(
                InputOptions(
                    (folders.images,),
                    model=options.model.model,
                    pretrained=options.model.pretrained,
                    batch_size=options.model.batch_size,
                    device=options.model.device,
                    dtype=options.model.dtype,
                ),
                ClassOptions(classes=classes),
                masks=str(folders.masks),
                target="predicted",
                methods=options.methods,
                protocol=protocol,
                out=out,
            ),
            bench.model,
        ).result
        if not done["complete"]:
            raise KeyboardInterrupt
        rows += [{**row, "name": f"{row['method']}, {protocol} masks"} for row in done["methods"]]
        figures += [f"figures/{out.name}/{panel}" for panel in done["panels"]]
        images, failed = done["images"], len(done["failed"])
    setup = {
        "images": images,
        "classes": len(named.classes.labels),
        "class names": named.source,
        "templates": bench.templates[1],
    }
    columns = (
        Column("accuracy", "pixel accuracy"),
        Column("mIoU", "mIoU"),
        Column("mAP", "mAP"),
        Column("mAP_both", "mAP of both"),
    )
    return Result(rows, columns, PROTOCOL, setup, figures=figures, failed=failed)
