"""What clipfast computes on the CPU for fixed inputs: compared with what version 0.1.0 computed, to the bit.

``python tests/saved/results.py`` writes the arrays beside it. They were written once, by the commit named in them, and
are written again only where a change of results is meant and said.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from builders import directions, named_tower, pixels, vision_tower  # noqa: E402

import clipfast  # noqa: E402
from clipfast.analyses.ablation import ablate  # noqa: E402
from clipfast.analyses.relevance import METHODS  # noqa: E402
from clipfast.analyses.retrieval import Index  # noqa: E402
from clipfast.analyses.segmentation import heat  # noqa: E402
from clipfast.kernels import examples, native, ops  # noqa: E402

TOWERS = {
    "gelu": {},
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer_scale": {"ls_init_value": 0.5},
    "no_ln_pre": {"no_ln_pre": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OPERATIONS = (
    "attention",
    "query_row",
    "query_row_from_tokens",
    "text_maps",
    "text_maps_from_tokens",
    "layered_text_maps",
    "head_maps",
    "token_contributions",
    "layer_statistics",
    "moments",
    "span",
    "linear",
    "linear_activation",
    "add_layer_norm",
)
LARGEST = 3000
"""Entries of an array that is kept whole; of larger ones the digest is kept."""


def of_contributions(made: "clipfast.Contributions", layer: int = -1) -> Iterator[tuple[str, Tensor]]:
    """Every number of one decomposition, by name."""
    for name in ("embedding", "norm", "mean", "std", "codes", "rest", "attention", "class_codes"):
        yield name, getattr(made, name)
    yield "start_and_mlps", torch.cat([made.start[:, None], made.mlps], 1)
    yield "heads", made.heads()
    yield "head", made.head(layer, 1)
    yield "tokens", made.tokens(layer)
    yield "class_token", made.class_token()
    yield "total", made.total()


def of_towers() -> Iterator[tuple[str, Tensor]]:
    """Small random towers of every kind, in every precision."""
    for kind, changes in TOWERS.items():
        for dtype_name, dtype in DTYPES.items():
            visual = vision_tower(seed=3, dtype=dtype, **changes)
            model = clipfast.wrap(visual)
            images = pixels(visual, 3, dtype=dtype)
            texts = directions(4, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            for centring in ("uniform", "termwise"):
                made = model.decompose(
                    images, texts=texts, attention=True, tokens=True, class_token=True, centring=centring
                )
                prefix = f"tower/{kind}/{dtype_name}/{centring}"
                for name, tensor in of_contributions(made):
                    yield f"{prefix}/{name}", tensor
                yield f"{prefix}/maps", made.maps
                yield f"{prefix}/later_maps", made.text_maps(texts, [(0, 1), (2, 0)])
                late = model.decompose(images, texts=texts, maps="summed", layers=[-1])
                yield f"{prefix}/late_maps", late.maps
                yield f"{prefix}/late_rest", late.rest
                yield f"{prefix}/per_head", model.decompose(images, texts=texts, maps="per_head").maps


def of_bundled_model() -> Iterator[tuple[str, Tensor]]:
    """The bundled model, and what the analyses make of its contributions."""
    model = clipfast.load("scenes", device="cpu")
    texts = model.encode_text([f"a picture of a {shape}" for shape in ("star", "circle", "heart", "ring", "square")])
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(24, 3, *model.tower.image_size, generator=generator)
    yield "scenes/text_features", texts
    moments, parts = clipfast.Moments(model), []
    for at in range(0, 24, 8):
        made = model.decompose(
            images[at : at + 8], texts=texts, maps="summed", attention=True, tokens=True, class_token=True
        )
        moments.update(made)
        parts.append(made)
    made = parts[0]
    for name, tensor in of_contributions(made):
        yield f"scenes/{name}", tensor
    yield "scenes/maps", made.maps
    yield "scenes/heat", heat(made.patch_maps(), 0, model.tower.image_size)
    for name, tensor in moments._sums.items():
        yield f"scenes/moments/{name}", tensor
    for (layer, head), span in moments.textspan(texts, 4, [(4, 0), (5, 3)]).items():
        yield f"scenes/textspan/{layer}.{head}/picks", torch.as_tensor(span.picks)
        yield f"scenes/textspan/{layer}.{head}/explained", torch.as_tensor(span.explained)
    yield "scenes/ablated", ablate(made, "mlps, L0-L2, L5.H2", moments)
    for name, method in METHODS.items():
        yield f"scenes/relevance/{name}", method(model.tower, images[:2], texts[0])
    index = Index([(5, 0), (4, 2)])
    index.add(made)
    yield "scenes/retrieval", torch.as_tensor(index.nearest([0, 1], count=3).scores)


def of_large_tower() -> Iterator[tuple[str, Tensor]]:
    """Two blocks as wide as ViT-B-32's, whose products take the ways of real sizes, with one and two threads."""
    for dtype_name in ("float32", "bfloat16"):
        visual = named_tower("ViT-B-32", seed=4, dtype=DTYPES[dtype_name], layers=3)
        model, images = clipfast.wrap(visual), pixels(visual, 2, dtype=DTYPES[dtype_name])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = model.decompose(images, texts=directions(16, 512), maps="summed", attention=True)
            for name in ("embedding", "codes", "attention", "maps", "rest"):
                yield f"large/{dtype_name}/{threads}/{name}", getattr(made, name)
            both = torch.cat([made.start[:, None], made.mlps], 1)
            yield f"large/{dtype_name}/{threads}/start_and_mlps", both
    torch.set_num_threads(1)


def of_operations() -> Iterator[tuple[str, Tensor]]:
    """Every operation on its example arguments, by every backend of the CPU and every instruction set of this CPU."""
    settings = [("eager", "")]
    if not native.unsupported_reasons():
        best = native.isa()
        settings += [("native", isa) for isa in native.ISAS[: native.ISAS.index(best) + 1]]
    for backend, isa in settings:
        if isa:
            native.limit(isa)
        for name in OPERATIONS:
            for dtype_name, dtype in DTYPES.items():
                if dtype == torch.float64 and backend == "native":
                    continue
                given = examples.arguments(name, "cpu", dtype)
                with torch.no_grad():
                    out = getattr(ops, name)(*given, backend=backend)
                changed = [each for each in given if isinstance(each, Tensor)] if out is None else []
                results = [out] if isinstance(out, Tensor) else [*(out or ()), *changed]
                if name == "add_layer_norm":
                    results.append(given[0])  # the stream itself
                for number, tensor in enumerate(results):
                    yield f"operation/{backend}{isa and f'-{isa}'}/{name}/{dtype_name}/{number}", tensor
    if len(settings) > 1:
        native.limit(best)


def all_results() -> dict[str, Tensor]:
    """Everything, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: tensor.detach().clone()
            for part in (of_towers, of_large_tower, of_bundled_model, of_operations)
            for name, tensor in part()
        }
    finally:
        torch.set_num_threads(threads)


def digest(tensor: Tensor) -> str:
    """Of its bits, shape and dtype."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + raw).hexdigest()[:20]


def machine() -> dict[str, str]:
    """What results depend on beside the source: bits are compared where all of it is the same."""
    said = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        said[name.strip()] = value.strip()
    return {
        "vendor": said.get("vendor_id", ""),
        "family": said.get("cpu family", ""),
        "model": said.get("model", ""),
        "isa": native.isa(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def save() -> None:
    """Writes the arrays and digests of this checkout."""
    import subprocess

    made = all_results()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    small = {
        name: each
        for name, each in made.items()
        if each.numel() <= LARGEST and not name.startswith(("operation", "large"))
    }
    small = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in small.items()}
    np.savez_compressed(HERE / "arrays.npz", **{name: each.numpy() for name, each in small.items()})
    written = {"commit": commit, "machine": machine(), "digests": {name: digest(each) for name, each in made.items()}}
    (HERE / "digests.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save()
