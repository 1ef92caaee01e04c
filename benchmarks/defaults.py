"""Writes the orders of variants that ship with the package, ``clipfast/kernels/defaults/sm_*.json``.

``python -m benchmarks.defaults`` writes what the kernels prefer by their models, for every kind of call of common
models; no file with measured orders is touched. ``python -m benchmarks.defaults --measured FILE --capability 90
--device NAME`` writes the orders by time from a file of the tuner (in ``~/.cache/clipfast``, ``clipfast doctor`` names
it).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.launchless import triton_everywhere
from clipfast.basis import fold
from clipfast.forward import Request, decompose
from clipfast.kernels import dispatch, measuring, tuning
from clipfast.towers import openclip

CAPABILITIES = (80, 90, 100)
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
BATCHES = (1, 8, 64, 256)


def modelled(capability: int) -> dict[str, list[str]]:
    """The order of every kind of call of :data:`MODELS` in bfloat16, the preferred variants first.

    Args:
        capability: of a GPU, 80, 90 or 100.
    """
    orders: dict[str, list[str]] = {}
    choose = dispatch.choose

    def noted(operation: str, arguments: Sequence[Any], name: str = dispatch.AUTO) -> dispatch.Choice:
        usable, _ = dispatch.candidates(operation, arguments)
        ways = dispatch.variants(operation, arguments, usable)
        if len(ways) > 1:
            orders[tuning.key(operation, arguments)] = [measuring.label(way) for way in ways]
        return choose(operation, arguments, name)

    dispatch.choose = noted
    try:
        with triton_everywhere(capability):
            for model in MODELS:
                _decompose(model)
    finally:
        dispatch.choose = choose
    return orders


def _decompose(model: str) -> None:
    """Every kind of forward of a model, on tensors without memory."""
    config = open_clip.get_model_config(model)
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
    tower = openclip.read(visual.to(torch.bfloat16).eval())
    basis = fold(tower, "uniform")
    for batch in BATCHES:
        images = torch.empty(batch, 3, *tower.image_size, dtype=torch.bfloat16, device="meta")
        for attention in (False, True):
            decompose(tower, images, Request(layers=tuple(range(tower.layers)), attention=attention), basis)


def _write(document: dict[str, Any]) -> Path:
    file = tuning.DEFAULTS / f"sm_{document['capability']}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, metavar="FILE", help="choices that the tuner has timed on a GPU")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="of that GPU")
    parser.add_argument("--device", help="name of that GPU")
    settings = parser.parse_args(arguments)
    if settings.measured is not None:
        if settings.capability is None or settings.device is None:
            parser.error("--measured needs --capability and --device")
        timed = tuning.orders(tuning.Choices(settings.measured).items())
        document = tuning.defaults_document(settings.capability, timed, source="measured", device=settings.device)
        print(f"{_write(document)}: {len(timed)} measured orders")
        return 0
    for capability in CAPABILITIES:
        file = tuning.DEFAULTS / f"sm_{capability}.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["source"] == "measured":
            print(f"{file}: measured, left as it is")
            continue
        found = modelled(capability)
        print(
            f"{_write({'capability': capability, 'source': 'modelled', 'device': None, 'orders': found})}: {len(found)}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
