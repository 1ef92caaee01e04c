"""The logger of ``clipfast.compat.clip_text_span`` against the published way: ``python -m benchmarks.clip_text_span``.

Both sides do what a script does for a batch: ``reinit``, ``encode_image(…, attn_method=…)``, ``finalize``. The other
side is the definition written out as the published code computes it (:mod:`clipfast.bench.naive`, ``[B, N, N, H, W]``
per layer); with ``--reference PATH`` it is that code itself, in its own process (:mod:`benchmarks.reference`). Arrays
are compared first, and nothing is timed unless they agree. The exit code is 1 where a bar is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.bench_reference import BOUND as PUBLISHED_BOUND
from benchmarks.reference import Reference, to
from benchmarks.results import FOLDER, Results
from clipfast.bench import naive
from clipfast.bench.measuring import Bar, Check, Comparison, compare, require
from clipfast.bench.measuring import pairs as interleave
from clipfast.bench.memory import Peak, peak_memory
from clipfast.compat.clip_text_span import PRSLogger, hook_prs_logger

QUESTION = "clip_text_span"
SENTENCE = "How much faster and smaller is a script for the paper's package on clipfast?"


@dataclass(frozen=True)
class Setup:
    """One comparison.

    Attributes:
        model: an open_clip name.
        batch: images per batch.
        spatial: whether terms have a token axis.
        faster: the least accepted ratio of times; None for no bar.
    """

    model: str
    batch: int
    spatial: bool
    faster: float | None

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.model} {'tokens' if self.spatial else 'heads'}"


SETUPS = (
    Setup("ViT-B-32", 4, True, 10),
    Setup("ViT-B-32", 8, False, None),
    Setup("ViT-B-16", 1, True, 45),
)
SMALLER = 0.5
"""The largest accepted ratio of the memory that a batch with tokens needs beside model and images."""


class Clip(nn.Module):
    """A CLIP without its text encoder, as far as a script for the package needs it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings ``[B, D]``."""
        features: Tensor = self.visual(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features


@torch.no_grad()
def logged(model: Any, prs: PRSLogger, images: Tensor) -> naive.Result:
    """What a script does for a batch."""
    prs.reinit()
    method = "head" if prs.spatial else "head_no_spatial"
    representation = model.encode_image(images, attn_method=method, normalize=False)
    return naive.Result(representation, *prs.finalize(representation))


def logger_call(name: str, batch: int, threads: int, spatial: bool, device: str = "cpu") -> Callable[[], object]:
    """:func:`logged`, ready to run."""
    torch.set_num_threads(threads)
    module = cases.module(name, device)
    model: Any = Clip(module.visual)  # type: ignore[arg-type]
    images = cases.noise(module.visual, batch, device)
    prs = hook_prs_logger(model, device, spatial=spatial)
    return lambda: logged(model, prs, images)


def checks(mine: naive.Result, other: naive.Result, bound: float) -> list[Check]:
    """Every array of the two sides."""
    return [
        Check("attention's terms", cases.relative(mine.attentions, other.attentions), bound),
        Check("start and MLPs", cases.relative(mine.start_and_mlps, other.start_and_mlps), bound),
        Check("embedding", cases.difference(cases.unit(mine.embedding), cases.unit(other.embedding)), bound),
    ]


def measure(
    model: Any, images: Tensor, setup: Setup, pairs: int, threads: int, checkout: Path | None
) -> tuple[Comparison, Peak | None]:
    """Compares a batch; the second result is the checkout's memory."""
    visual, device = model.visual, images.device
    with hook_prs_logger(model, device, spatial=setup.spatial) as prs:
        if checkout is None:

            def written_out() -> naive.Result:
                return naive.decompose(visual, images, spatial=setup.spatial)

            def verify() -> list[Check]:
                return checks(logged(model, prs, images), written_out(), cases.BOUND)

            return compare(lambda: logged(model, prs, images), written_out, verify, count=pairs, warmup=1), None
        with (
            tempfile.TemporaryDirectory() as folder,
            Reference(
                checkout, setup.model, visual, images, spatial=setup.spatial, threads=threads, folder=Path(folder)
            ) as other,
        ):
            made = checks(logged(model, prs, images), to(other.result(), device), PUBLISHED_BOUND)
            require(made)
            timed = interleave(lambda: logged(model, prs, images), other.run, pairs=pairs, warmup=1)
            peak = other.peak()
        memory = Peak(peak["loaded_mb"], peak["peak_mb"], "in its own process", None, peak.get("device_peak_mb"))
        return Comparison(timed.seconds_a, timed.seconds_b, tuple(made)), memory


def run(setup: Setup, results: Results, pairs: int, threads: int, device: str, checkout: Path | None) -> bool:
    """Measures, writes and prints one case; returns whether its bars are met."""
    torch.set_num_threads(threads)
    module = cases.module(setup.model, device)
    model = Clip(module.visual)  # type: ignore[arg-type]
    images = cases.noise(module.visual, setup.batch, device)
    comparison, theirs = measure(model, images, setup, pairs, threads, checkout)
    del model, module
    arguments = {"name": setup.model, "batch": setup.batch, "spatial": setup.spatial}
    arguments |= {"threads": threads, "device": device}
    memory = (
        peak_memory("benchmarks.clip_text_span:logger_call", **arguments),
        theirs or peak_memory("benchmarks.cases:naive_call", **arguments),
    )
    share = memory[0].increment_mb / memory[1].increment_mb
    bars = [] if setup.faster is None else [Bar("times as fast", comparison.ratio, setup.faster, True)]
    bars += [Bar("of the memory beside the model", share, SMALLER, False)] if setup.spatial else []
    other = "written out" if checkout is None else "published code"
    results.compared(
        setup.name,
        comparison,
        a="logger",
        b=other,
        settings={"model": setup.model, "batch": setup.batch, "tokens": setup.spatial, "dtype": "float32"}
        | {"threads": threads, "device": device},
        memory=memory,
        bars=tuple(bars),
    )
    print(
        f"{setup.name}, batch {setup.batch}: {comparison.ratio:.3g} times as fast as the {other}, "
        f"{memory[0].increment_mb:.0f} against {memory[1].increment_mb:.0f} MB beside the model "
        f"(peaks {memory[0].peak_mb:.0f} and {memory[1].peak_mb:.0f} MB), largest error {comparison.error:.1e}"
    )
    for bar in bars:
        print(f"  {bar}")
    return all(bar.met for bar in bars)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparisons; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.clip_text_span", description=SENTENCE)
    parser.add_argument("--reference", type=Path, help="a checkout of the published code")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs per comparison (7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--only", help="cases whose name contains this text")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the result")
    options = parser.parse_args(arguments)
    chosen = [setup for setup in SETUPS if (options.only or "") in setup.name]
    if not chosen:
        parser.error(f"--only is {options.only!r}: the cases are {', '.join(setup.name for setup in SETUPS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(QUESTION, SENTENCE, device=options.device, folder=options.out)
    met = [run(s, results, options.pairs, options.threads, options.device, options.reference) for s in chosen]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
