"""The forward benchmarks of :mod:`benchmarks.gpu`: decomposed against plain, eager and compiled."""

import copy
import math
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn

import clipfast
from benchmarks.costs import Batch, products
from benchmarks.costs_decomposed import decomposed
from benchmarks.gpu_bench import LOW, Bench
from benchmarks.roofline import shape_of
from clipfast.bench.inputs import randomize, unit, unit_texts
from clipfast.bench.measuring import Bar, Call, Check, Comparison, seconds


def _model(bench: Bench, name: str) -> nn.Module:
    torch.manual_seed(0)
    precision = "pure_bf16"
    built = open_clip.create_model(name, pretrained=None, load_weights=False, precision=precision, device=bench.device)
    randomize(cast(nn.Module, built.visual))
    return cast(nn.Module, built.eval())


def _checked(model: clipfast.Model, images: Tensor, embedding: Tensor, texts: Tensor) -> list[Check]:
    """Checks two images against the plain forward, against float64, and the sum of all terms."""
    contributions = model.decompose(images[:2], attention=True, texts=texts, maps="summed")
    double = clipfast.wrap(_double(model.module), backend="eager")
    expected = double.decompose(images[:2].double(), attention=True, texts=texts.double(), maps="summed")
    plain = unit(embedding[:2].float())
    difference = (unit(contributions.embedding.float()) - plain).abs().max()
    return [
        Check("embedding against the plain forward's", float(difference), LOW),
        Check("max_error()", contributions.max_error(), LOW),
        Check("heads against float64", float((contributions.heads() - expected.heads()).abs().max()), LOW),
        Check("attention against float64", float((contributions.attention - expected.attention).abs().max()), 5 * LOW),
        Check("maps against float64", float((contributions.maps - expected.maps).abs().max()), LOW),
    ]


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(cast(Any, module).visual).double()


def _peak(device: str, call: Call) -> float:
    if device != "cuda":
        return float("nan")
    seconds(call)
    torch.cuda.reset_peak_memory_stats()
    seconds(call)
    return torch.cuda.max_memory_allocated() / 1e6


def matmul_rate(bench: Bench) -> float:
    """FLOP/s of a large square matrix product, from its median time."""
    side = bench.sizes.matmul
    a, b = bench.draw(side, side), bench.draw(side, side, seed=1)
    times = sorted(seconds(bench.repeated(lambda: a @ b)) for _ in range(bench.sizes.pairs + 2))
    rate = 2 * side**3 * bench.sizes.repeats / times[len(times) // 2]
    bench.say(f"matmul {side}³: {rate / 1e12:.0f} TFLOP/s")
    return rate


def forward(bench: Bench) -> None:
    """Decomposed against plain, eager and compiled; cost of maps; share of the matmul rate; peak memory."""
    rate = matmul_rate(bench)
    for name, promised in bench.sizes.models:
        module = _model(bench, name)
        model = clipfast.wrap(module)
        images = bench.draw(bench.sizes.batch, 3, *model.tower.image_size)
        texts = unit_texts(model.tower.embed_dim, bench.device, bench.sizes.texts)
        _forward(bench, name, model, images, texts, promised, rate)
        factor = dict(bench.sizes.compiled).get(name)
        if factor is not None:
            _against_compiled(bench, name, model, images, texts, factor)
        del module, model
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _plain(module: nn.Module, images: Tensor) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, cast(Any, module).encode_image(images))

    return call


def _forward(
    bench: Bench,
    name: str,
    model: clipfast.Model,
    images: Tensor,
    texts: Tensor,
    promised: float | None,
    rate: float,
) -> None:
    batch = len(images)
    plain = _plain(model.module, images)

    def heads() -> object:
        contributions = model.decompose(images, attention=True)
        return contributions, contributions.heads()

    def bare() -> object:
        return model.decompose(images)

    def maps() -> object:
        contributions = model.decompose(images, attention=True, texts=texts, maps="summed")
        return contributions, contributions.heads()

    def verify() -> list[Check]:
        return _checked(model, images, cast(Tensor, plain()), texts)

    settings = {"model": name, "batch": batch}
    memory = _peak(bench.device, heads), _peak(bench.device, plain)
    flops = products(decomposed(Batch(shape_of(name), batch)))

    def bars(comparison: Comparison) -> tuple[Bar, ...]:
        promises: list[Bar] = []
        if promised is not None:
            promises.append(Bar("decomposed over open_clip eager", comparison.ratio, promised, True))
        if not math.isnan(memory[0]):
            promises.append(Bar("peak memory over plain", memory[0] / memory[1], 1.1, False))
        return tuple(promises)

    bench.compared(
        f"{name} heads + attention / eager",
        ("decomposed", heads),
        ("open_clip pure_bf16", plain),
        verify,
        settings=settings | {"peak_mb": None if math.isnan(memory[0]) else list(memory)},
        bars=bars,
        single=False,
    )

    def share(comparison: Comparison) -> tuple[Bar, ...]:
        median = sorted(comparison.seconds_a)[len(comparison.seconds_a) // 2]
        reached = flops / median / rate
        return (Bar("share of the matmul rate", reached, 0.68, True),) if name == "ViT-L-14" else ()

    bench.compared(
        f"{name} heads / eager",
        ("decomposed, heads alone", bare),
        ("open_clip pure_bf16", plain),
        verify,
        settings=settings | {"flops": flops, "matmul_flops_per_second": rate},
        bars=share,
        single=False,
    )
    bench.compared(
        f"{name} with {len(texts)} maps / without",
        ("with maps", maps),
        ("without", heads),
        verify,
        settings=settings | {"texts": len(texts)},
        bars=lambda c: (Bar("maps slow it down by", 1 / c.ratio, 1.02, False),) if promised is not None else (),
        single=False,
    )


def _against_compiled(
    bench: Bench, name: str, model: clipfast.Model, images: Tensor, texts: Tensor, factor: float
) -> None:
    compiled = torch.compile(cast(Any, model.module).visual)

    def plain() -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, compiled(images))

    def heads() -> object:
        contributions = model.decompose(images, attention=True)
        return contributions, contributions.heads()

    bench.compared(
        f"{name} heads + attention / compiled",
        ("decomposed", heads),
        ("open_clip pure_bf16, torch.compile", plain),
        lambda: _checked(model, images, plain(), texts),
        settings={"model": name, "batch": len(images)},
        bars=lambda c: (Bar("decomposed over torch.compile", c.ratio, factor, True),),
        single=False,
    )
