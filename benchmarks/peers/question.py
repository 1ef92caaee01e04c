"""What a peer is asked, and how the answers of the two sides are compared.

A *peer* is another package. A *question* has two sides that answer it from the same weights, images and texts. Each
side is built on its own, because its memory is measured in a process of its own. A side with weights of its own keeps
the images alone, not the inputs with the model that it was made from.
"""

import copy
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

import clipfast
from benchmarks import cases
from benchmarks.clip_text_span import Clip
from clipfast.bench.measuring import Call, Check
from clipfast.bench.memory import Peak

PROMPTS = 8
"""Texts of a question about texts."""

Answer: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Inputs:
    """What both sides are asked about.

    Attributes:
        name: of the model.
        vision: the model without its text encoder, which no question is about; a side may change it.
        images: ``[B, 3, height, width]``.
        texts: ``[PROMPTS, D]``, unit norm.
        threads: of torch, also in processes that a side starts.
        checkout: of the published code, where one was given.
    """

    name: str
    vision: Clip
    images: Tensor
    texts: Tensor
    threads: int
    checkout: Path | None = None

    @classmethod
    def of(cls, name: str, batch: int, threads: int, checkout: Path | None = None) -> "Inputs":
        """A model by name, with noise for images and random directions for texts."""
        torch.set_num_threads(threads)
        vision = Clip(cast(Any, cases.module(name)).visual).eval()
        images = cases.noise(vision.visual, batch)
        texts = cases.unit_texts(clipfast.wrap(vision.visual).tower.embed_dim, count=PROMPTS)
        return cls(name, vision, images, texts, threads, checkout)

    def copied(self) -> "Inputs":
        """The same with a model of its own, for the second side in one process."""
        return Inputs(self.name, copy.deepcopy(self.vision), self.images, self.texts, self.threads, self.checkout)


@dataclass(frozen=True)
class Side:
    """One side of a question, ready to answer it.

    Attributes:
        answer: gives the answer.
        run: what is timed, where that is not ``answer`` itself.
        peak: its memory, where it runs in a process of its own already.
        close: ends such a process.
    """

    answer: Callable[[], Answer]
    run: Call | None = None
    peak: Callable[[], Peak] | None = None
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def timed(self) -> Call:
        """What is timed."""
        return self.answer if self.run is None else self.run


class NotPossible(Exception):
    """A peer cannot answer; the message says why."""


@dataclass(frozen=True)
class Question:
    """A question that a peer and clipfast both answer.

    Attributes:
        name: a few words, unique within the peer.
        asked: what both give, with its axes.
        fair: how the peer is used, where the two ways differ, and why the pair is fair all the same.
        ours: builds clipfast's side.
        theirs: builds the peer's side; raises :class:`NotPossible` where the peer cannot answer.
        bound: the largest error accepted, relative to the largest number of the peer's answer.
    """

    name: str
    asked: str
    fair: str
    ours: Callable[[Inputs], Side]
    theirs: Callable[[Inputs], Side]
    bound: float = cases.BOUND

    def check(self, ours: Answer, theirs: Answer) -> Check:
        """Compares two answers."""
        return Check(f"{self.name}, relative to the largest", error(ours, theirs), self.bound)


def error(a: Answer, b: Answer) -> float:
    """Largest difference over the largest number of ``b``; NaN where shapes differ, a value is NaN or ``b`` is zero."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return cases.relative(a, b) if b.any() else float("nan")  # zeros agree whatever was computed
    if len(a) != len(b):
        return float("nan")
    errors = torch.tensor([error(one, other) for one, other in zip(a, b, strict=True)])
    return float(errors.max())  # max() of a list can lose a NaN


@dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes:
        name: as its users write it.
        distribution: its name on PyPI; empty for a checkout.
        module: what is imported.
        questions: what it is asked.
    """

    name: str
    distribution: str
    module: str
    questions: tuple[Question, ...]

    def missing(self) -> str | None:
        """Why it cannot be used here, in one line; None where it can."""
        if not self.distribution:
            return None
        if find_spec(self.module.partition(".")[0]) is None:
            return f"not installed: pip install {self.distribution}"
        try:
            import_module(self.module)
        except Exception as failure:
            return f"cannot be imported with torch {torch.__version__}: {one_line(failure)}"
        return None

    def version(self) -> str | None:
        """Of the installed package; None for a checkout."""
        try:
            return version(self.distribution) if self.distribution else None
        except PackageNotFoundError:
            return None


def one_line(failure: BaseException) -> str:
    """An exception as one short line: its class and its message's first sentence."""
    lines = str(failure).strip().splitlines()
    sentence = lines[0].partition(". ")[0] if lines else ""
    return textwrap.shorten(f"{type(failure).__name__}: {sentence}".rstrip(": "), 200, placeholder=" …")
