"""Second-order effects of a layer's neurons against the plain forward of the same images.

``python -m benchmarks.second_order`` times two sides in turn: open_clip's own ``encode_image``, and a decomposition
into the effects of all neurons of one layer with the norm of each and its score for 16 texts. First some neurons are
compared with the definition, written out in float64, and the embeddings with the module's.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipfast
from benchmarks.cases import instructions, module, noise, plain, relative, unit_texts
from benchmarks.results import FOLDER, Results
from clipfast.analyses.second_order import NeuronEffects, SecondOrder
from clipfast.bench.measuring import Bar, Check, compare

QUESTION = "second_order"
SENTENCE = "What do second-order effects of neurons take, against the plain forward?"
TIMES = 3.0
"""The most time, in plain forwards of the same images."""
BOUND = 1e-5
"""The largest error accepted, relative to the largest value."""
CHECKED_IMAGES, CHECKED_NEURONS = 2, 3


def everything(lens: SecondOrder, images: Tensor, texts: Tensor) -> tuple[NeuronEffects, Tensor, Tensor]:
    """The effects of all neurons, their norms ``[B, M]`` and their scores ``[B, M, T]``."""
    (effects,) = lens.decompose(images)
    return effects, effects.norms(), effects.scores(texts)


@torch.no_grad()
def definition(visual: Any, images: Tensor, layer: int, neurons: Sequence[int]) -> Tensor:
    """Effects of some neurons ``[B, P, D]``, one token, head and neuron after another, of an open_clip tower.

    Class token pooled, without layer scales; means are frozen.
    """
    streams: list[Tensor] = []
    hidden: list[Tensor] = []
    blocks = visual.transformer.resblocks
    handles = [block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])) for block in blocks]
    handles.append(blocks[layer].mlp.gelu.register_forward_hook(lambda _, __, output: hidden.append(output)))
    handles.append(visual.transformer.register_forward_hook(lambda _, __, output: streams.append(output)))
    embedding = visual(images)
    for handle in handles:
        handle.remove()

    def std(norm: Any, x: Tensor) -> Tensor:
        return (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    result = []
    for neuron in neurons:
        total = torch.zeros_like(embedding)
        added = hidden[0][:, :, neuron, None] * blocks[layer].mlp.c_proj.weight[:, neuron]  # [B, N, W]
        for block, stream in zip(blocks[layer + 1 :], streams[layer + 1 :], strict=False):
            attention, width = block.attn, stream.shape[-1]
            size = width // attention.num_heads
            query, key, value = attention.in_proj_weight.chunk(3)
            bias = attention.in_proj_bias.chunk(3)
            normed, part = block.ln_1(stream), added / std(block.ln_1, stream) * block.ln_1.weight
            for head in range(attention.num_heads):
                own = slice(head * size, (head + 1) * size)
                q, k = (normed @ w[own].T + b[own] for w, b in ((query, bias[0]), (key, bias[1])))
                alpha = (q[:, :1] @ k.mT / size**0.5).softmax(-1)  # [B, 1, N]
                row = (alpha @ (part @ value[own].T))[:, 0] @ attention.out_proj.weight[:, own].T
                total += row / std(visual.ln_post, streams[-1][:, 0]) * visual.ln_post.weight @ visual.proj
        result.append(total / embedding.norm(dim=-1, keepdim=True))
    return torch.stack(result, 1)


def measure(name: str, layer: int, images: int, pairs: int, threads: int, out: Path) -> Bar:
    """Checks, times, writes the result and returns the bar."""
    torch.set_num_threads(threads)
    built = module(name)
    model = clipfast.wrap(built)
    pixels, texts = noise(built.visual, images), unit_texts(model.tower.embed_dim)
    start = time.perf_counter()
    lens = SecondOrder(model, layer)
    seconds = time.perf_counter() - start

    def verify() -> list[Check]:
        chosen = [number * lens.weights[0].neurons // CHECKED_NEURONS for number in range(CHECKED_NEURONS)]
        some = pixels[:CHECKED_IMAGES]
        effects, norms, scores = everything(lens, some, texts)
        exact = definition(deepcopy(built.visual).double(), some.double(), layer, chosen)
        return [
            Check("embedding", relative(effects.embedding, plain(built, some)), BOUND),
            Check("effects", relative(effects.vectors(chosen).double(), exact), BOUND),
            Check("norms", relative(norms[:, chosen].double(), exact.norm(dim=-1)), BOUND),
            Check("scores", relative(scores[:, chosen].double(), exact @ texts.double().T), BOUND),
        ]

    comparison = compare(
        lambda: everything(lens, pixels, texts), lambda: plain(built, pixels), verify, count=pairs, warmup=1
    )
    bar = Bar("times the plain forward's time", 1 / comparison.ratio, TIMES, at_least=False)
    weights = lens.weights[0]
    settings = {"model": name, "layer": layer, "batch": images, "texts": len(texts), "threads": threads}
    Results(QUESTION, SENTENCE, folder=out).compared(
        f"{name}, layer {layer}",
        comparison,
        a="second-order effects",
        b="plain",
        settings=settings | {"neurons": weights.neurons, "later_heads": weights.heads} | instructions(),
        bars=(bar,),
        figures={"seconds_to_prepare_the_model": seconds, "numbers_per_image": weights.neurons * weights.heads},
    )
    print(f"{name}, layer {layer}, {weights.neurons} neurons, {weights.heads} later heads, {images} images")
    print(", ".join(f"{check.name} {check.error:.1e}" for check in comparison.checks))
    return bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the result; returns 1 where the bar is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.second_order", description=SENTENCE)
    parser.add_argument("--model", default="ViT-B-16", help="class token pooled, of open_clip (ViT-B-16)")
    parser.add_argument("--layer", type=int, default=8, help="whose neurons (8)")
    parser.add_argument("--images", type=int, default=64, help="images of a batch (64)")
    parser.add_argument("--pairs", type=int, default=7, help="how often each side runs (7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (2)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    options = parser.parse_args(arguments)
    bar = measure(options.model, options.layer, options.images, options.pairs, options.threads, options.out)
    print(bar)
    return 0 if bar.met else 1


if __name__ == "__main__":
    sys.exit(main())
