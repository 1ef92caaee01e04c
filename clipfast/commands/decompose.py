"""``clipfast decompose``: contributions, panels and a summary of any number of images.

Written under the folder given as ``--out``:

* ``contributions-00000.safetensors`` and so on: see :mod:`clipfast.dataset.store`;
* ``NAME.png``, a panel per image; ``heads/NAME.png`` with ``--per-head``;
* ``summary.json``: what was run, and per image its scores, what they are made of, and where its other results are.

Nothing in them depends on the clock: the same inputs give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from clipfast.basis import check_centring
from clipfast.commands import console
from clipfast.commands.figures import draw_heads, draw_texts, write_panel
from clipfast.commands.files import prepare_folder, read_texts, write_json
from clipfast.commands.loading import check_device, encode_texts, load_model, versions
from clipfast.commands.outcome import FAILED, INTERRUPTED, memory_for
from clipfast.commands.reading import reading
from clipfast.contributions import Contributions
from clipfast.dataset.collection import refuse_collection
from clipfast.dataset.files import Source, find_images
from clipfast.dataset.store import ShardWriter
from clipfast.errors import ImageError, InputError
from clipfast.model import Model
from clipfast.report.pictures import Seen
from clipfast.report.shares import rounded, text_scores, text_shares

FORMAT = "clipfast.summary/1"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; the names are those of its options."""

    images: Sequence[Path]
    out: Path
    model: str
    pretrained: str | None = None
    texts: Sequence[str] = ()
    texts_file: Path | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str = "fp32"
    layers: str | None = None
    per_head: bool = False
    tokens: bool = False
    centring: str = "uniform"
    panels: bool = True


@dataclass
class _Run:
    """What a run has done so far.

    Attributes:
        check: the largest difference between the sum of all terms and the embedding.
        images: entries of the summary.
        failed: file and reason of those that could not be read.
    """

    check: float = 0.0
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
    prepare_folder(options.out)
    refuse_collection(options.out)
    texts = read_texts(options.texts, options.texts_file)
    if options.per_head and not texts:
        raise InputError("--per-head draws maps for texts: give --texts or --texts-file")
    layers = parse_layers(options.layers)
    done = _Run()
    sources, missing, left_out = find_images(options.images, skip=options.out)
    for gone in missing:
        done.fail(str(gone.path), gone.error)
    total = len(sources) + len(missing)
    if not sources:
        return _finish(options, None, texts, done, total, complete=True)
    model = load_model(options.model, options.pretrained, check_device(options.device), options.dtype)
    with memory_for(len(texts), str(model.device), "texts"):
        features = encode_texts(model, texts)
    writer = ShardWriter(options.out)
    complete = False
    try:
        with (
            console.progress("decomposing", len(sources)) as advance,
            reading(model, sources, lambda source: source, options.batch_size, done.fail) as batches,
        ):
            for batch in batches:
                if batch.items:
                    with memory_for(options.batch_size, str(model.device)):
                        pixels = model.prepare(batch.pixels)
                        _decompose(options, model, layers, texts, features, batch.items, pixels, writer, done)
                advance(options.batch_size)
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {len(done.images)} of {total} images are done")
    finally:
        # also after an error: what is listed in the summary is there
        writer.flush()
        code = _finish(options, model, texts, done, total, complete)
    for note in left_out:
        console.note(note)
    if complete:
        seconds = perf_counter() - started
        console.note(f"{len(done.images)} images in {seconds:.1f} s with loading; results are in {options.out}")
    return code if complete else INTERRUPTED


def _decompose(
    options: Options,
    model: Model,
    layers: list[int] | None,
    texts: list[str],
    features: Tensor,
    batch: list[Source],
    pixels: Tensor,
    writer: ShardWriter,
    done: _Run,
) -> None:
    """One batch, from pixels to files."""
    found = model.decompose(
        pixels,
        texts=features if texts else None,
        labels=texts or None,
        maps="per_head" if options.per_head else None,
        tokens=options.tokens,
        layers=layers,
        centring=check_centring(options.centring),
    )
    finite = found.is_finite()
    if not finite.all():
        for source, good in zip(batch, finite.tolist(), strict=True):
            if not good:
                advice = "" if options.dtype in ("fp32", "fp64") else ": try --dtype fp32"
                reason = f"{source}: the embedding is not finite in {options.dtype}{advice}"
                done.fail(str(source), ImageError(reason))
        rows = [row for row, good in enumerate(finite.tolist()) if good]
        if not rows:
            return
        found, pixels, batch = found.select(rows), pixels[rows], [batch[row] for row in rows]
    done.check = max(done.check, found.max_error())
    entries = _entries(batch, found, texts, features)
    if options.panels and texts:
        _write_panels(options, model, found, pixels, texts, features, entries)
    for entry, (file, row) in zip(entries, writer.add(found), strict=True):
        entry["contributions"] = {"file": file, "row": row}
        done.images.append(entry)
        best = sorted(entry["scores"].items(), key=lambda scored: -scored[1])[:3]
        console.say("\t".join([entry["file"], *(f"{score:+.4f} {text}" for text, score in best)]))


def _entries(batch: list[Source], found: Contributions, texts: list[str], features: Tensor) -> list[dict[str, Any]]:
    """What the summary says of each image."""
    norms = found.norm.tolist()
    entries: list[dict[str, Any]] = [
        {"file": str(source), "name": source.name, "norm": rounded(norm), "scores": {}, "texts": []}
        for source, norm in zip(batch, norms, strict=True)
    ]
    if texts:
        scores = text_scores(found, features).tolist()
        for entry, row, shares in zip(entries, scores, text_shares(found, features, texts), strict=True):
            entry["scores"] = {text: rounded(score) for text, score in zip(texts, row, strict=True)}
            entry["texts"] = [share.to_json() for share in shares]
    return entries


def _write_panels(
    options: Options,
    model: Model,
    found: Contributions,
    pixels: Tensor,
    texts: list[str],
    features: Tensor,
    entries: list[dict[str, Any]],
) -> None:
    scores = text_scores(found, features).tolist()
    for row, (entry, picture) in enumerate(zip(entries, Seen(model).pictures(pixels), strict=True)):
        name = entry["name"]
        write_panel(draw_texts(name, picture, found, row, texts, scores[row]), options.out / f"{name}.png")
        entry["panel"] = f"{name}.png"
        if options.per_head:
            best = max(range(len(texts)), key=lambda text: scores[row][text])
            shares = text_shares(found.select([row]), features[best : best + 1], [texts[best]])[0][0]
            panel = draw_heads(name, picture, found, row, shares, best)
            write_panel(panel, options.out / "heads" / f"{name}.png")
            entry["heads_panel"] = f"heads/{name}.png"


def _finish(options: Options, model: Model | None, texts: list[str], done: _Run, total: int, complete: bool) -> int:
    """Writes the summary, says what failed, and returns the exit code of a run that was not interrupted."""
    summary = {
        "format": FORMAT,
        "complete": complete,
        "model": options.model,
        "pretrained": options.pretrained,
        "random_weights": None if model is None else not model.pretrained,
        "dtype": options.dtype,
        "device": None if model is None else str(model.device),
        "centring": options.centring,
        "layers": options.layers or "all",
        "versions": versions(),
        "texts": texts,
        "check": rounded(done.check),
        "images": done.images,
        "failed": done.failed,
    }
    write_json(options.out / "summary.json", summary)
    if done.images:
        console.say(f"# sum of all terms minus embedding: at most {done.check:.1e}")
    if done.failed:
        console.error(f"{len(done.failed)} of {total} images failed")
    return FAILED if done.failed else 0
