"""All GPU benchmarks in one command that takes less than nine minutes: ``python -m benchmarks.gpu``.

Every benchmark checks its results against float64 before it is timed. The comparisons run interleaved at batch 256 in
bfloat16; a missed bar is printed as missed. The result is one JSON file with device, versions and commit
(``benchmarks/results/gpu-….json``). ``--dry-run`` runs every benchmark on the CPU at toy sizes and writes no result.
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
"""In the order they run: the quick ones first."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    command.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="run only these questions")
    command.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON")
    command.add_argument("--commit", help="the commit to record when this copy is not a git checkout")
    command.add_argument("--minutes", type=float, default=8.5, help="start nothing new after this many minutes (8.5)")
    command.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; results are discarded")
    return command


def ask(bench: Bench, names: Sequence[str], minutes: float) -> list[str]:
    """Runs the named benchmarks in turn.

    Returns:
        One line for each that failed or was skipped.
    """
    started = time.monotonic()
    failed: list[str] = []
    for name in names:
        elapsed = time.monotonic() - started
        if elapsed > 60 * minutes:
            failed.append(f"{name}: not run, {elapsed / 60:.1f} minutes had passed")
            continue
        bench.say(f"--- {name} ({elapsed:.0f} s)")
        try:
            QUESTIONS[name](bench)
        except Exception as error:  # the other benchmarks still run; failures are reported at the end
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if every benchmark succeeded, 1 if not, 2 without a GPU."""
    settings = parser().parse_args(arguments)
    dry = settings.dry_run
    if not dry and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; --dry-run shows that the suite runs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as discarded:
        folder = Path(discarded) if dry else settings.out
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
