"""``clipfast segment --phrase``: the regions that phrases mean, as pictures of heat, masks and proposals.

``--out`` gets ``heat/NAME/`` and ``masks/NAME/`` as without masks, with a mask for every proposal, and ``segment.json``
with their scores and boxes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.analyses.phrases import Phrase, parse
from clipfast.analyses.referring import Grounding, Settings, Vocabulary, regions
from clipfast.commands import console
from clipfast.commands.figures import write_panel
from clipfast.commands.files import write_json
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.reading import Prepared
from clipfast.commands.results import prepare_results
from clipfast.commands.segment.images import Failures, ImageSet, Item, each_batch, find_image_set
from clipfast.commands.segment.maps import decompose_batch
from clipfast.commands.segment.options import Options
from clipfast.commands.segment.scoring import Threshold, slug
from clipfast.commands.segment.targets import read_background
from clipfast.commands.sheets import hot
from clipfast.commands.text_features import encode_texts
from clipfast.commands.zeroshot import read_all_templates
from clipfast.dataset.collection import Entry
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import rounded

METHOD = "phrase"


def run_phrases(options: Options, threshold: Threshold, document: str) -> int:
    """Finds what phrases mean in every image; returns the exit code.

    Args:
        options: those of the command.
        threshold: where a region ends, as a share of its own peak; ``"mean"`` for the method's own.
        document: the format that ``segment.json`` names.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    options.inputs.check()
    _refuse(options)
    phrases = [parse(text) for text in dict.fromkeys(options.phrase)]
    vocabulary = _vocabulary(options)
    prepare_results(options.out)
    failures = Failures()
    images = find_image_set(options.inputs, options.out, None, failures)
    work = _Pass(
        options, images.load(), phrases, vocabulary, Settings() if threshold == "mean" else Settings(threshold)
    )
    complete = False
    try:
        size = options.inputs.batch_size
        each_batch(work.model, images.items, size, failures, lambda batch: work.add(batch, failures, images))
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {len(work.entries)} of {len(images.items)} images are done")
    finally:  # after an error, too: the images that are done are kept
        write_json(options.out / "segment.json", work.result(complete, images, failures, document))
    if complete and not work.entries:
        raise InputError(f"none of the {len(images.items)} images could be used")
    if options.json:
        console.say((options.out / "segment.json").read_text(encoding="utf-8").rstrip())
    else:
        _table(work.entries)
    if failures.rows:
        console.error(f"{len(failures.rows)} images or paths were left out")
    console.note(f"{len(work.entries)} images; results are in {options.out}")
    return INTERRUPTED if not complete else FAILED if failures.rows else 0


def _refuse(options: Options) -> None:
    """Raises :class:`InputError` for options that phrases have no use for."""
    given = {
        "--texts": bool(options.texts),
        "--classes": options.zeroshot.classes is not None,
        "--masks": options.masks is not None,
        "--mask-values": options.mask_values is not None,
        "--ignore": options.ignore is not None,
        "--multiclass": options.multiclass,
        "--background": options.background is not None,
        "--target": options.target is not None,
        "--methods": options.methods is not None,
        "--no-contrast": not options.contrast,
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise InputError(f"--phrase and {wrong[0]} exclude each other: leave out one of them")


def _vocabulary(options: Options) -> Vocabulary:
    """Nouns of ``--background-texts`` and templates of ``--templates`` and ``--prompt``, where they are given."""
    given: dict[str, Sequence[str]] = {}
    if options.background_texts is not None:
        read = read_background(options.background_texts)
        given["nouns"] = tuple(dict.fromkeys(text for texts in read.values() for text in texts))
    templates = read_all_templates(options.zeroshot)
    if templates:
        given["templates"] = templates
    return Vocabulary(**given)  # type: ignore[arg-type]


class _Pass:
    """One pass over the images.

    Attributes:
        entries: what the JSON says of every image.
    """

    def __init__(
        self, options: Options, model: Model, phrases: Sequence[Phrase], vocabulary: Vocabulary, settings: Settings
    ) -> None:
        self.model, self.entries = model, list[dict[str, Any]]()
        self._options, self._phrases, self._vocabulary, self._settings = options, phrases, vocabulary, settings
        self._texts = vocabulary.texts(phrases)
        self._denormalizer = Denormalizer(model)

        def encode(sentences: Iterable[str]) -> Tensor:
            return encode_texts(model, list(sentences))

        self._features = vocabulary.encode(self._texts, encode)

    def add(self, prepared: Prepared[Item], failures: Failures, images: ImageSet) -> None:
        """One batch, from pixels to pictures."""
        batch = decompose_batch(self.model, prepared.items, prepared.pixels, self._features)
        finite = batch.contributions.is_finite().tolist()
        for (_, entry), good in zip(batch.items, finite, strict=True):
            if not good:
                failures.add(entry.file, f"{entry.file}: the embedding is not finite in {images.options.dtype}")
        batch = batch.select([row for row, good in enumerate(finite) if good])
        if not batch.items:
            return
        maps, size = batch.contributions.patch_maps(), self.model.image_size
        found = regions(maps, self._texts, size, self._vocabulary, self._settings)
        pictures = self._denormalizer.pictures(batch.pixels)
        for (_, entry), picture, each in zip(batch.items, pictures, found, strict=True):
            drawn = [
                self._draw(entry, picture, at, phrase, each.ground(phrase)) for at, phrase in enumerate(self._phrases)
            ]
            self.entries.append({"file": entry.file, "name": entry.name, "label": entry.label, "maps": drawn})

    def _draw(self, entry: Entry, picture: Image.Image, at: int, phrase: Phrase, found: Grounding) -> dict[str, Any]:
        """Writes the pictures of a phrase in an image; returns what the JSON says of it."""
        stem = f"{entry.name}/{at:03}-{slug(phrase.text)}-{METHOD}"
        write_panel(hot(picture, found.heat.double().numpy()), self._options.out / "heat" / f"{stem}.png")
        self._write(found.mask, f"{stem}.png")
        proposals = []
        for rank, proposal in enumerate(found.proposals[: self._options.proposals]):
            name = f"{stem}.png" if rank == 0 else f"{stem}-{rank + 1}.png"
            if rank:
                self._write(proposal.mask, name)
            proposals.append(
                {
                    "score": rounded(proposal.score),
                    "box": list(proposal.box),
                    "share": rounded(float(proposal.mask.double().mean())),
                    "mask": f"masks/{name}",
                }
            )
        return {
            "text": phrase.text,
            "method": METHOD,
            "share": rounded(float(found.mask.double().mean())),
            "heat": f"heat/{stem}.png",
            "mask": f"masks/{stem}.png",
            "proposals": proposals,
        }

    def _write(self, mask: Tensor, name: str) -> None:
        pixels = mask.to(torch.uint8).mul(255).numpy().astype(np.uint8)
        write_panel(Image.fromarray(pixels), self._options.out / "masks" / name)

    def result(self, complete: bool, images: ImageSet, failures: Failures, document: str) -> dict[str, Any]:
        """What the JSON says."""
        return {
            "format": document,
            "complete": complete,
            "model": images.options.model,
            "pretrained": images.options.pretrained,
            "dtype": images.options.dtype,
            "image_size": list(self.model.image_size),
            "images": len(self.entries),
            "failed": failures.rows,
            "phrases": list(map(_described, self._phrases)),
            "nouns": list(self._vocabulary.nouns),
            "templates": list(self._vocabulary.templates),
            "cut": self._settings.cut,
            "pictures": self.entries,
        }


def _described(phrase: Phrase) -> dict[str, Any]:
    """A phrase taken apart, for JSON."""
    return {
        "text": phrase.text,
        "target": phrase.target.text,
        "relations": [
            {"kind": relation.kind, "landmarks": [thing.text for thing in relation.landmarks]}
            for relation in phrase.relations
        ],
        "places": list(phrase.places),
        "extremes": list(phrase.extremes),
    }


def _table(entries: Sequence[dict[str, Any]]) -> None:
    rows = []
    for entry in entries:
        for drawn in entry["maps"]:
            best = drawn["proposals"][0] if drawn["proposals"] else None
            box = "nothing" if best is None else ", ".join(map(str, best["box"]))
            score = "" if best is None else f"{best['score']:.2f}"
            rows.append([entry["name"], drawn["text"], box, score, drawn["mask"]])
    console.table(("image", "phrase", "box", "score", "mask"), rows)
