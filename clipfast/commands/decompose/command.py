"""``clipfast decompose``: contributions, panels and a summary of any number of images.

Written under the folder given as ``--out``:

* ``contributions-00000.safetensors`` and so on: see :mod:`clipfast.dataset.store`;
* ``NAME.png``, a panel per image; ``heads/NAME.png`` with ``--per-head``;
* ``summary.json``: what was run, and per image its scores, what they are made of, and where its other results are.

Nothing in them depends on the clock: the same inputs give the same bytes.
"""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from PIL import Image
from torch import Tensor

from clipfast.basis import check_centring
from clipfast.commands import console
from clipfast.commands.decompose.options import Options
from clipfast.commands.figures import draw_heads, draw_texts, write_panel
from clipfast.commands.files import read_texts, write_json
from clipfast.commands.loading import load_model_of, versions
from clipfast.commands.options import DTYPE, MODEL
from clipfast.commands.outcome import FAILED, INTERRUPTED, memory_for
from clipfast.commands.reading import reading
from clipfast.commands.results import prepare_results
from clipfast.commands.text_features import encode_texts
from clipfast.contributions import Contributions
from clipfast.dataset.files import Source, find_images
from clipfast.dataset.store import ShardWriter
from clipfast.errors import ImageError, InputError
from clipfast.model import Model
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import TextShares, rounded, text_scores, text_shares

FORMAT = "clipfast.summary/1"


@dataclass
class _Progress:
    """What a run has done so far.

    Attributes:
        max_error: the largest difference between the sum of all terms and the embedding.
        images: entries of the summary.
        failed: file and reason of those that could not be read.
    """

    max_error: float = 0.0
    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def fail(self, file: object, error: Exception) -> None:
        console.error(error)
        self.failed.append({"file": str(file), "error": console.one_line(error)})


def parse_layers(text: str | None) -> list[int] | None:
    """``"-4,-3"`` as numbers; None for all.

    Raises:
        InputError: not whole numbers with commas.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers is {text!r}: give whole numbers with commas, such as -2,-1") from None


def run(options: Options) -> int:
    """Decomposes all images; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        OSError: a result that cannot be written.
    """
    started = perf_counter()
    inputs = options.inputs
    inputs.check()
    prepare_results(options.out)
    texts = read_texts(options.texts, options.texts_file)
    if options.per_head and not texts:
        raise InputError("--per-head draws maps for texts: give --texts or --texts-file")
    layers = parse_layers(options.layers)
    progress = _Progress()
    sources, missing, left_out = find_images(inputs.images, skip=options.out)
    for gone in missing:
        progress.fail(str(gone.path), gone.error)
    total = len(sources) + len(missing)
    if not sources:
        return _finish(options, None, texts, progress, total, complete=True)
    model = load_model_of(inputs)
    work = _Decomposer(options, model, layers, texts, ShardWriter(options.out), progress)
    complete = False
    try:
        with (
            console.progress("decomposing", len(sources)) as advance,
            reading(model, sources, lambda source: source, inputs.batch_size, progress.fail) as batches,
        ):
            for batch in batches:
                if batch.items:
                    with memory_for(inputs.batch_size, str(model.device)):
                        work.add(batch.items, model.prepare(batch.pixels))
                advance(inputs.batch_size)
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {len(progress.images)} of {total} images are done")
    finally:
        # also after an error: what is listed in the summary is there
        work.writer.flush()
        code = _finish(options, model, texts, progress, total, complete)
    for note in left_out:
        console.note(note)
    if complete:
        seconds = perf_counter() - started
        console.note(f"{len(progress.images)} images in {seconds:.1f} s with loading; results are in {options.out}")
    return code if complete else INTERRUPTED


class _Decomposer:
    """Takes batches from pixels to files.

    Args:
        options: of the command.
        model: decomposes the images.
        layers: layers whose heads are kept, None for all.
        texts: what images are compared with.
        writer: takes the contributions.
        progress: gets an entry for each image.
    """

    def __init__(
        self,
        options: Options,
        model: Model,
        layers: list[int] | None,
        texts: list[str],
        writer: ShardWriter,
        progress: _Progress,
    ) -> None:
        self.writer = writer
        self._options, self._model, self._layers, self._texts, self._progress = options, model, layers, texts, progress
        self._features = encode_texts(model, texts)
        self._denormalizer = Denormalizer(model)

    def add(self, sources: list[Source], pixels: Tensor) -> None:
        """One batch of images, prepared, ``[B, 3, height, width]``."""
        contributions = self._model.decompose(
            pixels,
            texts=self._features if self._texts else None,
            labels=self._texts or None,
            maps="per_head" if self._options.per_head else None,
            tokens=self._options.tokens,
            layers=self._layers,
            centring=check_centring(self._options.centring),
            depth=self._options.depth,
        )
        rows = contributions.is_finite().nonzero()[:, 0].tolist()
        if len(rows) < len(sources):
            dtype = self._options.inputs.dtype or DTYPE
            advice = "" if dtype in ("fp32", "fp64") else ": try --dtype fp32"
            for row in sorted(set(range(len(sources))) - set(rows)):
                reason = f"{sources[row]}: the embedding is not finite in {dtype}{advice}"
                self._progress.fail(sources[row], ImageError(reason))
            if not rows:
                return
            contributions, pixels = contributions.select(rows), pixels[rows]
            sources = [sources[row] for row in rows]
        self._progress.max_error = max(self._progress.max_error, contributions.max_error())
        entries = self._entries(sources, contributions, pixels)
        for entry, (file, row) in zip(entries, self.writer.add(contributions), strict=True):
            entry["contributions"] = {"file": file, "row": row}
            self._progress.images.append(entry)
            best = sorted(entry["scores"].items(), key=lambda scored: -scored[1])[:3]
            console.say("\t".join([entry["file"], *(f"{score:+.4f} {text}" for text, score in best)]))
        if self.writer.is_full:
            self.writer.flush()

    def _entries(self, sources: list[Source], contributions: Contributions, pixels: Tensor) -> list[dict[str, Any]]:
        """What the summary says of each image; draws its panels."""
        entries: list[dict[str, Any]] = [
            {"file": str(source), "name": source.name, "norm": rounded(norm), "scores": {}, "texts": []}
            for source, norm in zip(sources, contributions.norm.tolist(), strict=True)
        ]
        if not self._texts:
            return entries
        scores = text_scores(contributions, self._features)
        shares = text_shares(contributions, self._features, self._texts, scores=scores)
        for entry, row, parts in zip(entries, scores.tolist(), shares, strict=True):
            entry["scores"] = {text: rounded(score) for text, score in zip(self._texts, row, strict=True)}
            entry["texts"] = [share.to_json() for share in parts]
        if self._options.panels:
            pictures = self._denormalizer.pictures(pixels)
            for row, (entry, picture) in enumerate(zip(entries, pictures, strict=True)):
                entry |= self._panels(entry["name"], picture, contributions, row, scores[row].tolist(), shares[row])
        return entries

    def _panels(
        self,
        name: str,
        picture: Image.Image,
        contributions: Contributions,
        row: int,
        scores: list[float],
        shares: list[TextShares],
    ) -> dict[str, str]:
        """Draws the panels of one image; returns their files by key of the summary."""
        texts, out = self._texts, self._options.out
        write_panel(draw_texts(name, picture, contributions, row, texts, scores), out / f"{name}.png")
        files = {"panel": f"{name}.png"}
        if self._options.per_head:
            best = max(range(len(texts)), key=scores.__getitem__)
            share = next(part for part in shares if part.text == texts[best])
            write_panel(draw_heads(name, picture, contributions, row, share, best), out / "heads" / f"{name}.png")
            files["heads_panel"] = f"heads/{name}.png"
        return files


def _finish(
    options: Options, model: Model | None, texts: list[str], progress: _Progress, total: int, complete: bool
) -> int:
    """Writes the summary, says what failed, and returns the exit code of a run that was not interrupted."""
    inputs = options.inputs
    summary = {
        "format": FORMAT,
        "complete": complete,
        "model": inputs.model or MODEL,
        "pretrained": inputs.pretrained,
        "random_weights": None if model is None else not model.pretrained,
        "dtype": inputs.dtype or DTYPE,
        "image_size": None if model is None else list(model.image_size),
        "device": None if model is None else str(model.device),
        "centring": options.centring,
        "depth": options.depth if options.depth is not None or model is None else model.depth,
        "layers": options.layers or "all",
        "versions": versions(),
        "texts": texts,
        "check": rounded(progress.max_error),
        "images": progress.images,
        "failed": progress.failed,
    }
    write_json(options.out / "summary.json", summary)
    if progress.images:
        console.say(f"# sum of all terms minus embedding: at most {progress.max_error:.1e}")
    if progress.failed:
        console.error(f"{len(progress.failed)} of {total} images failed")
    return FAILED if progress.failed else 0
