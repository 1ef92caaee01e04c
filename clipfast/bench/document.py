"""Result files of ``clipfast bench``: their layout, and how they are read.

Tables, charts and comparisons need nothing but the document, so they can be made again from the file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfast.bench import machine
from clipfast.errors import InputError
from clipfast.inputs import open_regular

FORMAT = "clipfast.bench/1"

Document = Mapping[str, Any]
_QUANTILES = ("median", "q10", "q90")


def document(plan: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], *, complete: bool) -> dict[str, Any]:
    """A run in the layout of its file.

    Args:
        plan: :meth:`clipfast.bench.plan.Plan.to_json`.
        entries: what :func:`clipfast.bench.run.measure_plan` gave.
        complete: whether everything in the plan was tried.
    """
    import torch

    from clipfast.kernels.dispatch import BACKENDS

    return {
        "format": FORMAT,
        "complete": complete,
        "machine": machine.machine(str(plan["device"])),
        "versions": machine.versions(),
        "code": machine.code(),
        "backends": {backend.name: backend.unsupported_reasons() for backend in BACKENDS},
        "settings": {**plan, "float32_matmul_precision": torch.get_float32_matmul_precision()},
        "cases": list(entries),
    }


@dataclass(frozen=True)
class Factor:
    """Speed-up over the pairs: median, 10 % quantile and 90 % quantile."""

    median: float
    q10: float
    q90: float


@dataclass(frozen=True)
class Row:
    """One output of one combination, as tables and charts show it.

    Attributes:
        case: model, batch, dtype and backend in words.
        output: its name.
        failed: why nothing was measured, None where it was.
        milliseconds: median of one call, None where it failed.
        images_per_second: at that median.
        against: baseline → speed-up over it.
        memory_mb: peak, None where it was not measured.
        memory_of: ``"process"`` or ``"device"``.
        error: the largest error of the checks.
    """

    case: str
    output: str
    failed: str | None
    milliseconds: float | None
    images_per_second: float | None
    against: Mapping[str, Factor]
    memory_mb: float | None
    memory_of: str
    error: float | None

    @property
    def name(self) -> str:
        """What identifies a row among those of several files."""
        return f"{self.case}: {self.output}"

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Row":
        """Reads one entry of a file.

        Raises:
            KeyError, TypeError, ValueError: something is missing or is not what it should be.
        """
        model, batch, dtype, backend = (entry[key] for key in ("model", "batch", "dtype", "backend"))
        case, failed = f"{model}, batch {int(batch)}, {dtype}, {backend}", entry["failed"]
        if failed is not None:
            why = f"{failed['kind']}: {failed['reason']}"
            return cls(case, str(entry["output"]), why, None, None, {}, None, "process", None)
        memory = entry["memory"] or {"shown_mb": None, "of": "process"}
        shown = memory["shown_mb"]
        ratios = {str(name): timing["ratio_b_over_a"] for name, timing in entry["against"].items()}
        against = {name: Factor(*(_number(ratio[key]) for key in _QUANTILES)) for name, ratio in ratios.items()}
        return cls(
            case,
            str(entry["output"]),
            None,
            _number(entry["milliseconds"]),
            _number(entry["images_per_second"]),
            against,
            None if shown is None else _number(shown),
            str(memory["of"]),
            _number(entry["largest_error"]),
        )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} where a number is expected")
    return number


def rows(document: Document) -> list[Row]:
    """Every row of a document, in order."""
    return [Row.of(entry) for entry in document["cases"]]


def read(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        InputError: the file is missing, not JSON, of another format, or damaged.
    """
    try:
        with open_regular(path) as file:
            document = json.loads(file.read())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested too deeply
        raise InputError(f"{path} is not JSON: give the bench.json that `clipfast bench` wrote") from None
    kind = document.get("format") if isinstance(document, dict) else None
    if kind != FORMAT:
        reason = f"its format is {kind!r}, not {FORMAT!r}" if kind else f"it does not say that its format is {FORMAT!r}"
        raise InputError(f"{path} is not a result of `clipfast bench`: {reason}")
    try:
        rows(document)
        _ = provenance(document), document["complete"], document["settings"]["pairs"], document["settings"]["texts"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return dict(document)


def provenance(document: Document) -> str:
    """Machine, threads, versions and commit of a result file in one line.

    Args:
        document: a document of this format, or of ``benchmarks/``.
    """
    computer, code = document["machine"], document["code"]
    changed = " with local changes" if code["dirty"] else ""
    commit = f"; commit {code['commit'][:10]}{changed}" if code["commit"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    entries = document["cases"].values() if isinstance(document["cases"], dict) else document["cases"]
    threads = sorted({str(entry["torch_threads"]) for entry in entries if "torch_threads" in entry})
    computing = f", {'/'.join(threads)} threads" if threads else ""
    return f"{computer['device_name']}, {computer['cores']} cores{computing}; {packages}{commit}."
