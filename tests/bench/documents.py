"""Result documents made by hand, for the tests of their readers."""

from typing import Any


def timing(ratio: float) -> dict[str, Any]:
    return {"pairs": 3, "ratio_b_over_a": {"median": ratio, "q10": ratio * 0.9, "q90": ratio * 1.1}}


def entry(output: str = "heads", ratio: float = 1.25, speed: float = 20.0, **changes: Any) -> dict[str, Any]:
    values = {
        "model": "ViT-B-32",
        "batch": 8,
        "dtype": "fp32",
        "backend": "auto",
        "output": output,
        "torch_threads": 2,
        "failed": None,
        "largest_error": 2e-7,
        "milliseconds": 8e3 / speed,
        "images_per_second": speed,
        "against": {"plain": timing(ratio)},
        "memory": {"shown_mb": 1500.0, "of": "process"},
    }
    return values | changes


def failure(output: str = "maps", kind: str = "out of memory", reason: str = "try a smaller --batch") -> dict[str, Any]:
    settings = {key: entry(output)[key] for key in ("model", "batch", "dtype", "backend", "output", "torch_threads")}
    return settings | {"failed": {"kind": kind, "reason": reason}, "checks": []}


def result(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = {
        "format": "clipfast.bench/1",
        "complete": True,
        "machine": {"device": "cpu", "device_name": "AMD EPYC", "cores": 2},
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "settings": {"pairs": 3, "texts": 16, "threads": 2, "device": "cpu"},
        "cases": list(entries),
    }
    return values | changes
