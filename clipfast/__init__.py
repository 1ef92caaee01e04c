"""clipfast: what CLIP's image encoder sees, as an exact sum over layers, heads and patches.

>>> import clipfast
>>> model = clipfast.load("scenes")
>>> contributions = model.decompose(["photo.jpg"], texts=["a red star", "a forest"])
>>> contributions.heads().shape, contributions.maps.shape, contributions.max_error()

Importing the package imports neither torch nor a device: names below are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "load": "clipfast.loading",
    "wrap": "clipfast.loading",
    "Model": "clipfast.model",
    "Contributions": "clipfast.contributions",
    "Ablated": "clipfast.analyses.ablated",
    "Accuracy": "clipfast.analyses.accuracy",
    "Terms": "clipfast.analyses.terms",
    "ablate": "clipfast.analyses.ablation",
    "Explanation": "clipfast.analyses.explaining",
    "explain": "clipfast.analyses.explaining",
    "Moments": "clipfast.analyses.moments",
    "TextSpan": "clipfast.analyses.textspan",
    "textspan": "clipfast.analyses.textspan",
    "Summary": "clipfast.summary",
    "Verification": "clipfast.verification",
    "ClipfastError": "clipfast.errors",
    "ImageError": "clipfast.errors",
    "InputError": "clipfast.errors",
    "MissingExtra": "clipfast.errors",
    "ModelError": "clipfast.errors",
    "NotKept": "clipfast.errors",
    "UnsupportedTower": "clipfast.errors",
}

__all__ = [
    "Ablated",
    "Accuracy",
    "ClipfastError",
    "Contributions",
    "Explanation",
    "ImageError",
    "InputError",
    "MissingExtra",
    "Model",
    "ModelError",
    "Moments",
    "NotKept",
    "Summary",
    "Terms",
    "TextSpan",
    "UnsupportedTower",
    "Verification",
    "ablate",
    "explain",
    "load",
    "textspan",
    "wrap",
]

if TYPE_CHECKING:
    from clipfast.analyses.ablated import Ablated
    from clipfast.analyses.ablation import ablate
    from clipfast.analyses.accuracy import Accuracy
    from clipfast.analyses.explaining import Explanation, explain
    from clipfast.analyses.moments import Moments
    from clipfast.analyses.terms import Terms
    from clipfast.analyses.textspan import TextSpan, textspan
    from clipfast.contributions import Contributions
    from clipfast.errors import (
        ClipfastError,
        ImageError,
        InputError,
        MissingExtra,
        ModelError,
        NotKept,
        UnsupportedTower,
    )
    from clipfast.loading import load, wrap
    from clipfast.model import Model
    from clipfast.summary import Summary
    from clipfast.verification import Verification


def __getattr__(name: str) -> Any:
    if name == "dataset":
        return import_module("clipfast.dataset")
    if name not in _HOME:
        raise AttributeError(f"module 'clipfast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
