"""Everything a GPU is asked, in one command and under nine minutes: ``python -m benchmarks.gpu``.

Correctness against float64 comes first in every question and nothing that is wrong is timed. The comparisons run
interleaved at batch 256 in bfloat16 on tensors; the bars are held to, and a miss is printed as one. The result is one
JSON with device, versions and commit (``benchmarks/results/gpu-….json``). ``--dry-run`` runs every line of it on the
CPU at toy sizes and writes nothing that could be mistaken for a measurement.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_forward, gpu_operations
from benchmarks.gpu_bench import DRY, Bench, Sizes
from benchmarks.results import FOLDER, Results

QUESTION = "gpu"
SENTENCE = "On a GPU, how fast is a decomposed forward, and what it is made of?"

QUESTIONS: dict[str, Callable[[Bench], None]] = {
    "attention": gpu_operations.attention,
    "text_maps": gpu_operations.text_maps,
    "token_contributions": gpu_operations.token_contributions,
    "mlp": gpu_operations.mlp,
    "layer_norm": gpu_operations.layer_norm,
    "textspan": gpu_operations.textspan,
    "forward": gpu_forward.forward,
}
"""In the order they are asked: the quick ones first."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="these questions alone")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON")
    made.add_argument("--commit", help="the commit, where the copy that runs is no git checkout")
    made.add_argument("--minutes", type=float, default=8.5, help="ask no further question after this long (8.5)")
    made.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, results thrown away")
    return made


def ask(bench: Bench, names: Sequence[str], minutes: float) -> list[str]:
    """Asks the questions in turn.

    Returns:
        What went wrong or was left out, a line each.
    """
    started = time.monotonic()
    failed: list[str] = []
    for name in names:
        taken = time.monotonic() - started
        if taken > 60 * minutes:
            failed.append(f"{name}: not asked, {taken / 60:.1f} minutes were over")
            continue
        bench.say(f"--- {name} ({taken:.0f} s)")
        try:
            QUESTIONS[name](bench)
        except Exception as error:  # the other questions go on; what failed is reported at the end
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 when every question was answered, 1 when not, 2 without a GPU."""
    settings = parser().parse_args(arguments)
    dry = settings.dry_run
    if not dry and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; --dry-run shows that the suite runs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = Path(thrown_away) if dry else settings.out
        results = Results(QUESTION, SENTENCE, device="cpu" if dry else "cuda", folder=folder)
        results.note_commit(settings.commit)

        def say(line: str) -> None:
            print(line, flush=True)

        bench = Bench("cpu" if dry else "cuda", DRY if dry else Sizes(), results, say)
        failed = ask(bench, settings.only or list(QUESTIONS), settings.minutes)
        for line in failed:
            say(f"FAILED {line}")
        if not dry:
            say(f"written to {results.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
