"""``clipfast explain``: why an image is taken for one class rather than another.

``--out`` gets ``explain.json`` and ``NAME.png`` for each image: the classes, the groups of patches with what they add
to the margin and the texts nearest to them, and the texts that image and classes share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.analyses.curves import Curve, deletion, insertion
from clipfast.analyses.explaining import (
    CLASS_HEADERS,
    TEXT_HEADERS,
    VISUAL_HEADERS,
    Explanation,
    explain_image,
    logit_scale,
)
from clipfast.commands import console
from clipfast.commands.decompose.command import parse_layers
from clipfast.commands.explain.options import Options
from clipfast.commands.explain.over import HEADERS as OVER_HEADERS
from clipfast.commands.explain.over import Embeddings, Shared
from clipfast.commands.figures import write_panel
from clipfast.commands.files import write_json
from clipfast.commands.loading import load_model_of, versions
from clipfast.commands.options import DTYPE, MODEL, ClassOptions
from clipfast.commands.outcome import FAILED, INTERRUPTED, memory_for
from clipfast.commands.pools import RANDOM, fitting, read_pool
from clipfast.commands.reading import reading
from clipfast.commands.results import prepare_results
from clipfast.commands.text_features import encode_texts
from clipfast.commands.zeroshot import PROMPT, Classes, read_all_templates, read_class_texts
from clipfast.dataset.files import Source, find_images
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.report.explanation import explanation_panel
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import rounded

FORMAT = "clipfast.explain/1"
_RANDOM_ORDERS = 8


@dataclass
class _Progress:
    """What a run has done so far: entries of the JSON, the images that failed with the reason, and ``--over``."""

    images: list[dict[str, Any]] = field(default_factory=list)
    shared: Shared | None = None
    failed: list[dict[str, str]] = field(default_factory=list)

    def fail(self, file: object, error: object) -> None:
        console.error(error)
        self.failed.append({"file": str(file), "error": console.one_line(error)})


def run(options: Options) -> int:
    """Explains every image; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    inputs = options.inputs
    inputs.check()
    classes = read_classes(options)
    layers = parse_layers(options.layers)
    pool_name = options.pool or ("scenes" if inputs.model in (None, MODEL) else "general")
    if pool_name == RANDOM:
        raise InputError("--pool is random: random vectors name no concepts, choose a pool of texts")
    texts, notes = read_pool(pool_name)
    embeddings = None if options.over is None else Embeddings(options.over)
    prepare_results(options.out)
    sources, missing, left_out = find_images(inputs.images, skip=options.out)
    progress = _Progress()
    for gone in missing:
        progress.fail(gone.path, gone.error)
    complete, work = not sources, None
    try:
        if sources:
            for note in notes:
                console.warn(note)
            work = _Work.of(options, load_model_of(inputs), classes, texts, pool_name, layers)
            if embeddings is not None:
                progress.shared = embeddings.shared(work.model, work.pool, work.texts, work.classifier)
            _explain_all(work, sources, progress)
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {len(progress.images)} of {len(sources)} images are done")
    finally:
        if work is not None or progress.failed:
            result = _result(options, pool_name, classes, progress, complete)
            write_json(options.out / "explain.json", result)
    for note in left_out:
        console.note(note)
    if progress.shared is not None and not options.json:
        console.table(OVER_HEADERS, progress.shared.rows(), title=progress.shared.title())
    if options.json:
        console.say((options.out / "explain.json").read_text(encoding="utf-8").rstrip())
    if progress.failed:
        console.error(f"{len(progress.failed)} of {len(sources) + len(missing)} images failed")
    console.note(f"{len(progress.images)} images; results are in {options.out}")
    return INTERRUPTED if not complete else FAILED if progress.failed else 0


def read_classes(options: Options) -> Classes:
    """The classes of ``--classes`` with their texts.

    Raises:
        InputError: no classes, one alone, a class that is named twice, or one of ``--target`` that is not there.
    """
    templates = read_all_templates(ClassOptions(prompt=options.prompt, templates=options.templates))
    names: Mapping[str, Sequence[str]]
    if options.classes is None:
        raise InputError('no classes were given: name two or more, such as --classes "cat,dog"')
    if options.classes.endswith(".csv"):
        names = read_class_texts(Path(options.classes))
    else:
        labels = [label.strip() for label in options.classes.split(",")]
        if not all(labels):
            raise InputError(f"--classes is {options.classes!r}: a class is empty")
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise InputError(f"--classes names {twice[0]!r} twice")
        names, templates = {label: [label] for label in labels}, templates or (PROMPT,)
    if len(names) < 2:
        raise InputError(f"--classes names one class, {next(iter(names))!r}: a choice needs two or more")
    known = ", ".join(list(names)[:10])
    if options.target is not None and options.target not in names:
        raise InputError(f"--target is {options.target!r}, which is no class: choose from {known}")
    if options.against not in ("runner-up", "mean", *names):
        raise InputError(f"--against is {options.against!r}: choose runner-up, mean, or a class: {known}")
    if options.against == options.target:
        raise InputError(f"--target and --against are both {options.target!r}: name two classes")
    return Classes.of(names, templates)


@dataclass(frozen=True)
class _Work:
    """What every image is explained with."""

    options: Options
    model: Model
    labels: tuple[str, ...]
    classifier: Tensor
    texts: list[str]
    pool: Tensor
    layers: list[int] | None
    scale: float | None
    denormalizer: Denormalizer

    @classmethod
    def of(
        cls,
        options: Options,
        model: Model,
        classes: Classes,
        texts: Sequence[str],
        pool_name: str,
        layers: list[int] | None,
    ) -> "_Work":
        scale = logit_scale(model.module)
        if options.curves and scale is None:
            raise InputError("--curves needs probabilities, and this model has no logit scale")
        fits = fitting(model, texts, pool_name)
        if len(fits) < 2:
            raise InputError(f"{pool_name} has one text only: concepts are told apart by two or more")
        classifier, pool = classes.classifier(model), encode_texts(model, fits)
        return cls(options, model, classes.labels, classifier, fits, pool, layers, scale, Denormalizer(model))

    def explain(self, pixels: Tensor) -> Explanation | None:
        """One prepared image ``[1, 3, height, width]``; None where its embedding is not finite."""
        contributions = self.model.decompose(pixels, tokens=True, layers=self.layers)
        if not bool(contributions.is_finite()[0]):
            return None
        options = self.options
        return explain_image(
            contributions,
            self.classifier,
            self.labels,
            self.pool,
            self.texts,
            target=options.target,
            against=options.against,
            concepts=options.concepts,
            groups=options.groups,
            scale=self.scale,
        )

    def curves(self, pixels: Tensor, explanation: Explanation) -> dict[str, Any]:
        """Deletion and insertion in the order of the explanation, and the mean over random orders."""
        generator = torch.Generator().manual_seed(0)
        heat = explanation.heat()
        random = torch.rand(_RANDOM_ORDERS, *heat.shape, generator=generator)
        orders = torch.cat([heat[None], random.to(heat)])
        repeated = pixels.expand(len(orders), -1, -1, -1)
        targets = torch.full((len(orders),), explanation.decision.target)
        curves: dict[str, Any] = {}
        for name, measure in (("deletion", deletion), ("insertion", insertion)):
            curve: Curve = measure(
                self.model.encode_image, repeated, orders, self.classifier, targets, scale=self.scale or 1.0
            )
            areas = curve.area().tolist()
            curves[name] = {
                "area": rounded(areas[0]),
                "random": rounded(sum(areas[1:]) / _RANDOM_ORDERS),
                "fractions": [rounded(value) for value in curve.fractions.tolist()],
                "probabilities": [rounded(value) for value in curve.probabilities[0].tolist()],
            }
        return curves


def _explain_all(work: _Work, sources: Sequence[Source], progress: _Progress) -> None:
    options, size = work.options, work.options.inputs.batch_size
    with (
        console.progress("explaining", len(sources)) as advance,
        reading(work.model, sources, lambda source: source, size, progress.fail) as batches,
    ):
        for batch in batches:
            for row, source in enumerate(batch.items):
                with memory_for(1, str(work.model.device)):
                    pixels = work.model.prepare(batch.pixels[row : row + 1])
                    explanation = work.explain(pixels)
                    if explanation is None:
                        dtype = options.inputs.dtype or DTYPE
                        progress.fail(source, f"{source}: the embedding is not finite in {dtype}")
                        continue
                    curves = work.curves(pixels, explanation) if options.curves else None
                (picture,) = work.denormalizer.pictures(pixels)
                file = f"{source.name}.png"
                write_panel(explanation_panel(source.name, picture, explanation), options.out / file)
                entry = {"file": str(source), "name": source.name, "panel": file, **explanation.to_json()}
                progress.images.append(entry if curves is None else entry | {"curves": curves})
                if not options.json:
                    _say(str(source), explanation, curves)
            advance(size)


def _say(name: str, explanation: Explanation, curves: dict[str, Any] | None) -> None:
    console.table(CLASS_HEADERS, explanation.class_rows(), title=f"{name}: {explanation.headline()}")
    console.table(TEXT_HEADERS, explanation.text_rows(), title="texts that image and classes share")
    console.table(VISUAL_HEADERS, explanation.visual_rows(), title="groups of patches")
    if curves is not None:
        rows = [(kind, f"{curve['area']:.3f}", f"{curve['random']:.3f}") for kind, curve in curves.items()]
        console.table(("curve", "area", "in random orders"), rows, title=f"probability of {explanation.target}")


def _result(options: Options, pool_name: str, classes: Classes, progress: _Progress, complete: bool) -> dict[str, Any]:
    inputs = options.inputs
    over = {} if progress.shared is None else {"over": progress.shared.to_json()}
    return {
        "format": FORMAT,
        "complete": complete,
        "model": inputs.model or MODEL,
        "pretrained": inputs.pretrained,
        "dtype": inputs.dtype or DTYPE,
        "versions": versions(),
        "classes": {label: list(texts) for label, texts in zip(classes.labels, classes.texts, strict=True)},
        "pool": pool_name,
        "against": options.against,
        "layers": options.layers or "all",
        "images": progress.images,
        "failed": progress.failed,
        **over,
    }
