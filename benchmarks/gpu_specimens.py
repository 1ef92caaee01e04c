"""Runs every specimen of :mod:`benchmarks.specimens`: ``python -m benchmarks.gpu_specimens``, for a sanitizer to watch.

A specimen is a launch of tensors without memory. Here each tensor gets memory of its shape and strides with random
values, and the kernel runs. :func:`repeat` runs it many times on the same values and counts how often a result has
other bits, as it has where programs race for memory that they share.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import specimens
from benchmarks.specimens import Specimen
from clipfast.kernels.launch import Launch


def chosen(capability: int, images: int, limit: int | None = None) -> list[Specimen]:
    """The specimens at this batch size, each once; with a limit the ones with the fewest values.

    Args:
        capability: of the GPU, 80, 90, 100.
        images: batch size in place of that of :mod:`benchmarks.specimens`.
        limit: how many, None for all.
    """
    before, specimens.IMAGES = specimens.IMAGES, images
    try:
        seen: dict[str, Specimen] = {}
        for specimen in specimens.specimens(capability):
            seen.setdefault(name(specimen), specimen)
    finally:
        specimens.IMAGES = before
    listed = list(seen.values())
    if limit is None:
        return listed
    return sorted(listed, key=lambda specimen: sum(_sizes(specimen.launch)))[:limit]


def name(specimen: Specimen) -> str:
    """What a specimen is, in one line."""
    launch = specimen.launch
    return f"{specimen.operation} {specimen.case} {launch.kernel.__name__} {launch.config}"


def _sizes(launch: Launch) -> Iterator[int]:
    return (tensor.numel() for tensor in tensors(launch).values())


def with_memory(launch: Launch, device: str, seed: int = 0) -> Launch:
    """The launch with tensors that have memory: random floats, and zeros where they are integers."""
    generator = torch.Generator(device).manual_seed(seed)

    def filled(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if not tensor.is_floating_point():
            return made.zero_()
        return made.copy_(torch.randn(tensor.shape, generator=generator, device=device).mul_(0.1))

    arguments: dict[str, Any] = dict(launch.arguments)
    for key, tensor in tensors(launch).items():
        own = arguments[key]
        arguments[key] = filled(tensor) if isinstance(own, Tensor) else replace(own, base=filled(tensor))
    return replace(launch, arguments=arguments)


def tensors(launch: Launch) -> dict[str, Tensor]:
    """The launch's tensors by name, those of descriptors included."""
    listed = ((key, getattr(value, "base", value)) for key, value in launch.arguments.items() if value is not None)
    return {key: value for key, value in listed if isinstance(value, Tensor)}


def repeat(launch: Launch, runs: int) -> tuple[int, bool]:
    """Runs a launch many times on the same values.

    Args:
        launch: with memory.
        runs: how often, after the first.

    Returns:
        How many runs had other bits than the first, and whether anything was written at all.
    """
    before = {key: tensor.clone() for key, tensor in tensors(launch).items()}
    launch.run()
    first = {key: tensor.clone() for key, tensor in tensors(launch).items()}
    written = {key: tensor for key, tensor in tensors(launch).items() if not same_bits(first[key], before[key])}
    different = torch.zeros((), dtype=torch.int64, device=next(iter(before.values())).device)
    for _ in range(runs):
        for key, tensor in written.items():
            tensor.copy_(before[key])
        launch.run()
        wrong = [_differ(tensor, first[key]) for key, tensor in written.items()]
        if wrong:
            different += torch.stack(wrong).any()
    return int(different), bool(written)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether a bit differs, bool on the device; NaN is a pattern of bits like any other."""
    bits = _BITS[a.element_size()]
    if a.dtype == torch.bool:
        return (a != b).any()
    return (a.view(bits) != b.view(bits)).any()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return not bool(_differ(a, b))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the specimens once each and prints their names; a sanitizer adds what it finds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_specimens", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cuda")
    settings = parser.parse_args(arguments)
    capability = 90
    if settings.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    listed = chosen(capability, settings.images, settings.limit)
    print(f"{len(listed)} specimens", flush=True)
    for number, specimen in enumerate(listed, 1):
        with_memory(specimen.launch, settings.device).run()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        print(f"ran {number} {name(specimen)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
