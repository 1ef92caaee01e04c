"""``clipfast report``: one HTML page about a model on a set of images, that needs no network and nothing beside it.

``--out`` is the page, or a folder that gets ``report.html``. Images that are not a collection yet are collected first,
into the folder, or into ``NAME-collection`` beside a page that is named itself. Contributions are read twice at most,
some images at a time.
"""

import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from clipfast.commands import console
from clipfast.commands.collecting import Collected, collect
from clipfast.commands.heads import chosen_heads
from clipfast.commands.loading import versions
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.pools import RANDOM, fitting, pool_features, read_pool
from clipfast.commands.quantities import plural
from clipfast.commands.report.findings import Findings, ZeroShot, analyse
from clipfast.commands.report.options import Options
from clipfast.commands.results import prepare_results
from clipfast.dataset.manifest import is_collection
from clipfast.errors import InputError
from clipfast.files import write_text
from clipfast.report.html.content import Content, Fact

PAGE = "report.html"
_ENDINGS = (".html", ".htm")


def run(options: Options) -> int:
    """Analyses and writes the page; returns the exit code.

    Raises:
        ClipfastError: jinja2 is missing, an option that does not fit, or a model that cannot be loaded.
        OSError: the page cannot be written.
    """
    from clipfast.report.html.page import render  # first of all: without jinja2 there is no page

    started = perf_counter()
    page, folder = _places(options.out)
    prepare_results(page.parent, options.inputs)
    texts, notes = read_pool(options.naming.pool)
    for note in notes:
        console.warn(note)
    inputs = options.inputs
    collected_before = len(inputs.images) == 1 and is_collection(inputs.images[0])
    if options.zeroshot.is_set() and inputs.labels is None and not collected_before:
        raise InputError("--classes, --prompt and --templates say what labels mean: give --labels, too")
    collected = collect(inputs, folder, unfinished=True)
    if not collected.complete:
        return INTERRUPTED
    zeroshot = ZeroShot.maybe(collected, options.zeroshot)
    moments = collected.collection.moments
    every = moments.heads()
    named = every if options.heads is None else chosen_heads(options.heads, moments.basis, moments.layers)
    texts = fitting(collected.model, texts, options.naming.pool)
    features = pool_features(collected.model, texts, options.naming)
    labels = texts or [f"random vector {number}" for number in range(len(features))]
    findings = analyse(collected, zeroshot, named, (labels, features), options.size, options.pictures)
    with console.status("writing the page"):
        html = render(_content(options, collected, findings, len(features)))
        write_text(page, html)
    console.say(str(page))
    size, seconds = page.stat().st_size / 1e6, perf_counter() - started
    console.note(f"{plural(len(every), 'head')}, {plural(moments.count, 'image')}: {size:.1f} MB in {seconds:.0f} s")
    return FAILED if collected.failed else 0


def _places(out: Path) -> tuple[Path, Path]:
    """The page, and the folder for a collection."""
    if out.suffix.lower() in _ENDINGS and not out.is_dir():
        return out, out.with_name(f"{out.stem}-collection")
    return out / PAGE, out


def _content(options: Options, collected: Collected, findings: Findings, texts: int) -> Content:
    header = collected.collection.header
    return Content(
        title=options.title or f"{Path(header['model']).name or header['model']}, head by head",
        facts=_facts(options, collected, findings, texts),
        warnings=_warnings(collected, findings),
        missing=findings.missing,
        settings=_settings(options, collected),
        heads=findings.heads,
        shares=findings.shares,
        ablated=findings.ablated,
        overlaps=findings.overlaps,
        examples=findings.examples,
        thumbnails=findings.thumbnails,
    )


def _facts(options: Options, collected: Collected, findings: Findings, texts: int) -> list[Fact]:
    header, model = collected.collection.header, collected.model
    moments, entries = collected.collection.moments, collected.collection.entries
    labelled = sum(entry.label is not None for entry in entries)
    facts = [
        Fact("model", Path(header["model"]).name or header["model"], header["pretrained"] or ""),
        Fact("images", f"{moments.count:,}", f"{labelled:,} with labels" if labelled else "without labels"),
        Fact("layers × heads", f"{model.layers} × {model.heads}", f"embedding of {model.tower.embed_dim}"),
        Fact("texts", f"{texts:,}", f"pool {Path(options.naming.pool).name}, up to {options.size} per head"),
    ]
    ablated = findings.ablated
    if ablated is not None:
        value = f"{100 * ablated.baseline.accuracy:.1f} %"
        note = f"of {plural(labelled, 'image')}; chance {100 * ablated.chance:.1f} %"
        facts.insert(0, Fact("zero-shot accuracy", value, note, findings.near_chance))
        if ablated.baseline.worst is not None and ablated.worst_group is not None:
            counts = Counter(entry.group for entry in entries if entry.label is not None)
            note = f"{ablated.worst_group}, {plural(counts[ablated.worst_group], 'image')}"
            facts.insert(1, Fact("worst group", f"{100 * ablated.baseline.worst:.1f} %", note))
    if findings.check is not None:
        stored = collected.collection.manifest.settings.kept.get("codes")
        how = ", as they are stored in float16" if stored == "float16" else ""
        facts.append(Fact("sum check", f"{findings.check:.1e}", f"all terms against the embedding{how}"))
    return facts


def _warnings(collected: Collected, findings: Findings) -> list[str]:
    header, warnings = collected.collection.header, []
    if collected.model.pretrained is False:
        warnings.append("the model has random weights: nothing here says anything about a trained one.")
    if findings.near_chance:
        warnings.append(
            "zero-shot accuracy is near chance: check that classes and prompts fit the labels, and that the model has "
            "its weights. Ablations say nothing then."
        )
    if not header["complete"]:
        warnings.append("the pass over the images was not finished: these are the images until then.")
    return warnings


def _settings(options: Options, collected: Collected) -> list[tuple[str, str]]:
    header, model, pool = collected.collection.header, collected.model, options.naming.pool
    software = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return [
        ("command", shlex.join(["clipfast", *sys.argv[1:]])),
        ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("model", " ".join(filter(None, (header["model"], header["pretrained"])))),
        ("precision", f"{header['dtype']} on {model.device.type}"),
        ("image size", "{} × {} pixels".format(*model.image_size)),
        ("collection", str(collected.collection.folder)),
        ("pool", f"{pool}, seed {options.naming.seed}" if pool == RANDOM else pool),
        ("software", software),
    ]
