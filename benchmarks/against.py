"""Compares the speed of two checkouts' decomposed forwards: ``python -m benchmarks.against PATH``.

Each side is a process that imports clipfast from its checkout, builds the same seeded model and images, and runs one
decomposition per request. A round runs A B B A, so drift of the machine and the order of the sides affect both alike.
Nothing is timed unless their results are identical to the bit, or within float32 rounding with ``--close``. The command
prints the median of the ratios of the rounds; its exit code is 1 if that is below ``--least``.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# The worker uses only API that all versions share: wrap, decompose, and attributes of the result.
WORKER = """
import hashlib, json, sys, time
sys.path.insert(0, sys.argv[1])
settings = json.loads(sys.argv[2])
import open_clip, torch
import clipfast
torch.set_num_threads(settings["threads"])
torch.manual_seed(0)
if settings["model"] == "scenes":
    model = clipfast.load("scenes", device="cpu")
else:
    model = clipfast.wrap(open_clip.create_model(settings["model"], precision=settings["dtype"]).eval())
generator = torch.Generator().manual_seed(1)
size = model.tower.image_size
images = torch.randn(settings["batch"], 3, *size, generator=generator).to(model.dtype)
texts = torch.nn.functional.normalize(torch.randn(16, model.tower.embed_dim, generator=generator), dim=1)

def once():
    result = model.decompose(images, texts=texts, maps="summed", attention=True)
    return result, result.heads()

result, heads = once()
digest = hashlib.sha256()
for array in (result.embedding, result.codes, result.attention, result.maps, heads):
    digest.update(array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(json.dumps({"file": clipfast.__file__, "digest": digest.hexdigest(), "total": heads.double().sum().item(),
                  "scale": heads.double().abs().sum().item()}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(settings["repeat"]):
        result = once()
    seconds = time.perf_counter() - start
    del result
    print(json.dumps(seconds / settings["repeat"]), flush=True)
"""


class Side:
    """A process that decomposes with the clipfast of one checkout."""

    def __init__(self, checkout: Path, settings: dict[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", WORKER, str(checkout), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = self._answer()
        if not Path(self.start["file"]).is_relative_to(checkout):
            raise SystemExit(f"benchmarks.against: {checkout} imports {self.start['file']}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks.against: a process ended with code {self._process.wait()}")
        return json.loads(line)

    def seconds(self) -> float:
        """Wall time of one decomposition."""
        assert self._process.stdin is not None
        self._process.stdin.write("once\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(prog="benchmarks.against", description="Compares the speed of two checkouts.")
    parser.add_argument("other", type=Path, help="the other checkout, with its C++ library built")
    parser.add_argument("--model", action="append", help="an open_clip name, or scenes; repeatable (ViT-B-32, scenes)")
    parser.add_argument("--dtype", default="fp32", help="open_clip's precision of the weights (fp32)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="decompositions per timing")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, A B B A (15)")
    parser.add_argument("--least", type=float, default=0.99, help="least accepted speed relative to the other (0.99)")
    parser.add_argument("--close", action="store_true", help="accept results that differ by rounding")
    options = parser.parse_args(arguments)
    missed = False
    for model in options.model or ["ViT-B-32", "scenes"]:
        settings = {name: getattr(options, name) for name in ("dtype", "batch", "threads", "repeat")} | {"model": model}
        sides = [Side(path.resolve(), settings) for path in (ROOT, options.other)]
        try:
            mine, theirs = (side.start for side in sides)
            same = mine["digest"] == theirs["digest"]
            if not same and not (options.close and abs(mine["total"] - theirs["total"]) <= 1e-5 * theirs["scale"]):
                print(f"{model}: the results differ, nothing is timed")
                return 1
            times: list[tuple[float, float]] = []
            for number in range(options.rounds + 1):
                mine_first, theirs_first, theirs_last, mine_last = (sides[side].seconds() for side in (0, 1, 1, 0))
                if number:  # the first round is warm-up
                    times.append(((mine_first + mine_last) / 2, (theirs_first + theirs_last) / 2))
        finally:
            for side in sides:
                side.close()
        ratios = sorted(theirs / mine for mine, theirs in times)
        speed, low, high = median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        missed |= speed < options.least
        here, there = (1e3 * median(side_times) for side_times in zip(*times, strict=True))
        print(
            f"{model} {options.dtype}, batch {options.batch}, {options.threads} threads: {here:.4g} ms here, "
            f"{there:.4g} ms there, {speed:.3f} times as fast ({low:.3f}–{high:.3f}), {len(times)} rounds, "
            f"{'same bits' if same else 'results within rounding'}",
            flush=True,
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
