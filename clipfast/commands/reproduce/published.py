"""Published numbers, and how measured ones compare with them.

A number is compared only where the model, its weights, the data and the texts are those of the published set-up. All
others are shown as "not comparable", with every reason. Tolerances say how far a faithful run may be from the published
number: rounding of published digits, features of texts that were computed in half precision, and decoders of JPEGs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from clipfast.report.shares import rounded

PAPER = "arXiv 2310.05916"
CODE_RUN = "third-party runs of the published code"
LATER = "arXiv 2406.04341"

_B, _L, _H = "ViT-B-16/laion2b_s34b_b88k", "ViT-L-14/laion2b_s32b_b82k", "ViT-H-14/laion2b_s32b_b79k"
_B32 = "ViT-B-32/openai"
_IMAGENET: Final = {"images": 50000, "classes": 1000, "class names": "open_clip", "templates": "open_clip"}
_MASKED: Final = {"images": 4276, "classes": 1000, "class names": "open_clip", "templates": "open_clip"}
_POOL: Final = {"pool": "the published descriptions, given with --pool FILE"}
_ANY = "a model that the source available here does not name"

HEADS: Final[dict[str, str]] = {
    _B: "L11.H3, L10.H11, L10.H10, L9.H8, L9.H6, L11.H6, L11.H0",
    _L: "L21.H1, L22.H12, L22.H13, L21.H11, L21.H14, L23.H6, L21.H3, L21.H6, L21.H8, L21.H13, L22.H2, L22.H15, L23.H1, "
    "L23.H3, L23.H5",
    _H: "L31.H12, L30.H11, L29.H4, L31.H8, L30.H15, L30.H12, L30.H6, L29.H14, L29.H8",
}
"""The heads of scenery and geography that the paper's authors removed for Waterbirds, by model."""


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        table: the table.
        row: its row's name, or role.
        column: its column.
        low: the number, or the lower end of a range.
        high: the upper end of a range; the number itself where it is none.
        tolerance: how far a faithful run may be off.
        model: as :func:`.model_name` has it.
        source: where it is from.
        requires: what the set-up has to be, by the names of a table's ``setup``.
    """

    table: str
    row: str
    column: str
    low: float
    high: float
    tolerance: float
    model: str
    source: str
    requires: Mapping[str, Any] = field(default_factory=dict)


def _accuracy(row: str, column: str, model: str, value: float, source: str = CODE_RUN) -> Published:
    return Published("ablations", row, column, value, value, 0.005, model, source, _IMAGENET)


def _masked(method: str, model: str, source: str, values: Sequence[float]) -> list[Published]:
    return [
        Published("segmentation", f"{method}, published masks", column, value, value, 0.01, model, source, _MASKED)
        for column, value in zip(("accuracy", "mIoU", "mAP_both"), values, strict=False)
    ]


NUMBERS: Final[tuple[Published, ...]] = (
    *(_accuracy("nothing", "accuracy", model, value) for model, value in ((_B, 0.7023), (_L, 0.7525), (_H, 0.7796))),
    *(
        Published("ablations", "all MLPs", "change", -0.03, -0.01, 0.005, model, PAPER, _IMAGENET)
        for model in (_B, _L, _H)
    ),
    *(
        Published("texts", "descriptions", "60", value, value, 0.02, model, CODE_RUN, _IMAGENET | _POOL)
        for model, value in ((_B, 0.6762), (_L, 0.6734), (_H, 0.5683))
    ),
    *_masked("ours", _ANY, PAPER, (0.7521, 0.5450, 0.8161)),
    *_masked("ours", _B32, LATER, (0.765, 0.581, 0.841)),
    *_masked("attention", _B32, LATER, (0.696, 0.498, 0.800)),
    *_masked("rollout", _B32, LATER, (0.618, 0.426, 0.740)),
    *_masked("gradcam", _B32, LATER, (0.673, 0.393, 0.619)),
    *_masked("chefer", _B32, LATER, (0.689, 0.491, 0.797)),
)
"""Every number there is to compare with."""


def model_name(model: str | None, pretrained: str | None, published_as: str | None) -> str:
    """A model and its weights as published numbers name them: ``MODEL/TAG``."""
    if published_as is not None:
        return published_as
    name = (model or "scenes").removesuffix("-quickgelu")
    return f"{name}/{pretrained}" if pretrained else name


def compare(
    table: str, model: str, setup: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Measured numbers beside all published ones of a table.

    Args:
        table: its name.
        model: :func:`model_name`.
        setup: of the measurement.
        rows: of the table.

    Returns:
        For each published number what was measured, the difference, the tolerance and the verdict: ``"agrees"``,
        ``"differs"`` or ``"not comparable"`` with what differs.
    """
    compared = []
    for number in NUMBERS:
        if number.table != table:
            continue
        row = next((row for row in rows if number.row in (row["name"], row.get("role"))), None)
        measured = None if row is None else row.get(number.column)
        reasons = _reasons(number, model, setup, measured)
        off = None if measured is None else max(number.low - measured, measured - number.high, 0.0)
        agrees = off is not None and off <= number.tolerance
        compared.append(
            {
                "row": number.row,
                "column": number.column,
                "published": [number.low, number.high],
                "measured": measured,
                "outside": None if off is None else rounded(off),
                "tolerance": number.tolerance,
                "model": number.model,
                "source": number.source,
                "verdict": "not comparable" if reasons else "agrees" if agrees else "differs",
                "reasons": reasons,
            }
        )
    return compared


def _reasons(
    number: Published, model: str, setup: Mapping[str, Any], measured: float | None
) -> dict[str, dict[str, Any]]:
    """What differs from the published set-up, by name: what it is here, and what it was there."""
    here, there = {"model": model, **setup}, {"model": number.model, **number.requires}
    reasons = {
        name: {"here": here.get(name), "published": value} for name, value in there.items() if here.get(name) != value
    }
    if measured is None and not reasons:
        return {"measurement": {"here": None, "published": number.low}}
    return reasons
