"""The forward benchmarks of :mod:`benchmarks.gpu_suite`: decomposed against plain, each in every mode.

One unit is a model, a batch and a mode. Both sides run in that mode, beside the two that users have without asking:
``model.decompose`` as it is, and open_clip's eager forward. All of them take turns in every round.
"""

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import clipfast
from benchmarks.costs import Batch, products
from benchmarks.costs_decomposed import decomposed
from benchmarks.gpu_bench import Bench, Mode, ratio
from benchmarks.gpu_checks import Witness, check_decomposed, check_plain
from benchmarks.gpu_inputs import draw_images, random_model
from benchmarks.roofline import shape_of
from clipfast.bench.inputs import unit_texts
from clipfast.bench.measuring import Bar, Call, Check, WrongResult, require, seconds
from clipfast.contributions import Contributions

DEFAULT, EAGER = "decomposed", "plain eager"
"""The two sides of every unit: what a user of each package has without asking for more."""


def units(bench: Bench) -> list[tuple[str, Callable[[Bench], None]]]:
    """Every unit by name: first those with a bar, then the others, those that are compiled for minutes last."""
    sizes = [(name, batch) for batch in bench.sizes.batches for name in bench.sizes.models]
    barred = [(size, mode) for size in sizes if promised(*size) for mode in bench.sizes.modes]
    quick = [(size, mode) for size in sizes for mode in bench.sizes.modes if mode in ("eager", "graph")]
    every = [(size, mode) for size in sizes for mode in bench.sizes.modes]
    return [
        (f"{name} batch {batch} {mode}", partial(compare, name=name, batch=batch, mode=mode))
        for (name, batch), mode in dict.fromkeys([*barred, *quick, *every])
    ]


def promised(name: str, batch: int) -> bool:
    """Whether a size has a bar."""
    return (name, batch) == ("ViT-L-14", 256) or (name == "ViT-B-32" and batch in (1, 8))


@dataclass(frozen=True)
class Inputs:
    """A model with a batch and what its results are checked against."""

    module: nn.Module
    images: Tensor
    texts: Tensor
    witness: Witness

    @classmethod
    def of(cls, bench: Bench, name: str, batch: int) -> "Inputs":
        """Draws them; those of the last size are kept, for its next mode."""
        return _drawn(name, batch, bench.device, bench.sizes.texts)


@lru_cache(maxsize=1)
def _drawn(name: str, batch: int, device: str, texts: int) -> Inputs:
    module = random_model(name, device)
    visual = cast(Any, module).visual
    images = draw_images(visual.image_size, batch, device)
    features = unit_texts(visual.output_dim, device, texts)
    return Inputs(module, images, features, Witness.of(module, images, features))


@contextmanager
def _attention(backend: SDPBackend | None, fast_path: bool) -> Iterator[None]:
    """Attention of torch by one backend, with or without the fused encoder layer that leaves it no choice."""
    mha = cast(Any, torch.backends.mha)
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(fast_path)
    try:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            yield
    finally:
        mha.set_fastpath_enabled(before)


ATTENTIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as it is": partial(_attention, None, True),
    "default SDPA": partial(_attention, None, False),
    "flash": partial(_attention, SDPBackend.FLASH_ATTENTION, False),
    "cuDNN": partial(_attention, SDPBackend.CUDNN_ATTENTION, False),
    "efficient": partial(_attention, SDPBackend.EFFICIENT_ATTENTION, False),
}
"""How open_clip's attention can be computed, by name."""


def plain_eager(inputs: Inputs, attention: str = "as it is") -> Call:
    """open_clip's own forward."""

    def call() -> Tensor:
        with torch.inference_mode(), ATTENTIONS[attention]():
            return cast(Tensor, cast(Any, inputs.module).encode_image(inputs.images))

    return call


def best_attention(bench: Bench, inputs: Inputs) -> str:
    """The fastest attention that open_clip's eager forward has on this device."""
    times = {}
    for name in ATTENTIONS:
        call = plain_eager(inputs, name)
        try:
            seconds(call)
            times[name] = min(seconds(call) for _ in range(3))
        except RuntimeError as error:
            bench.say(f"  {name} attention does not run: {str(error).splitlines()[0]}")
    return min(times, key=lambda name: times[name])


def plain(bench: Bench, inputs: Inputs, mode: Mode, attention: str) -> Call:
    """open_clip's forward in a mode, ready to be timed; returns the embedding."""
    eager = plain_eager(inputs, attention)
    if mode == "eager":
        return eager
    if mode == "graph":
        return eager if bench.dry else _graphed(cast(Callable[[], Tensor], eager))
    compiled = torch.compile(cast(Any, inputs.module).visual, dynamic=False, **_inductor(bench, mode))

    def call() -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, compiled(inputs.images))

    return call


def _graphed(call: Callable[[], Tensor]) -> Call:
    """A forward as one CUDA graph: its images are not copied in, which favours it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _inductor(bench: Bench, mode: Mode) -> dict[str, Any]:
    """Options of torch.compile for a mode; a dry run only traces."""
    if bench.dry:
        return {"backend": "eager"}
    return {"mode": "max-autotune"} if mode == "max-autotune" else {}


Timed = Callable[[], tuple[Contributions, Tensor]]


def decomposed_call(bench: Bench, inputs: Inputs, mode: Mode | None) -> Timed:
    """The decomposed forward with attention and heads, in a mode or (None) as it is without asking for one."""
    options: dict[Mode | None, dict[str, Any]] = {"eager": {"cuda_graphs": 0}, "graph": _graphs(len(inputs.images))}
    model = clipfast.wrap(inputs.module, **({} if bench.dry else options.get(mode, {})))

    decompose: Callable[..., Contributions] = model.decompose
    if mode in ("compile", "max-autotune"):
        decompose = torch.compile(decompose, fullgraph=True, dynamic=False, **_inductor(bench, cast(Mode, mode)))

    def call() -> tuple[Contributions, Tensor]:
        with torch.no_grad():
            contributions = decompose(inputs.images, attention=True)
            return contributions, contributions.heads()

    return call


def _graphs(batch: int) -> dict[str, Any]:
    """Asks for CUDA graphs where they are not the default."""
    default = inspect.signature(clipfast.wrap).parameters["cuda_graphs"].default
    return {"cuda_graphs": batch} if default == 0 else {}


def verify(inputs: Inputs, ours: Timed, theirs: Call) -> list[Check]:
    """The checks of both sides' results as they are timed, and of maps."""
    for _ in range(3):  # a graph is captured after the first calls; the result that is timed is that of a later one
        contributions, heads = ours()
    with_maps = clipfast.wrap(inputs.module).decompose(inputs.images, texts=inputs.texts, maps="summed")
    return [
        *check_decomposed(inputs.witness, contributions, heads),
        *inputs.witness.checks({"maps": with_maps.maps}),
        *check_plain(inputs.witness, cast(Tensor, theirs())),
    ]


def compare(bench: Bench, *, name: str, batch: int, mode: Mode) -> None:
    """One unit: both sides in a mode, beside the two defaults, in turn."""
    if mode in ("compile", "max-autotune"):
        torch.compiler.reset()
    inputs = Inputs.of(bench, name, batch)
    attention = best_attention(bench, inputs)
    ours, own = decomposed_call(bench, inputs, mode), decomposed_call(bench, inputs, None)
    theirs, eager = plain(bench, inputs, mode, attention), plain_eager(inputs, attention)
    ours_name, theirs_name = f"decomposed, {mode}", f"plain, {mode}"
    sides: dict[str, Call] = {theirs_name: theirs, DEFAULT: own, EAGER: eager}
    figures: dict[str, Any] = {"attention of plain": attention}
    checks = _named(verify(inputs, own, eager), DEFAULT)
    try:
        checks += verify(inputs, ours, theirs)
        sides = {ours_name: ours, **sides}
    except WrongResult:
        raise
    except Exception as error:  # what torch.compile does not take; the plain side in this mode has a bar all the same
        figures["decomposed in this mode"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        bench.say(f"  decomposed, {mode} does not run: {figures['decomposed in this mode']}")
        checks += _named(check_plain(inputs.witness, cast(Tensor, theirs())), mode)
    require(checks)
    bars: list[Bar] = []
    if mode == "eager":
        sides["decomposed with maps"] = with_maps(inputs)
        # without graphs: what a replayed graph works in is not counted as allocated
        figures["peak_mb"] = memory = {side: _peak(bench, sides[side]) for side in (ours_name, EAGER) if side in sides}
        if not bench.dry and batch >= 64 and ours_name in memory:
            bars.append(Bar("peak memory over plain", memory[ours_name] / memory[EAGER], 1.1, False))
    times = bench.rounds(sides, single=False, warmup=3)
    figures |= {
        f"{a} over {b}": ratio(times, a, b) for a in (ours_name, DEFAULT) if a in times for b in (theirs_name, EAGER)
    }
    flops = products(decomposed(Batch(shape_of(name), batch)))
    figures["flops"] = flops
    figures["flops_per_second"] = flops / statistics.median(times[DEFAULT])
    bars += promises(name, batch, mode, figures, theirs_name)
    bench.record(
        f"{name} batch {batch} {mode}",
        times,
        settings={"model": name, "batch": batch, "mode": mode, "texts": len(inputs.texts)},
        checks=checks,
        bars=bars,
        figures=figures,
    )
    del inputs, ours, own, theirs, eager, sides
    if not bench.dry:
        torch.cuda.empty_cache()


def promises(name: str, batch: int, mode: Mode, figures: dict[str, Any], theirs: str) -> list[Bar]:
    """The bars of a unit."""
    if not promised(name, batch):
        return []
    what = "open_clip eager" if mode == "eager" else f"open_clip, {mode}"
    reached = figures[f"{DEFAULT} over {EAGER if mode == 'eager' else theirs}"]
    if name == "ViT-L-14":
        return [Bar(f"decomposed over {what}", reached, 1.15 if mode == "eager" else 1.05, True)]
    return [Bar(f"decomposed over {what}", reached, 1.0, True)]


def _named(checks: list[Check], what: str) -> list[Check]:
    return [Check(f"{what}: {check.name}", check.error, check.bound) for check in checks]


def with_maps(inputs: Inputs) -> Call:
    """The decomposed forward with attention, heads and summed maps, as it is without asking for a mode."""
    model = clipfast.wrap(inputs.module)

    def call() -> object:
        contributions = model.decompose(inputs.images, attention=True, texts=inputs.texts, maps="summed")
        return contributions, contributions.heads()

    return call


def _peak(bench: Bench, call: Call) -> float:
    """MB allocated at most during a call that has run before; −1 in a dry run."""
    if bench.dry:
        return -1.0
    for _ in range(3):
        seconds(call)
    torch.cuda.reset_peak_memory_stats()
    seconds(call)
    return torch.cuda.max_memory_allocated() / 1e6


def heaviest(bench: Bench, count: int = 5) -> list[tuple[str, float]]:
    """The kernels of a decomposed forward with maps that take longest: names and total milliseconds.

    On the CPU, where nothing is a kernel, torch's operations stand for them.
    """
    inputs = Inputs.of(bench, bench.sizes.models[0], bench.sizes.batches[0])
    call = with_maps(inputs)
    for _ in range(3):
        seconds(call)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if bench.dry else activity.CUDA]) as profile:
        seconds(call)
    times = [
        (event.key, (event.self_cpu_time_total if bench.dry else event.self_device_time_total) / 1e3)
        for event in profile.key_averages()
    ]
    return sorted(times, key=lambda each: -each[1])[:count]
