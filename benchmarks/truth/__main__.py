"""Every experiment with its bars: ``python -m benchmarks.truth [--out FOLDER] [--model FOLDER]``.

Heads are named from 2,000 scenes of the split ``test`` and judged on 2,000 of ``test-unbiased``; look-alikes are 800
scenes of their own split, segmentation has 500. Writes ``truth.json`` and ``truth.md``; the exit code is 1 where a bar
is missed.
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
NAMED_FROM, JUDGED_ON, LOOKALIKES, MASKS = 2000, 2000, 800, 500


def run(
    model: clipfast.Model, sizes: Sequence[int], pools: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """All experiments; ``sizes`` are the four numbers of scenes, ``pools`` those of texts that replace heads."""
    named_from, judged_on, lookalikes, masks = sizes
    data = Scenes.draw(model, "test", named_from)
    say(f"{named_from} scenes decomposed to name heads from")
    test = Scenes.draw(model, "test-unbiased", judged_on)
    alike = Scenes.draw(model, "lookalike", lookalikes)
    say(f"{judged_on + lookalikes} decomposed to judge by")
    found: dict[str, Any] = {"names": naming.experiment(data, test)}
    say("names judged")
    found["terms"] = ablating.terms(test, data.moments)
    found["texts"] = ablating.texts(test, data.moments, pools)
    found["spurious"] = ablating.spurious(data, alike, test)
    say("ablations judged")
    found["retrieval"] = retrieving.experiment(test, found["names"]["named"], data.moments.heads())
    found["segmentation"] = segmenting.experiment(model, masks)
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs, writes, prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.truth", description="The paper's experiments on known truth.")
    parser.add_argument("--model", default="scenes", help="another model of scenes: its folder")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for truth.json and truth.md")
    parser.add_argument("--scenes", type=int, default=100, help="percent of the scenes, for a quick look")
    parser.add_argument("--pools", default=",".join(ablating.POOLS), help="pools of texts that heads are replaced by")
    given = parser.parse_args(arguments)
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {what}", file=sys.stderr, flush=True)

    sizes = [max(40, count * given.scenes // 100) for count in (NAMED_FROM, JUDGED_ON, LOOKALIKES, MASKS)]
    found = run(clipfast.load(given.model), sizes, given.pools.split(","), say)
    document = {
        "format": FORMAT,
        "model": given.model,
        "scenes": sizes,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "code": machine.code(),
        "seconds": round(time.perf_counter() - start),
        "cases": {},
        "experiments": found,
    }
    text = json.dumps(document, indent=1, default=_plain, allow_nan=False)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "truth.json").write_text(text + "\n", encoding="utf-8")
    shown = page(json.loads(text))
    (given.out / "truth.md").write_text(shown, encoding="utf-8")
    print(shown)
    bars = [bar for experiment in found.values() for bar in experiment.get("bars", ())]
    return 0 if all(bar.met for bar in bars) else 1


def _plain(value: Any) -> Any:
    if isinstance(value, Bar):
        return dict(zip(("name", "value", "bar"), value.cells(), strict=True)) | {"met": value.met}
    raise TypeError(f"{type(value)} is no JSON")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
