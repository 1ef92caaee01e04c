"""What one head of a cache costs against all, and a cache against a decomposition: ``python -m benchmarks.caches``.

Both sides of a comparison give the pooled row; the head is taken from the stack of all heads to check it. A case is a
model and a batch: ``python -m benchmarks.caches ViT-B-32:16 ViT-B-16:8``.
"""

import argparse
from collections.abc import Sequence

import torch

import clipfast
from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Check, Comparison, compare
from clipfast.compat.transformer_lens import ActivationCache, run_with_cache

QUESTION = "caches"
SENTENCE = "What does one head of a cache cost?"
CHEAPER = 20.0
"""How many times cheaper one head must be than all."""
ERROR = 1e-5


def one_head(cache: ActivationCache, layer: int, head: int, count: int) -> Comparison:
    """One head of the pooled row against the stack of all."""
    label = f"L{layer}H{head}"

    def verify() -> list[Check]:
        stack, labels = cache.stack_head_results(pos_slice="pooled", return_labels=True)
        error = (cache.head_result(layer, head) - stack[labels.index(label)]).abs().max() / stack.abs().max()
        return [Check(f"{label} is that of the stack", float(error), ERROR)]

    one, every = lambda: cache.head_result(layer, head), lambda: cache.stack_head_results(pos_slice="pooled")
    return compare(one, every, verify, count=count)


def against_decomposing(model: clipfast.Model, images: torch.Tensor, count: int) -> Comparison:
    """A new cache against a decomposition of the same images."""

    def verify() -> list[Check]:
        embedding, _ = run_with_cache(model, images)
        own = model.encode_image(images, normalize=False)
        return [Check("embedding", float((embedding - own).abs().max() / own.abs().max()), ERROR)]

    return compare(lambda: run_with_cache(model, images), lambda: model.decompose(images), verify, count=count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the cases, writes the result file and prints a line per comparison; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=SENTENCE)
    parser.add_argument("cases", nargs="*", default=["ViT-B-32:16", "ViT-B-16:8"], help="model:batch")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    results, met = Results(QUESTION, SENTENCE), True
    for case in given.cases:
        name, _, batch = case.partition(":")
        torch.manual_seed(0)
        model = clipfast.load(name, device="cpu")
        images = torch.randn(int(batch), 3, *model.image_size)
        settings = {"model": name, "batch": int(batch), "threads": given.threads, "pairs": given.pairs}
        _, cache = run_with_cache(model, images)
        head = one_head(cache, model.tower.layers - 2, 0, given.pairs)
        bar = Bar("times cheaper than all heads", head.ratio, CHEAPER, at_least=True)
        results.compared(f"{case} head", head, a="one head", b="all heads", settings=settings, bars=(bar,))
        print(f"{case}: one head {bar}")
        whole = against_decomposing(model, images, given.pairs)
        results.compared(f"{case} cache", whole, a="run_with_cache", b="decompose", settings=settings)
        print(f"{case}: decompose takes {whole.ratio:.3f} of run_with_cache")
        met = met and bar.met
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
