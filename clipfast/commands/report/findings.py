"""The analyses that a report shows: at most two passes over the contributions of a collection, and its pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clipfast.analyses.ablation import Batch, evaluate
from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.joint import head_overlaps, head_scores
from clipfast.analyses.moments import Moments
from clipfast.analyses.reconstruction import reconstruction_curve
from clipfast.analyses.terms import Terms
from clipfast.analyses.textspan import TextSpan
from clipfast.analyses.tops import Tops
from clipfast.analyses.variance import Shares, TermVariances
from clipfast.commands import console
from clipfast.commands.collecting import Collected
from clipfast.commands.heads import LATE_LAYERS, head_rows
from clipfast.commands.options import ClassOptions
from clipfast.commands.quantities import plural
from clipfast.commands.report.images import CollectionImages, HeadMapRequest, in_turn
from clipfast.commands.report.options import PictureOptions
from clipfast.commands.zeroshot import Labelled
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError
from clipfast.report.html.content import Ablated, Example, Head, HeadText, Judged, Overlaps
from clipfast.report.html.pictures import matrix

Pair = tuple[int, int]

TEXTS = 3
"""A head's texts that images are shown for."""
_PAIRS = 10
_LOGITS = 1 << 25  # at once, over images, classes and ablations: 128 MB
_ROWS = 256


@dataclass
class Findings:
    """Results as the page shows them; the names are those of its :class:`.Content`.

    Attributes:
        near_chance: whether zero-shot accuracy is near chance.
        check: the largest difference between the sum of all terms and the embedding.
    """

    heads: list[Head] = field(default_factory=list)
    shares: Shares | None = None
    ablated: Ablated | None = None
    near_chance: bool = False
    overlaps: Overlaps | None = None
    check: float | None = None
    examples: list[Example] = field(default_factory=list)
    thumbnails: dict[int, str] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)


class ZeroShot(Labelled):
    """Labelled images and their classifier, with accuracies as the page shows them."""

    @classmethod
    def maybe(cls, collected: Collected, zeroshot: ClassOptions) -> "ZeroShot | None":
        """None where the images have no labels; raises as :func:`.read_classes`."""
        if all(entry.label is None for entry in collected.collection.entries):
            if zeroshot.is_set():
                raise InputError(
                    "--classes, --prompt and --templates say what labels mean, and there are none: give --labels, too"
                )
            return None
        return cls.of(collected.collection, collected.model, zeroshot)

    def judged(self, name: str, accuracy: Accuracy) -> Judged:
        """An accuracy as the page shows it."""
        return Judged(name, accuracy.accuracy, accuracy.worst_group if self.groups.names else None)

    def worst_group(self, accuracy: Accuracy) -> str | None:
        """Name of the group with the smallest accuracy."""
        if not self.groups.names:
            return None
        accuracies = accuracy.group_accuracies
        return self.groups.names[min(accuracies, key=lambda group: accuracies[group])]


def analyse(
    collected: Collected,
    zeroshot: ZeroShot | None,
    named: Sequence[Pair],
    pool: tuple[Sequence[str], Tensor],
    size: int,
    pictures: PictureOptions,
) -> Findings:
    """Runs every analysis that the collection allows.

    Args:
        collected: the images and their model.
        zeroshot: the labelled images and their classifier; None without labels.
        named: heads to name.
        pool: ``T`` texts and their features ``[T, D]``.
        size: how many texts per head.
        pictures: how many pictures.

    Raises:
        InputError: fewer than two images, or a damaged collection.
    """
    collection, moments = collected.collection, collected.collection.moments
    texts, features = pool
    findings, alone = Findings(), dict[Pair, Judged]()
    kept = collection.holds_contributions
    late = [head for head in moments.heads() if head[0] in moments.layers[-LATE_LAYERS:]]
    with console.status("naming heads"):
        spans = moments.textspan(features, size, sorted({*named, *(late if zeroshot and kept else ())}))
    tops = Tops(pictures.top, max(pictures.random, pictures.examples))
    if kept:
        directions = {head: _first_features(spans[head], features) for head in named}
        first = _Pass(collection, zeroshot, tops, directions)
        alone = _first_pass(findings, first, moments)
        if zeroshot is not None:
            _replaced(findings, _Pass(collection, zeroshot), {head: spans[head] for head in late}, size)
    with console.status("comparing heads"):
        findings.overlaps = _overlaps(moments)
    for row in head_rows(moments):
        pair = row["layer"], row["head"]
        head = Head(*pair, share=row["share"], rank=row["rank"], alone=alone.get(pair))
        if pair in named:
            span = spans[pair]
            explained = zip(span.picks, span.explained.tolist(), strict=True)
            head_texts = [HeadText(texts[pick], share) for pick, share in explained]
            head = replace(head, texts=head_texts, notes=span.notes)
        findings.heads.append(head)
    _note_missing(findings, collected, zeroshot is not None, kept)
    if kept:
        _show(
            findings,
            collected,
            zeroshot,
            tops,
            {head: place for place, head in enumerate(named)},
            spans,
            features,
            pictures,
        )
    return findings


def _first_features(span: TextSpan, features: Tensor) -> Tensor:
    """Features of a head's first texts, zeros where it has fewer, ``[TEXTS, D]``."""
    rows = features.new_zeros(TEXTS, features.shape[1])
    picks = list(span.picks[:TEXTS])
    rows[: len(picks)] = features[picks]
    return rows


def _note_missing(findings: Findings, collected: Collected, labels: bool, kept: bool) -> None:
    collection = collected.collection
    count, failed = len(collection.entries), collection.failed
    if failed:
        findings.missing.append((plural(failed, "image"), "they could not be read when the images were collected"))
    if not kept:
        findings.missing.append(
            ("images, maps, shares of layers, ablations", "the collection holds moments only (--moments-only)")
        )
    if not labels:
        findings.missing.append(("zero-shot accuracy, ablations, segmentation", "the images have no labels (--labels)"))
    unlabelled = sum(entry.label is None for entry in collection.entries)
    if labels and unlabelled:
        findings.missing.append((f"accuracy on {unlabelled} of {plural(count, 'image')}", "they have no label"))
    unnamed = sum(head.texts is None for head in findings.heads)
    if unnamed:
        findings.missing.append((f"texts of {plural(unnamed, 'head')}", "--heads names others"))


class _Pass:
    """Reads contributions a few images at a time.

    Attributes:
        zeroshot: the labelled images and their classifier; None without labels.
        check: the largest difference between the sum of all terms and the embedding.
        variances: of layers.
    """

    def __init__(
        self,
        collection: Collection,
        zeroshot: ZeroShot | None,
        tops: Tops | None = None,
        directions: Mapping[Pair, Tensor] | None = None,
    ) -> None:
        self._collection, self.zeroshot = collection, zeroshot
        self._tops, self._directions = tops, directions or {}
        self.check, self.variances = 0.0, TermVariances()

    def batches(self, what: str, logits: int, *, analyse: bool) -> Iterator[Batch]:
        """Yields labelled images, few enough for ``logits`` per class; with ``analyse`` every image is analysed."""
        zeroshot, classes = self.zeroshot, 1 if self.zeroshot is None else len(self.zeroshot.classes.labels)
        step = max(1, min(_ROWS, _LOGITS // (logits * classes)))
        with console.progress(what, len(self._collection.entries)) as advance:
            for entries, whole in self._collection.batches():
                for start in range(0, len(entries), step):
                    entries_here = entries[start : start + step]
                    contributions = whole.select(range(start, start + len(entries_here)))
                    if analyse:
                        self.check = max(self.check, contributions.max_error())
                        self.variances.update(contributions)
                        if self._tops is not None and self._directions:
                            self._tops.push(head_scores(contributions, self._directions))
                    rows = [row for row, entry in enumerate(entries_here) if entry.label is not None]
                    if zeroshot is not None and rows:
                        labelled = [entries_here[row] for row in rows]
                        part = contributions if len(rows) == len(entries_here) else contributions.select(rows)
                        labels, groups = zeroshot.classes.index(labelled), zeroshot.groups.index(labelled)
                        yield (part, labels) if groups is None else (part, labels, groups)
                    advance(len(entries_here))


def _first_pass(findings: Findings, reading: _Pass, moments: Moments) -> dict[Pair, Judged]:
    """Fills in the sum check, shares of layers and, with labels, ablations; returns the accuracy without each head."""
    basis, zeroshot = moments.basis, reading.zeroshot
    layers, mlps, own = Terms.cumulative(basis), Terms.all_mlps(basis), Terms.all_class_tokens(basis)
    heads = {head: Terms.of(basis, heads=[head]) for head in moments.heads()}
    others = {"all MLPs": mlps}
    if moments.has_class_token:
        others |= {"CLS→CLS": own, "both": mlps | own}
    ablations = [*layers, *others.values(), *heads.values()]
    batches = reading.batches("reading contributions", 1 + len(ablations), analyse=True)
    alone: dict[Pair, Judged] = {}
    if zeroshot is None:
        for _ in batches:
            pass  # nothing is yielded, but all images are analysed
    else:
        accuracies = evaluate(batches, zeroshot.classifier, moments, ablations)
        baseline = accuracies[Terms.of(basis)]
        findings.near_chance = baseline.near_chance
        findings.ablated = Ablated(
            baseline=zeroshot.judged("nothing", baseline),
            chance=baseline.chance,
            layers=[
                zeroshot.judged(f"layers 0 to {layer}" if layer else "layer 0", accuracies[terms])
                for layer, terms in enumerate(layers)
            ],
            others=[zeroshot.judged(name, accuracies[terms]) for name, terms in others.items()],
            worst_group=zeroshot.worst_group(baseline),
        )
        alone = {head: zeroshot.judged(str(terms), accuracies[terms]) for head, terms in heads.items()}
    findings.check, findings.shares = reading.check, reading.variances.shares()
    return alone


def _replaced(findings: Findings, reading: _Pass, late: Mapping[Pair, TextSpan], size: int) -> None:
    """Accuracy with the heads of the last layers replaced by what their texts span."""
    zeroshot, ablated = reading.zeroshot, findings.ablated
    if zeroshot is None or ablated is None:
        return
    batches = reading.batches("replacing heads by texts", size + 1, analyse=False)
    curve = reconstruction_curve(batches, zeroshot.classifier, late)
    layers = sorted({layer for layer, _ in late})
    where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    findings.ablated = replace(
        ablated,
        sizes=[zeroshot.judged(str(texts), accuracy) for texts, accuracy in enumerate(curve.sizes)],
        replaced=f"The {len(late)} heads of {where}",
    )


def _overlaps(moments: Moments) -> Overlaps | None:
    heads = moments.heads()
    if len(heads) < 2:
        return None
    values = head_overlaps(moments)
    rows, columns = torch.triu_indices(len(heads), len(heads), 1)
    pairs = values[rows, columns]
    best = pairs.argsort(descending=True, stable=True)[:_PAIRS].tolist()
    names = [f"L{layer}.H{head}" for layer, head in heads]
    return Overlaps(
        heads=names,
        layers=[(layer, moments.basis.heads) for layer in moments.layers],
        picture=matrix(values.cpu().numpy()),
        alike=[(names[int(rows[at])], names[int(columns[at])], float(pairs[at])) for at in best],
    )


def _show(
    findings: Findings,
    collected: Collected,
    zeroshot: ZeroShot | None,
    tops: Tops,
    places: Mapping[Pair, int],
    spans: Mapping[Pair, TextSpan],
    features: Tensor,
    pictures: PictureOptions,
) -> None:
    """Rows of images for every head's first texts, thumbnails, maps and examples."""
    images = CollectionImages(collected)
    drawn = [sample.image for sample in tops.sample(0, 0)]
    by_share = sorted((head for head in findings.heads if head.texts), key=lambda head: -head.share)
    best: dict[Pair, list[list[int]]] = {}
    head_texts: dict[Pair, list[HeadText]] = {}
    for head in by_share:
        pair = head.layer, head.head
        rows = list(head.texts or ())
        for text in range(min(TEXTS, len(rows))):
            top, random = tops.best(places[pair], text), tops.sample(places[pair], text)[: pictures.random]
            rows[text] = replace(
                rows[text],
                best=[images.shot(score.image, score.score) for score in top],
                random=[images.shot(score.image, score.score) for score in random],
            )
            best.setdefault(pair, []).append([score.image for score in top])
        head_texts[pair] = rows
    shown = list(dict.fromkeys([*drawn[: pictures.random], *in_turn(best)]))
    findings.thumbnails = images.thumbnails(shown[: pictures.thumbnails], pictures.thumbnail_size)
    mapped = [
        HeadMapRequest(*pair, best[pair][0][0], head_texts[pair][0].text, features[spans[pair].picks[0]])
        for pair in list(head_texts)[: pictures.maps]
    ]
    maps = images.head_maps(mapped)
    findings.heads = [
        replace(head, texts=head_texts.get((head.layer, head.head), head.texts), map=maps.get((head.layer, head.head)))
        for head in findings.heads
    ]
    if zeroshot is not None:
        findings.examples = images.examples(drawn[: pictures.examples], zeroshot.classes.labels, zeroshot.classifier)
    if len(shown) > pictures.thumbnails:
        left = f"thumbnails of {len(shown) - pictures.thumbnails} of {len(shown)} images"
        findings.missing.append((left, f"--thumbnails is {pictures.thumbnails}; their names and scores are there"))
    if len(head_texts) > pictures.maps:
        left = f"maps of {len(head_texts) - pictures.maps} of {len(head_texts)} heads"
        findings.missing.append((left, f"--maps is {pictures.maps}, for the heads that vary most"))
    if images.gone:
        gone = plural(len(images.gone), "image")
        findings.missing.append((f"pictures of {gone}", "their files could not be opened again"))
