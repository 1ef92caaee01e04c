"""A roofline model of every tower on a device, as a table: ``python -m benchmarks.roofline``.

Nothing is measured and no weights are loaded. :mod:`benchmarks.costs` and :mod:`benchmarks.costs_decomposed` list the
kernels of a plain and a decomposed forward with FLOPs and bytes. The tests compare their FLOPs with the counts of
``torch.utils.flop_counter`` on open_clip's modules and on clipfast's forward. Kernels run one after another, and the
time of each is the larger of its FLOPs at the device's rate and its bytes at the device's bandwidth::

    time = Σ max(FLOPs / rate, bytes / bandwidth)

This is a lower bound: launches, partial waves and imperfect overlap add time. ``--efficiency 0.65`` lowers the rate of
matrix products to that of a complete network, which changes the ratios below by a few hundredths.

::

    python -m benchmarks.roofline                               # every model that can be decomposed, on an H200
    python -m benchmarks.roofline --models "ViT-[BLH]-*" --device a100 --texts 1000 --last 4
    python -m benchmarks.roofline --peak 600 --bandwidth 3 --json roofline.json
    python -m benchmarks.roofline --bars                        # ViT-L-14 on every device, with the assumptions

The columns are:

- GFLOP per image of the plain forward and of the decomposed one (heads only);
- GB per batch and images/s of the plain forward in eager torch (*eager*), of the plain forward with every elementwise
  pass except LayerNorm fused (*fused*), and of the decomposed forward;
- time of the decomposed forward for heads, with alpha, and with alpha and text maps, relative to those two and to the
  plain forward with the kernels of the decomposed one (*same*); below 1 the decomposition is faster;
- the fraction of the plain FLOPs saved by computing the last block for the class token alone;
- attention scores computed per head and image in tiles over all tokens, and in tiles over the patches alone, which
  shows the cost of the class token at 2^k + 1 tokens;
- the largest tensor of the definition written out, ``[N, N, H, W]`` in float32, per image and layer.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import open_clip
from open_clip.model import CLIPVisionCfg

from benchmarks.costs import (
    FLOAT32,
    Batch,
    Shape,
    Step,
    Steps,
    moved,
    padded_scores,
    plain_eager,
    plain_fused,
    products,
)
from benchmarks.costs_decomposed import Options, decomposed, plain_same_kernels, saved_by_last_block
from clipfast.towers import openclip_models

FORMAT = "clipfast.roofline/1"
BYTES = {"bfloat16": 2, "float16": 2, "float32": FLOAT32}


@dataclass(frozen=True)
class Device:
    """Rates of a device, in FLOP/s and bytes/s.

    Attributes:
        name: name of the device.
        matrix: rate of matrix products in bfloat16 or float16.
        bandwidth: memory bandwidth.
        float32: rate of float32 matrix products, without tf32.
        origin: source of the figures.
        efficiency: fraction of ``matrix`` and ``float32`` that products reach.
        attention: fraction of ``matrix`` that attention reaches, which also computes exponentials.
    """

    name: str
    matrix: float
    bandwidth: float
    float32: float
    origin: str
    efficiency: float = 1.0
    attention: float = 0.4

    def seconds(self, step: Step) -> float:
        """Modelled time of one kernel."""
        rates = {
            "matrix": self.matrix * self.efficiency,
            "float32": self.float32 * self.efficiency,
            "attention": self.matrix * self.attention,
        }
        return max(step.executed / rates[step.unit], step.moved / self.bandwidth)


REACHED = "about what large products and copies reach"
"""Of the data sheet of an SXM module, four fifths of the dense rate and nine tenths of the bandwidth."""
DEVICES = {
    "h200": Device("H200", 790e12, 4.3e12, 67e12, REACHED),
    "h100": Device("H100", 790e12, 3.0e12, 67e12, REACHED),
    "b200": Device("B200", 1800e12, 7.2e12, 75e12, REACHED),
    "a100": Device("A100", 312e12, 2.0e12, 19.5e12, "rates of the data sheet"),
}

ASSUMPTIONS = (
    "Kernels run one after another; each takes the longer of its FLOPs and its bytes. Launches are free (CUDA graphs).",
    "H100 and H200 (SXM): 80 % of 989 TFLOP/s dense bfloat16, 90 % of 3.35 and 4.8 TB/s. B200: 80 % of 2,250 TFLOP/s, "
    "90 % of 8 TB/s. Nothing here was measured on a GPU.",
    "Attention, plain and decomposed, reaches 40 % of the rate of products, padding included, in tiles of 128 x 64.",
    "A kernel reads each input once and writes each result once; what it reads again comes from the caches for free. "
    "Weights are read once per batch.",
    "eager: open_clip's forward, one kernel per operation. fused: the same with every elementwise pass except "
    "LayerNorm in a product, patches, class token and position included: no compiler is known to do all of it.",
    "decomposed: the kernels of benchmarks.costs_decomposed, heads and attention of all layers kept. The class "
    "token's row takes no bytes of its own: it goes with the first tile of queries, or its keys and values come from "
    "the cache.",
)
"""What the modelled figures rest on."""

BARS = {("h100", "plain_eager"): 1.34, ("h200", "plain_eager"): 1.28} | {
    (device, "plain_fused"): 1.10 for device in ("h100", "h200")
}
"""(device, plain forward) -> how many times the decomposed one's speed a ViT-L-14 should have at batch 256."""
BARRED = "ViT-L-14"


# -------------------------------------------------------------------------------------------------------------- models


def shape_of(name: str) -> Shape:
    """The shape of a named open_clip model's ``VisionTransformer``, from its config."""
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**openclip_models.vision_config(name))
    (height, width), (high, wide) = _pair(vision.image_size), _pair(vision.patch_size)
    return Shape(
        grid=(height // high, width // wide),
        patch=(high, wide),
        layers=vision.layers,
        width=vision.width,
        heads=vision.width // vision.head_width,
        hidden=int(vision.width * vision.mlp_ratio),
        embed_dim=config["embed_dim"],
        quick_gelu=config.get("quick_gelu", False),
        pooling="mean" if vision.pool_type == "avg" else "cls",
        ln_pre=not vision.no_ln_pre,
        layer_scale=vision.ls_init_value is not None,
        norm_after_pool=vision.final_ln_after_pool,
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def is_modelled(name: str) -> bool:
    """Whether a model has a plain vision transformer of open_clip's own: none of timm, no ResNet, no attention pool."""
    vision = openclip_models.vision_config(name)
    own = vision.get("timm_model_name") is None and isinstance(vision.get("layers", 12), int)
    return own and not vision.get("attentional_pool", False)


def supported(pattern: str = "*") -> dict[Shape, list[str]]:
    """Names of the open_clip models that match the pattern, can be decomposed and are modelled, by shape."""
    names = [name for name in openclip_models.names() if fnmatchcase(name, pattern)]
    shapes: dict[Shape, list[str]] = {}
    for name in sorted(names, key=lambda name: (not name.startswith("ViT"), len(name), name)):  # plainest first
        if is_modelled(name) and not openclip_models.supports(name):
            shapes.setdefault(shape_of(name), []).append(name)
    return shapes


# --------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Cost:
    """One forward of a whole batch: FLOPs of matrix products, bytes, modelled seconds."""

    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The modelled forwards of one shape.

    Attributes:
        names: names of the models with that shape.
        shape: the tower.
        images: images per batch.
        costs: cost of ``plain_eager``, ``plain_fused``, ``plain_same_kernels``, ``heads``, ``alpha``, ``maps`` (with
            alpha) and ``tokens`` (with alpha; every token through every head).
        saved_by_last_block: fraction of the plain FLOPs.
        scores_flash: attention scores computed per head and image in tiles over all tokens.
        scores_split: the same in tiles over the patches alone.
        naive_bytes: size of ``[N, N, H, W]`` in float32, which the definition written out forms per image and layer.
    """

    names: tuple[str, ...]
    shape: Shape
    images: int
    costs: dict[str, Cost]
    saved_by_last_block: float
    scores_flash: int
    scores_split: int
    naive_bytes: int

    def gflop(self, forward: str) -> float:
        """GFLOP per image."""
        return self.costs[forward].flops / self.images / 1e9

    def images_per_second(self, forward: str) -> float:
        """Modelled throughput."""
        return self.images / self.costs[forward].seconds

    def against(self, forward: str, plain: str) -> float:
        """Time of a forward relative to a plain one; below 1 it is faster."""
        return self.costs[forward].seconds / self.costs[plain].seconds


def forwards(batch: Batch, texts: int, last: int | None = None) -> dict[str, Steps]:
    """The steps of every modelled forward, by name."""
    return {
        "plain_eager": plain_eager(batch),
        "plain_fused": plain_fused(batch),
        "plain_same_kernels": plain_same_kernels(batch),
        "heads": decomposed(batch, Options(last=last)),
        "alpha": decomposed(batch, Options(alpha=True, last=last)),
        "maps": decomposed(batch, Options(alpha=True, texts=texts, last=last)),
        "tokens": decomposed(batch, Options(alpha=True, tokens=True, last=last)),
    }


def cost(steps: Steps, device: Device) -> Cost:
    """The cost of a forward on a device."""
    return Cost(products(steps), moved(steps), sum(map(device.seconds, steps)))


def estimate(
    batch: Batch, device: Device, *, texts: int = 100, last: int | None = None, names: Sequence[str] = ()
) -> Estimate:
    """Models every forward of a batch on a device.

    Args:
        batch: images of one shape.
        device: the device.
        texts: number of text maps.
        last: keep this many layers, from the end; None keeps all.
        names: models of the shape.
    """
    shape = batch.shape
    costs = {name: cost(steps, device) for name, steps in forwards(batch, texts, last).items()}
    return Estimate(
        names=tuple(names),
        shape=shape,
        images=batch.images,
        costs=costs,
        saved_by_last_block=saved_by_last_block(batch) / costs["plain_eager"].flops,
        scores_flash=padded_scores(shape.tokens, shape.tokens, batch.tile),
        scores_split=padded_scores(shape.patches, shape.patches, batch.tile),
        naive_bytes=FLOAT32 * shape.tokens**2 * shape.heads * shape.width,
    )


# -------------------------------------------------------------------------------------------------------------- output

HEADER = (
    "model",
    "tokens",
    "GFLOP/image: plain, decomposed",
    "GB/batch: eager, fused, decomposed",
    "images/s: eager, fused, decomposed",
    "time ÷ eager: heads, +alpha, +maps",
    "time ÷ fused: heads, +alpha, +maps",
    "time ÷ same: heads, +alpha, +maps",
    "last block saves",
    "scores: flash ÷ split",
    "naive, per image and layer",
)
TOTALS = ("plain_eager", "plain_fused", "heads")
PLAIN = ("plain_eager", "plain_fused", "plain_same_kernels")
EXTRAS = ("heads", "alpha", "maps")


def row(model: Estimate) -> list[str]:
    """One shape as cells under :data:`HEADER`."""
    alike = f" and {len(model.names) - 1} alike" if len(model.names) > 1 else ""
    return [
        f"{model.names[0]}{alike}" if model.names else "",
        f"{model.shape.tokens}",
        ", ".join(_figures(model.gflop(kind)) for kind in ("plain_eager", "heads")),
        ", ".join(_figures(model.costs[kind].bytes / 1e9) for kind in TOTALS),
        ", ".join(_figures(model.images_per_second(kind)) for kind in TOTALS),
        *(", ".join(f"{model.against(kind, plain):.3f}" for kind in EXTRAS) for plain in PLAIN),
        f"{model.saved_by_last_block:.1%}",
        f"{model.scores_flash} ÷ {model.scores_split} = {model.scores_flash / model.scores_split:.2f}",
        f"{_figures(model.naive_bytes / 1e9)} GB",
    ]


def _figures(number: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{number:.3g}" if number < 100 else f"{float(f'{number:.3g}'):.0f}"


def sentence(device: Device, settings: argparse.Namespace) -> str:
    """The device and settings of the table."""
    last = "last layer" if settings.last == 1 else f"last {settings.last} layers"
    kept = "all layers kept" if settings.last is None else f"the {last} kept"
    return (
        f"**Modelled, not measured**: {device.name} at {device.matrix * device.efficiency / 1e12:.4g} TFLOP/s"
        f" ({device.attention:.0%} of {device.matrix / 1e12:.4g} in attention) and {device.bandwidth / 1e12:.3g} TB/s,"
        f" {device.origin}; batch {settings.batch}, {settings.dtype}, {settings.texts} texts, {kept}."
    )


def markdown(estimates: Sequence[Estimate], heading: str) -> str:
    """A table with one row per shape."""
    cells = (HEADER, ["---"] * len(HEADER), *map(row, estimates))
    return "\n".join([heading, "", *(f"| {' | '.join(line)} |" for line in cells)])


def document(estimates: Sequence[Estimate], device: Device, settings: argparse.Namespace) -> dict[str, Any]:
    """All estimates as JSON, in FLOPs, bytes and seconds per batch."""
    recorded = {key: getattr(settings, key) for key in ("models", "batch", "texts", "last", "dtype")}
    return {
        "format": FORMAT,
        "modelled": True,
        "measured": False,
        "device": asdict(device),
        "settings": recorded,
        "models": [asdict(model) for model in estimates],
    }


def bars(model: str = BARRED, images: int = 256) -> str:
    """Modelled speed of a decomposed forward over plain ones on every device, with bars and assumptions."""
    batch = Batch(shape_of(model), images, BYTES["bfloat16"])
    lines = [
        f"**Modelled, not measured**: time of a plain forward / time of the decomposed one with attention, {model}, "
        f"batch {images}, bfloat16.",
        "",
        "| device | against eager | bar | against fused | bar |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, device in DEVICES.items():
        modelled, cells = estimate(batch, device), [device.name]
        for plain in ("plain_eager", "plain_fused"):
            faster, least = 1 / modelled.against("alpha", plain), BARS.get((name, plain))
            cells.append(f"{faster:.3f}")
            cells.append("" if least is None else f"{least:.2f} {'met' if faster >= least else 'missed'}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Assumptions:", "", *(f"- {assumption}" for assumption in ASSUMPTIONS)])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage."""
        self.exit(2, f"roofline: {message}\n")


def _number(convert: Callable[[str], float], least: float, most: float = 1e9) -> Callable[[str], Any]:
    """An argument type that rejects what is not a number or out of bounds."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := convert(text)) <= most:
                return value
        kind = "a whole number" if convert is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {least:g} to {most:g}")

    return parse


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = _Parser(prog="python -m benchmarks.roofline", description="Modelled speed of every model on a device.")
    rate = _number(float, 1e-6)
    fraction = _number(float, 1e-6, 1)
    command.add_argument("--models", metavar="GLOB", default="*", help="open_clip names, e.g. 'ViT-L-*' (all)")
    command.add_argument("--batch", metavar="N", type=_number(int, 1), default=256, help="images (256)")
    command.add_argument("--texts", metavar="N", type=_number(int, 1), default=100, help="text maps (100)")
    command.add_argument("--last", metavar="N", type=_number(int, 1), help="layers to keep, from the end (all)")
    command.add_argument("--dtype", choices=BYTES, default="bfloat16", help="dtype of the model (bfloat16)")
    command.add_argument("--device", choices=DEVICES, default="h200", help="device (h200)")
    command.add_argument("--peak", metavar="TFLOPS", type=rate, help="rate of matrix products instead of the device's")
    command.add_argument("--bandwidth", metavar="TB/S", type=rate, help="bandwidth instead of the device's")
    command.add_argument("--efficiency", metavar="F", type=fraction, default=1.0, help="fraction of the peak (1)")
    command.add_argument("--attention-efficiency", metavar="F", type=fraction, help="the fraction for attention (0.4)")
    command.add_argument("--bars", action="store_true", help=f"{BARRED} on every device, with the assumptions, alone")
    command.add_argument("--json", metavar="FILE", type=Path, help="also write all figures to this file")
    return command


def chosen_device(settings: argparse.Namespace) -> Device:
    """The chosen device, with the figures that options override."""
    device = replace(DEVICES[settings.device], efficiency=settings.efficiency)
    if settings.dtype == "float32":
        device = replace(device, matrix=device.float32)
    if settings.peak is not None or settings.bandwidth is not None:
        device = replace(device, origin="rates as given")
    if settings.peak is not None:
        device = replace(device, matrix=settings.peak * 1e12)
    if settings.bandwidth is not None:
        device = replace(device, bandwidth=settings.bandwidth * 1e12)
    if settings.attention_efficiency is not None:
        device = replace(device, attention=settings.attention_efficiency)
    return device


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    command = parser()
    settings = command.parse_args(arguments)
    if settings.bars:
        print(bars())
        return
    device = chosen_device(settings)
    shapes = supported(settings.models)
    if not shapes:
        command.error(f"no model that can be decomposed matches {settings.models!r}: see `clipfast models`")
    estimates = [
        estimate(
            Batch(shape, settings.batch, BYTES[settings.dtype]),
            device,
            texts=settings.texts,
            last=settings.last,
            names=names,
        )
        for shape, names in shapes.items()
    ]
    estimates.sort(key=lambda model: model.costs["plain_eager"].flops)
    if settings.json is not None:
        text = json.dumps(document(estimates, device, settings), indent=2, allow_nan=False)
        try:
            settings.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            command.error(f"cannot write {settings.json}: {error.strerror}")
    print(markdown(estimates, sentence(device, settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
