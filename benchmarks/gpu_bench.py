"""Where the questions of :mod:`benchmarks.gpu` are asked, how large they are, and how a case is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Call, Check, Comparison, compare

LOW = 2e-2
"""Largest error of a bfloat16 forward, relative to a whole of 1: the tests' bound."""
OP_LOW = 1e-2
"""Largest error of one bfloat16 operation, relative to its largest result: 2⁻⁸ and its sums."""
EXACT = 1e-5


@dataclass(frozen=True)
class Sizes:
    """How large the questions are.

    Attributes:
        models: models of the forward questions with the least factor over eager each promises (None: no promise).
        compiled: of these, compared with ``torch.compile`` too, and that factor.
        batch: images.
        pairs: interleaved pairs.
        repeats: calls per timing of a single operation.
        matmul: side of the square product whose rate is the yardstick.
        texts: texts of the map questions.
        pool: texts of the TEXTSPAN question.
        attention: tokens → promised factor over the best SDPA backend.
    """

    models: tuple[tuple[str, float | None], ...] = (("ViT-L-14", 1.12), ("ViT-B-16", 1.15), ("ViT-B-32", None))
    compiled: tuple[tuple[str, float], ...] = (("ViT-L-14", 1.05),)
    batch: int = 256
    pairs: int = 9
    repeats: int = 10
    matmul: int = 8192
    texts: int = 100
    pool: int = 3500
    attention: tuple[tuple[int, float | None], ...] = ((257, 1.25), (577, 1.05), (197, None), (50, None))


DRY = Sizes(
    models=(("ViT-S-32-alt", None),),
    compiled=(),
    batch=2,
    pairs=1,
    repeats=1,
    matmul=256,
    texts=5,
    pool=40,
    attention=((17, None),),
)
"""Everything once, as small as it gets: shows that the suite runs, measures nothing."""


@dataclass(frozen=True)
class Bench:
    """Where the questions are asked.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a dry run.
        sizes: how large.
        results: where cases are written.
        say: prints a line.
    """

    device: str
    sizes: Sizes
    results: Results
    say: Callable[[str], None]

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in."""
        return torch.bfloat16

    def draw(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        """Random numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def repeated(self, call: Call) -> Call:
        """A call as often as one timing takes it: launches overlap as they do in a forward."""

        def calls() -> None:
            for _ in range(self.sizes.repeats):
                call()

        return calls

    def compared(
        self,
        name: str,
        a: tuple[str, Call],
        b: tuple[str, Call],
        verify: Callable[[], Sequence[Check]],
        *,
        settings: dict[str, Any],
        bars: Callable[[Comparison], tuple[Bar, ...]] = lambda comparison: (),
        single: bool = True,
    ) -> Comparison:
        """Measures a against b behind the gate, writes the case and prints a line."""
        calls = [self.repeated(call) if single else call for _, call in (a, b)]
        comparison = compare(calls[0], calls[1], verify, count=self.sizes.pairs)
        held = bars(comparison)
        settings = {"repeats": self.sizes.repeats if single else 1, "dtype": "bfloat16"} | settings
        self.results.compared(name, comparison, a=a[0], b=b[0], settings=settings, bars=held)
        told = "; ".join(str(bar) for bar in held)
        self.say(f"{name}: {comparison.ratio:.3f}x, error {comparison.error:.1e}{'; ' + told if told else ''}")
        return comparison
