"""``clipfast doctor``: what this installation has, why something is missing, and whether a model computes right."""

import json
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clipfast.commands import console
from clipfast.commands.doctor.options import Options
from clipfast.commands.doctor.testing import test_model
from clipfast.commands.loading import versions
from clipfast.kernels import cuda, examples, native, tuning
from clipfast.kernels.dispatch import BACKENDS, candidates
from clipfast.kernels.registration import operations
from clipfast.loading import BUNDLED

OPTIONAL = {
    "transformers": (
        "hf",
        "text encoders of open_clip models that come from Hugging Face (xlm-roberta-*, mt5-*, nllb-*)",
    ),
    "sentencepiece": ("hf", "tokenizers of T5 and mT5 text encoders"),
    "xarray": ("data", "labelled arrays of clipfast.dataset.open and Contributions.to_xarray"),
    "pandas": ("data", "tables of collections and of contributions as data frames"),
    "datasets": ("datasets", "data sets of Hugging Face as input"),
    "ray": ("ray", "clipfast collect --engine ray"),
    "tensorboard": ("tensorboard", "clipfast collect --log-to tensorboard"),
    "wandb": ("wandb", "clipfast collect --log-to wandb"),
    "jinja2": ("report", "clipfast report"),
    "scipy_openblas32": ("openblas", "faster float32 products on CPUs for which torch's library is slow"),
    "pytest_benchmark": ("dev", "make bench"),
}
"""Packages that clipfast runs without: the extra that installs each, and what it adds."""

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu() -> dict[str, Any]:
    """Name, threads and the instruction sets that matter here."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = {flag: flag in flags for flag in _FLAGS} if flags else {}
    return {"name": name, "cores": usable, "torch_threads": torch.get_num_threads(), "flags": known}


def devices() -> tuple[list[dict[str, Any]], str | None]:
    """CUDA devices, or none and why."""
    if torch.version.cuda is None and torch.version.hip is None:
        return [], "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # the driver's own words differ by what is missing
        return [], console.one_line(error)
    devices_here = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        devices_here.append({"name": properties.name, "capability": capability, "memory_gib": memory})
    return devices_here, None if devices_here else "torch finds no device"


def bundled() -> dict[str, dict[str, Any]]:
    """Of every bundled model: its folder, and whether config and weights are there."""
    models = {}
    for name, folder in BUNDLED.items():
        files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        there = "open_clip_config.json" in files and any(file.endswith((".safetensors", ".bin")) for file in files)
        models[name] = {"folder": str(folder), "present": there, "files": files}
    return models


def choices(device: str) -> dict[str, dict[str, Any]]:
    """Of every operation: which backends ``"auto"`` takes or times on a device, and why not the others."""
    chosen = {}
    for name in operations():
        able, refused = candidates(name, examples.arguments(name, device))
        able = able if device == "cuda" else able[:1]  # elsewhere the preferred one is taken untimed
        chosen[name] = {"candidates": [backend.name for backend in able], "refused": dict(refused)}
    return chosen


def timed(device: str) -> dict[str, Any]:
    """The fastest implementations that were measured on a device so far, by call."""
    path = tuning.file_for(torch.device(device))
    return {"file": str(path), "choices": dict(tuning.choices(path).items())}


def examine() -> dict[str, Any]:
    """Everything the report says, as plain data."""
    gpus, why_none = devices()
    device = "cuda" if gpus else "cpu"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "devices": gpus,
        "no_devices_because": why_none,
        "backends": {backend.name: backend.unsupported_reasons() for backend in BACKENDS},
        "native": {"library": str(native.path()), "instructions": native.isa(), "known": list(native.ISAS)},
        "cuda": {"library": str(cuda.LIBRARY), "capability": cuda.CAPABILITY / 10, "missing": cuda.load().reason},
        "operations": choices(device),
        "timed": timed(device),
        "bundled": bundled(),
        "optional": {name: find_spec(name) is not None for name in OPTIONAL},
    }


def _operations(choices_by_name: dict[str, dict[str, Any]]) -> list[str]:
    """Operations that are chosen alike as one line: "eager (triton: no GPU): attention, …"."""
    alike: dict[str, list[str]] = {}
    for name, choice in choices_by_name.items():
        chosen = " or ".join(choice["candidates"]) + (", timed" if len(choice["candidates"]) > 1 else "")
        why = "; ".join(
            f"{backend}: {', '.join(reasons)}".replace(f"has no {name}", "has none")
            for backend, reasons in choice["refused"].items()
        )
        alike.setdefault(f"{chosen} ({why})" if why else chosen, []).append(name)
    return [f"{how}: {', '.join(names)}" for how, names in alike.items()]


def run(options: Options) -> int:
    """Prints the report, or the test of a model; returns the exit code.

    Raises:
        ClipfastError: a model that cannot be loaded, or images that cannot be read.
    """
    options.check()
    if options.model is not None:
        return test_model(options, options.model)
    report = examine()
    if options.json:
        console.say(json.dumps(report, indent=2))
        return 0
    rows = [[name, version or "not installed"] for name, version in report["versions"].items()]
    processor = report["cpu"]
    flags = ", ".join(f"{flag} {'yes' if has else 'no'}" for flag, has in processor["flags"].items()) or "unknown"
    rows += [
        ["platform", report["platform"]],
        ["CPU", f"{processor['name']}, {processor['cores']} cores, torch uses {processor['torch_threads']} threads"],
        ["CPU flags", flags],
    ]
    for index, device in enumerate(report["devices"]):
        about = f"{device['name']}, capability {device['capability']}, {device['memory_gib']} GiB"
        rows.append([f"device cuda:{index}", about])
    if not report["devices"]:
        rows.append(["CUDA devices", f"none: {report['no_devices_because']}"])
    for name, refusals in report["backends"].items():
        rows.append([f"backend {name}", f"no: {'; '.join(refusals)}" if refusals else "yes"])
    if report["native"]["instructions"]:
        library = report["native"]
        known = ", ".join(library["known"])
        rows.append(["native library", f"{library['library']}, instructions {library['instructions']} of {known}"])
    if not report["cuda"]["missing"]:
        library = report["cuda"]
        rows.append(["CUDA library", f"{library['library']}, for compute capability {library['capability']}"])
    rows += [["operations", line] for line in _operations(report["operations"])]
    if report["timed"]["choices"]:
        kept = report["timed"]
        rows.append(["timed choices", f"{len(kept['choices'])} in {kept['file']} (--json lists them)"])
    for name, model in report["bundled"].items():
        state = "present" if model["present"] else "missing: reinstall clipfast, or train it (clipfast.scenes.training)"
        rows.append([f"model {name}", f"{state} ({model['folder']})"])
    for name, has in report["optional"].items():
        extra, adds = OPTIONAL[name]
        state = "installed" if has else f"not installed (pip install 'clipfast[{extra}]')"
        rows.append([f"optional {name}", f"{state}: {adds}"])
    console.table(["what", "state"], rows)
    return 0
