"""Runs every experiment: ``python -m benchmarks.truth [--out FOLDER] [--model FOLDER]``.

Heads are named from 2,000 scenes of the split ``test`` and evaluated on 2,000 of ``test-unbiased``. Look-alikes are 800
scenes of their own split; segmentation uses 500 scenes. The command writes ``truth.json`` and ``truth.md``; its exit
code is 1 if a bar is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clipfast
from benchmarks.results import FOLDER
from benchmarks.truth import ablating, naming, retrieving, segmenting
from benchmarks.truth.pages import page
from benchmarks.truth.scenes import Bar, Scenes
from clipfast.bench import machine

FORMAT = "clipfast.truth/1"
NAMED_FROM, EVALUATED_ON, LOOKALIKES, MASKS = 2000, 2000, 800, 500


def run(
    model: clipfast.Model, sizes: Sequence[int], pools: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs all experiments.

    Args:
        model: the bundled model or one trained like it.
        sizes: scenes to name heads from, scenes to evaluate on, look-alikes, and scenes to segment.
        pools: pools of texts that replace heads.
        say: prints a line.
    """
    named_from, evaluated_on, lookalikes, masks = sizes
    data = Scenes.draw(model, "test", named_from)
    say(f"decomposed {named_from} scenes to name heads from")
    test = Scenes.draw(model, "test-unbiased", evaluated_on)
    alike = Scenes.draw(model, "lookalike", lookalikes)
    say(f"decomposed {evaluated_on + lookalikes} scenes to evaluate on")
    experiments: dict[str, Any] = {"names": naming.experiment(data, test)}
    say("names evaluated")
    experiments["terms"] = ablating.terms(test, data.moments)
    experiments["texts"] = ablating.texts(test, data.moments, pools)
    experiments["spurious"] = ablating.spurious(data, alike, test)
    say("ablations evaluated")
    experiments["retrieval"] = retrieving.experiment(test, experiments["names"]["named"], data.moments.heads())
    experiments["segmentation"] = segmenting.experiment(model, masks)
    return experiments


def main(arguments: Sequence[str]) -> int:
    """Runs the experiments, writes and prints the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.truth", description="The paper's experiments with known ground truth."
    )
    parser.add_argument("--model", default="scenes", help="folder of another model of scenes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for truth.json and truth.md")
    parser.add_argument("--scenes", type=int, default=100, help="percentage of the scenes, for a quick run (100)")
    parser.add_argument("--pools", default=",".join(ablating.POOLS), help="pools of texts that replace heads")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    sizes = [max(40, count * options.scenes // 100) for count in (NAMED_FROM, EVALUATED_ON, LOOKALIKES, MASKS)]
    experiments = run(clipfast.load(options.model), sizes, options.pools.split(","), say)
    document = {
        "format": FORMAT,
        "model": options.model,
        "scenes": sizes,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "code": machine.code(),
        "seconds": round(time.perf_counter() - start),
        "cases": {},
        "experiments": experiments,
    }
    text = json.dumps(document, indent=1, default=_plain, allow_nan=False)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "truth.json").write_text(text + "\n", encoding="utf-8")
    markdown = page(json.loads(text))
    (options.out / "truth.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    bars = [bar for experiment in experiments.values() for bar in experiment.get("bars", ())]
    return 0 if all(bar.met for bar in bars) else 1


def _plain(value: Any) -> Any:
    if isinstance(value, Bar):
        return dict(zip(("name", "value", "bar"), value.cells(), strict=True)) | {"met": value.met}
    raise TypeError(f"{type(value)} cannot be written as JSON")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
