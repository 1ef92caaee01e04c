"""``clipfast segment``: where in images the model sees a class, and how well that agrees with true masks.

With ``--masks`` the decomposition and the methods it is compared with are scored in one pass, on the same images, with
the same directions (:class:`.targets.Directions`) and with the same steps from scores of patches to masks.
``--out`` gets ``segment.json`` and ``panels/``. Without masks it gets ``heat/NAME/`` and ``masks/NAME/``: a picture for
each image, text and method, with the size and crop of the model's input. ``--phrase`` is in :mod:`.phrases`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.groundtruth import Geometry, MaskProtocol, truth
from clipfast.analyses.segmentation import predicted
from clipfast.commands import console
from clipfast.commands.files import write_json
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.quantities import plural
from clipfast.commands.reading import Prepared
from clipfast.commands.results import prepare_results
from clipfast.commands.segment.images import Failures, ImageSet, Item, each_batch, find_image_set
from clipfast.commands.segment.maps import (
    METHODS,
    OURS,
    Batch,
    decompose_batch,
    maps_of_all,
    maps_of_one,
    not_finite,
    parse_methods,
)
from clipfast.commands.segment.masks import SHARD, check_masks, check_values, open_mask, read_mask_values
from clipfast.commands.segment.options import Options
from clipfast.commands.segment.phrases import run_phrases
from clipfast.commands.segment.scoring import Binary, Drawn, Maps, Multiclass, Panels, Threshold, number
from clipfast.commands.segment.targets import Directions, Targets, read_targets
from clipfast.errors import ClipfastError, InputError
from clipfast.model import Model
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import rounded

FORMAT = "clipfast.segment/1"
LABEL, PREDICTED = "label", "predicted"
_COLUMNS = ("accuracy", "mIoU", "mAP", "mAP_both")


@dataclass(frozen=True)
class _Plan:
    """What to do, as far as it is known without the model."""

    options: Options
    images: ImageSet
    targets: Targets
    items: Sequence[Item]
    methods: Sequence[str]
    target: str
    threshold: Threshold
    protocol: MaskProtocol
    values: dict[str, frozenset[int]] | None


def run(options: Options) -> int:
    """Segments the images; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    if options.phrase:
        return run_phrases(options, _threshold(options.threshold), FORMAT)
    done = segment(options)
    if options.json:
        console.say((options.out / "segment.json").read_text(encoding="utf-8").rstrip())
    else:
        _table(done.result, done.accuracy)
    failed = len(done.result["failed"])
    if failed:
        console.error(f"{failed} images or paths were left out")
    console.note(f"{done.result['images']} images; results are in {options.out}")
    return INTERRUPTED if not done.result["complete"] else FAILED if failed else 0


@dataclass(frozen=True)
class Segmented:
    """What came of a pass.

    Attributes:
        result: what ``segment.json`` says.
        accuracy: of the zero-shot classes, None where images have no labels.
    """

    result: dict[str, Any]
    accuracy: Accuracy | None


def segment(options: Options, model: Model | None = None) -> Segmented:
    """Segments the images and writes ``segment.json`` and pictures; Ctrl-C keeps the images that are done.

    Args:
        options: of the command.
        model: that the options name, where it is loaded already.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    failures = Failures()
    plan = _plan(options, failures)
    work = _Pass(plan, model or plan.images.load(), failures)
    complete = False
    try:
        each_batch(work.model, plan.items, options.inputs.batch_size, failures, work.add)
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {work.scorer.images} of {len(plan.items)} images are done")
    finally:  # after an error, too: the images that are done are kept
        result = work.result(complete)
        write_json(options.out / "segment.json", result)
    if complete and not work.scorer.images:
        raise InputError(f"none of the {len(plan.items)} images could be used")
    return Segmented(result, work.accuracy)


def _plan(options: Options, failures: Failures) -> _Plan:
    """Checks every option that can be checked before a model is loaded."""
    scored = options.masks is not None
    options.inputs.check()
    if options.inputs.group_column is not None:
        raise InputError("--group-column is not supported: scores are of all images together")
    if options.multiclass and not (scored and options.mask_values is not None):
        raise InputError("--multiclass scores labels of pixels: give --masks and --mask-values")
    for name, value in (("--mask-values", options.mask_values), ("--ignore", options.ignore)):
        if value is not None and not scored:
            raise InputError(f"{name} says how to read masks: give --masks")
    if options.background is not None and not options.multiclass:
        raise InputError("--background is a threshold for --multiclass; masks of one class have --threshold")
    if options.multiclass and options.target is not None:
        raise InputError("--target is the class of a whole image: --multiclass has none")
    default = (OURS,) if options.multiclass or not scored else METHODS
    methods = parse_methods(options.methods, options.multiclass, default)
    threshold = _threshold(options.threshold)
    if options.protocol not in get_args(MaskProtocol):
        raise InputError(f"--protocol is {options.protocol!r}: choose from {', '.join(get_args(MaskProtocol))}")
    check_masks(options.masks)
    values = None if options.mask_values is None else read_mask_values(options.mask_values)
    prepare_results(options.out)
    aside = None if options.masks in (None, SHARD) else Path(options.masks or "")
    images = find_image_set(options.inputs, options.out, aside, failures)
    targets = read_targets(
        images.entries,
        options.texts,
        options.zeroshot,
        options.background_texts,
        options.contrast,
    )
    target = options.target or (LABEL if targets.labelled else PREDICTED)
    if target == LABEL and not targets.labelled:
        raise InputError("--target label needs labels: give --labels, or --target predicted")
    items: Sequence[Item] = images.items
    if target == LABEL and not options.multiclass:
        items = [(source, entry) for source, entry in items if entry.label is not None]
    if values is not None:
        occurring = tuple(sorted({str(entry.label) for _, entry in items}))
        needed = occurring if target == LABEL and not options.multiclass else targets.subjects.labels
        check_values(values, needed, options.mask_values)
    protocol: MaskProtocol = "published" if options.protocol == "published" else "aligned"
    return _Plan(options, images, targets, items, methods, target, threshold, protocol, values)


def _threshold(text: str) -> Threshold:
    if text == "mean":
        return "mean"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"--threshold is {text!r}: give mean, or a heat from 0 to 1")
    return value


class _Pass:
    """One pass over the images.

    Attributes:
        scorer: takes the maps of every batch.
        accuracy: of the zero-shot classes, None where images have no labels.
    """

    def __init__(self, plan: _Plan, model: Model, failures: Failures) -> None:
        self.plan, self.model, self.failures = plan, model, failures
        options, names = plan.options, plan.targets.subjects.labels
        size, denormalizer = model.tower.image_size, Denormalizer(model)
        self._features = Directions.of(model, plan.targets)
        self._directions = self._features.all_at_once() if options.multiclass else self._features.single()
        self._geometry = None if options.masks is None else Geometry.of(model)
        self.accuracy = Accuracy(self._features.features) if plan.targets.labelled else None
        panels = Panels(options.out / "panels", options.panels, denormalizer)
        self.panels = panels.written
        self.scorer: Binary | Multiclass | Drawn
        if options.masks is None:
            self.scorer = Drawn(options.out, names, plan.threshold, size, denormalizer)
        elif options.multiclass:
            values, with_texts = plan.values or {}, bool(plan.targets.background)
            self.scorer = Multiclass(plan.methods, names, values, options.background, with_texts, size, panels)
        else:
            self.scorer = Binary(plan.methods, plan.threshold, names, plan.values, size, panels)

    def add(self, prepared: Prepared[Item]) -> None:
        """One batch, from pixels to scores."""
        kept: list[int] = []
        truths: list[Tensor] = []
        for row, (item, size) in enumerate(zip(prepared.items, prepared.sizes, strict=True)):
            try:
                if self._geometry is not None:
                    truths.append(self._truth(item, size, self._geometry))
                kept.append(row)
            except ClipfastError as error:
                self.failures.add_item(item, error)
        if not kept:
            return
        batch = decompose_batch(
            self.model, [prepared.items[row] for row in kept], prepared.pixels[kept], self._directions
        )
        batch = self._drop_not_finite(
            Batch(batch.items, batch.pixels, batch.contributions, torch.stack(truths) if truths else None)
        )
        if not batch.items:
            return
        targets = self._targets(batch)
        maps = self._maps(batch, targets)
        bad = not_finite(maps)
        if bad:
            rows = [row for row in range(len(batch.items)) if row not in bad]
            for row, method in bad.items():
                file = batch.items[row][1].file
                self.failures.add(file, f"{file}: the scores of {method} are not finite")
            batch, targets = batch.select(rows), targets[rows]
            maps = {method: scores[rows] for method, scores in maps.items()}
        if batch.items:
            self._score(batch, maps, targets)

    def _truth(self, item: Item, size: tuple[int, int], geometry: Geometry) -> Tensor:
        """Labels of the pixels of an image of a width and height as its mask has them."""
        source, entry = item
        mask = open_mask(source, self.plan.options.masks or "")
        if self.plan.protocol == "aligned" and mask.size != size:
            sizes = " and ".join(f"{width}x{height}" for width, height in (mask.size, size))
            raise InputError(f"{entry.file}: its mask and the image differ in size, {sizes}: --protocol published")
        try:
            labels = truth(mask, geometry, self.plan.protocol, ignore=self.plan.options.ignore)
        except InputError as error:
            raise InputError(f"{entry.file}: {error}") from None
        if isinstance(self.scorer, Multiclass) and (unknown := self.scorer.unknown(labels)):
            raise InputError(
                f"{entry.file}: its mask has the values {unknown[:5]}, which are no class: see --mask-values, --ignore"
            )
        return labels

    def _drop_not_finite(self, batch: Batch) -> Batch:
        """The batch without images whose embedding is not finite."""
        finite = batch.contributions.is_finite().tolist()
        for (_, entry), good in zip(batch.items, finite, strict=True):
            if not good:
                dtype = self.plan.images.options.dtype
                self.failures.add(entry.file, f"{entry.file}: the embedding is not finite in {dtype}")
        return batch.select([row for row, good in enumerate(finite) if good])

    def _targets(self, batch: Batch) -> Tensor:
        """The subject of every image, ``[B]``."""
        if self.plan.target == LABEL and not self.plan.options.multiclass:
            return self.plan.targets.subjects.index([entry for _, entry in batch.items])
        return predicted(batch.contributions, self._features.features).cpu()

    def _maps(self, batch: Batch, targets: Tensor) -> Maps:
        one, every = (
            partial(function, model=self.model, batch=batch, directions=self._directions)
            for function in (maps_of_one, maps_of_all)
        )
        if isinstance(self.scorer, Multiclass) or (isinstance(self.scorer, Drawn) and self.plan.options.texts):
            return {method: every(method) for method in self.plan.methods}
        maps = {method: one(method, targets=targets) for method in self.plan.methods}
        if isinstance(self.scorer, Drawn):
            return {method: scores[..., None] for method, scores in maps.items()}
        return maps

    def _score(self, batch: Batch, maps: Maps, targets: Tensor) -> None:
        if isinstance(self.scorer, Drawn):
            every = list(range(len(self.plan.targets.subjects.labels)))
            subjects = [every if self.plan.options.texts else [target] for target in targets.tolist()]
            self.scorer.update(batch, maps, subjects)
        else:
            self.scorer.update(batch, maps, targets)
        if self.accuracy is not None:
            rows = [row for row, (_, entry) in enumerate(batch.items) if entry.label is not None]
            if rows:
                labels = self.plan.targets.subjects.index([batch.items[row][1] for row in rows])
                self.accuracy.update(batch.contributions.embedding[rows].float(), labels)

    def result(self, complete: bool) -> dict[str, Any]:
        """What the JSON says."""
        plan, options, subjects = self.plan, self.plan.options, self.plan.targets.subjects
        baseline = self.accuracy if self.accuracy is not None and self.accuracy.count else None
        whole = {
            "format": FORMAT,
            "complete": complete,
            "model": plan.images.options.model,
            "pretrained": plan.images.options.pretrained,
            "dtype": plan.images.options.dtype,
            "image_size": list(self.model.image_size),
            "images": self.scorer.images,
            "failed": self.failures.rows,
            "baseline": None
            if baseline is None
            else {
                "accuracy": rounded(baseline.accuracy),
                "images": baseline.count,
                "chance": rounded(baseline.chance),
                "near_chance": baseline.near_chance,
            },
            "texts": {label: list(texts) for label, texts in zip(subjects.labels, subjects.texts, strict=True)},
            "background_texts": {label: list(texts) for label, texts in plan.targets.background.items()},
            "contrast": "the mean over all texts" if options.multiclass and options.contrast else plan.targets.against,
            "logit_scale": number(self._features.scale),
        }
        if isinstance(self.scorer, Drawn):
            return (
                whole
                | {"target": None if options.texts else plan.target, "threshold": plan.threshold}
                | {"pictures": self.scorer.entries}
            )
        whole |= {"masks": options.masks, "protocol": plan.protocol, "ignore": options.ignore}
        if isinstance(self.scorer, Multiclass):
            whole |= {"multiclass": True, "background": options.background}
        else:
            whole |= {"multiclass": False, "target": plan.target, "threshold": plan.threshold}
        return whole | {"panels": self.panels, "methods": self.scorer.rows()}


def _table(result: dict[str, Any], accuracy: Accuracy | None) -> None:
    if accuracy is not None and accuracy.count:
        counted = f"{accuracy.count} labelled images, chance {accuracy.chance:.1%}"
        console.say(f"# zero-shot accuracy {accuracy.accuracy:.1%} of {counted}")
        accuracy.warn_near_chance()
    if "pictures" in result:
        rows = [
            (picture["file"], drawn["text"], drawn["method"], f"{drawn['share']:.1%}", drawn["heat"])
            for picture in result["pictures"]
            for drawn in picture["maps"]
        ]
        console.table(("file", "text", "method", "of the pixels", "heat"), rows)
        return
    title = f"{plural(result['images'], 'image')}, {result['protocol']} protocol, against {result['contrast']}"
    columns = [name for name in _COLUMNS if name in result["methods"][0]]
    rows = [
        (row["method"], *("" if row[name] is None else f"{row[name]:.1%}" for name in columns))
        for row in result["methods"]
    ]
    console.table(("method", *(name.replace("_", " ") for name in columns)), rows, title=title)
    if "IoU" in result["methods"][0]:
        names = list(result["methods"][0]["IoU"])
        ious = [
            (name, *("" if row["IoU"][name] is None else f"{row['IoU'][name]:.1%}" for row in result["methods"]))
            for name in names
        ]
        console.table(("class", *(f"IoU {row['method']}" for row in result["methods"])), ious)
