"""Whether LayerNorm could be folded into the product after it: ``python -m benchmarks.folded_norm``.

``(x − μ)/σ · γ Wᵀ + β Wᵀ + b = (x (Wγ)ᵀ − μ (Wγ 1)) / σ + (W β + b)``: the product reads the residual stream itself,
and its epilogue needs two numbers per row. The normed tokens are neither written nor read. Two questions decide:

- **Error**, against float64 in relative norm, on the streams of the bundled model and on the same with a mean added to
  every row, in units of its standard deviation. *norm, product* rounds the normed tokens; *folded* rounds ``Wγ``, and
  takes ``Wγ 1`` of the rounded weights, so that a mean drops out but for the float32 sums; *centred* takes every row's
  mean from ``Wγ`` before it is rounded and leaves ``μ`` out of the epilogue, as if the rounded rows still summed to 0.
- **Time**, by :mod:`benchmarks.roofline`: what is saved, and by how much a product with such an epilogue may be slower
  than torch's own until nothing is left of it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

import clipfast
from benchmarks.costs import Batch
from benchmarks.costs_decomposed import decomposed
from benchmarks.roofline import DEVICES, shape_of
from clipfast.forward import embed
from clipfast.forward.stream import Stream
from clipfast.kernels import ops, reference
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene
from clipfast.towers.tower import LayerNorm, Tower

LOW = torch.bfloat16
MEANS = (0, 10, 100, 1000)


def streams(tower: Tower, images: Tensor) -> Iterator[tuple[str, Tensor, LayerNorm, Tensor, Tensor]]:
    """Every product after a LayerNorm: its name, the stream in bfloat16, the norm, weight and bias in bfloat16."""
    stream = Stream(tower, embed(tower, images, "auto"), tower.blocks)
    for layer, block in enumerate(tower.blocks):
        normed, zeros = stream.norm(block.ln_1), block.in_weight.new_zeros(len(block.in_weight))
        bias = zeros if block.in_bias is None else block.in_bias
        yield f"layer {layer} QKV", stream.x.clone(), block.ln_1, block.in_weight, bias
        qkv = ops.linear(normed, block.in_weight, block.in_bias)
        out, _ = ops.attention(qkv.view(*normed.shape[:2], 3, tower.heads, tower.head_dim), None)
        stream.add_attention(layer, out.flatten(2))
        normed = stream.norm(block.ln_2)
        yield f"layer {layer} MLP in", stream.x.clone(), block.ln_2, block.mlp_in_weight, block.mlp_in_bias
        stream.add_mlp(layer, normed)


def errors(x: Tensor, norm: LayerNorm, weight: Tensor, bias: Tensor) -> tuple[float, float, float]:
    """Relative errors of *norm, product*, *folded* and *centred*, sums in float32, no rounding of the result."""
    gamma, beta = norm.weight.double(), norm.bias.double()
    exact = reference.linear(
        reference.add_layer_norm(x.double(), None, gamma, beta, norm.eps)[1], weight.double(), bias.double()
    )
    mean, std = (each.float()[..., None] for each in reference.layer_statistics(x.double(), norm.eps))
    shift = (weight.double() @ beta + bias.double()).float()
    normed = reference.add_layer_norm(x.double(), None, gamma, beta, norm.eps)[1].to(LOW)
    apart = normed.float() @ weight.float().T + bias.float()
    scaled = weight.double() * gamma
    folded = scaled.to(LOW).float()
    centred = (scaled - scaled.mean(1, keepdim=True)).to(LOW).float()
    with_mean = (x.float() @ folded.T - mean * folded.sum(1)) / std + shift
    without = (x.float() @ centred.T) / std + shift
    size = exact.norm()
    return tuple(float((have.double() - exact).norm() / size) for have in (apart, with_mean, without))  # type: ignore[return-value]


def print_errors(images: int) -> None:
    """One line per mean: the median and the largest error over all products of the bundled model."""
    model = clipfast.load("scenes", device="cpu", dtype=LOW)
    pixels = model.prepare([Image.fromarray(render(sample_scene(0, "test", index))) for index in range(images)])
    products = list(streams(model.tower, pixels))
    largest = max(float((x.float().mean(-1) / x.float().std(-1)).abs().max()) for _, x, *_ in products)
    print(f"{len(products)} products, {images} scenes; the largest |μ|/σ of a token is {largest:.2f}")
    print("| mean added, σ | norm, product: median, largest | folded | centred |\n| --- | --- | --- | --- |")
    for added in MEANS:
        found = []
        for _, x, norm, weight, bias in products:
            moved = (x.float() + added * x.float().std(-1, keepdim=True)).to(LOW)
            found.append(errors(moved, norm, weight, bias))
        columns = torch.tensor(found, dtype=torch.float64).T
        cells = " | ".join(f"{float(column.median()):.1e}, {float(column.max()):.1e}" for column in columns)
        print(f"| {added} | {cells} |")


def print_times(name: str, images: int) -> None:
    """What folding saves by the roofline, and what it may cost."""
    shape = shape_of(name)
    batch = Batch(shape, images)
    steps = decomposed(batch)
    norms = [step for step in steps if step.name in ("ln_1", "ln_2") and step.moved > 2 * batch.stream]
    statistics = batch.step("row statistics", read=batch.stream)
    print(f"{name}, batch {images}: {len(norms)} LayerNorms of all tokens become passes that read the stream alone")
    print("| device | forward, ms | saved, ms | saved, % | QKV may be slower by, % | MLP in by, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for key, device in DEVICES.items():
        total = sum(map(device.seconds, steps))
        each = device.seconds(norms[0]) - device.seconds(statistics)
        allowed = []
        for product in ("queries, keys, values", "MLP in"):
            step = next(step for step in steps if step.name == product)
            allowed.append(100 * each / device.seconds(step))
        saved = each * len(norms)
        print(
            f"| {key} | {1e3 * total:.1f} | {1e3 * saved:.2f} | {100 * saved / total:.1f} | "
            f"{allowed[0]:.1f} | {allowed[1]:.1f} |"
        )
    mlp, qkv = shape.hidden * shape.width, 3 * shape.width**2
    share = (mlp + qkv) / (2 * mlp + qkv + shape.width**2)
    print(f"The folded weights are copies of {100 * share:.0f} % of the blocks' weights.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.folded_norm", description="Errors and modelled times.")
    parser.add_argument("--images", type=int, default=32, help="scenes whose streams are measured (32)")
    parser.add_argument("--model", default="ViT-L-14", help="whose times are modelled (ViT-L-14)")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    with torch.no_grad():
        print_errors(options.images)
    print_times(options.model, options.batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
