"""The last step of :mod:`benchmarks.gpu_suite`: every way of every operation, checked and timed, as orders to ship.

A forward of every model and batch, with everything that a request can keep, calls each operation on the shapes that
it has in use. The first call of a kind has :mod:`clipfast.kernels.tuning` run all its ways. What was chosen is then
checked against float64 on the call's own arguments, and the order of all ways by their times is written to
``defaults-sm_90.json`` in the layout of ``clipfast/kernels/defaults/sm_90.json``, which it replaces once it is
committed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipfast
from benchmarks.gpu_bench import OP_LOW, Bench
from benchmarks.gpu_checks import grouped, rows
from benchmarks.gpu_inputs import draw_images, random_model
from benchmarks.gpu_tools import Failed, Unit, capability
from clipfast.bench.inputs import unit_texts
from clipfast.files import write_text
from clipfast.kernels import dispatch, measuring, tuning
from clipfast.kernels.examples import arguments as example_arguments
from clipfast.kernels.registration import Operation, mutated_arguments

FLOAT32 = 5e-3
"""Error bound by norm of what is stored in float32, whose products may be in TF32 or of 16-bit factors."""


def units(bench: Bench) -> list[Unit]:
    """Each model, then the file."""
    models = [(f"{name}", partial(sweep, name=name)) for name in bench.sizes.models]
    return [*models, ("defaults", write_defaults)]


@contextmanager
def _recorded(seen: dict[str, tuple[str, list[Any]]]) -> Iterator[None]:
    """Keeps the arguments of the first call of every kind, copied where the operation changes them."""
    call = Operation.__call__

    def recording(self: Operation, *arguments: Any) -> Any:
        inputs = list(arguments[:-1])
        if any(isinstance(each, Tensor) for each in inputs):
            key = tuning.key(self.name, inputs)
            # While kernels are compiled ahead, arguments are memory that nobody wrote.
            if key not in seen and not tuning.postponed(measuring.device_of(inputs)):
                changed = mutated_arguments(self.name)
                seen[key] = self.name, [each.clone() if i in changed else each for i, each in enumerate(inputs)]
        return call(self, *arguments)

    Operation.__call__ = recording  # type: ignore[method-assign]
    try:
        yield
    finally:
        Operation.__call__ = call  # type: ignore[method-assign]


@torch.no_grad()
def sweep(bench: Bench, *, name: str) -> None:
    """Has every operation of a model's forwards timed in all its ways, and checks what was chosen."""
    module = random_model(name, bench.device)
    model = clipfast.wrap(module, cuda_graphs=0)
    texts = unit_texts(model.tower.embed_dim, bench.device, bench.sizes.texts)
    errors: dict[str, float] = {}
    for batch in sorted(bench.sizes.batches):
        images = draw_images(model.tower.image_size, batch, bench.device)
        seen: dict[str, tuple[str, list[Any]]] = {}
        with _recorded(seen):
            forwards(model, images, texts)
        for key, (operation, arguments) in seen.items():
            errors[key] = error(operation, arguments)
        bench.say(f"  batch {batch}: {len(seen)} kinds of calls, largest error {max(errors.values()):.1e}")
        del seen
    wrong = {key: value for key, value in errors.items() if not value <= bound(key)}
    bench.record(f"sweep {name}", {}, settings={"model": name}, figures={"errors": errors, "wrong": list(wrong)})
    if wrong:
        worst = max(wrong, key=lambda key: wrong[key])
        raise Failed(f"{len(wrong)} of {len(errors)} kinds of calls are wrong, the worst {worst}: {wrong[worst]:.2e}")


def forwards(model: clipfast.Model, images: Tensor, texts: Tensor) -> None:
    """Requests that call every operation a decomposition has."""
    model.decompose(images)
    contributions = model.decompose(images, attention=True, texts=texts, maps="summed")
    contributions.heads()
    few = images[:8]  # what these keep is large
    model.decompose(few, texts=texts[:8], maps="per_head")
    kept = model.decompose(few, attention=True, tokens=True)
    kept.tokens(kept.layers[0])
    clipfast.Moments(model).update(contributions)


def bound(key: str) -> float:
    """Largest error accepted of a kind of call: by the dtype that its factors are in."""
    return OP_LOW if "bfloat16" in key or "float16" in key else FLOAT32


def error(operation: str, arguments: Sequence[Any]) -> float:
    """Error by norm of what is chosen for a call: of the first and the last rows where rows are apart."""
    choice = dispatch.choose(operation, arguments)
    changed = mutated_arguments(operation)
    own = [each.clone() if i in changed else each for i, each in enumerate(arguments)]
    have = [*_tensors(choice.run(*own)), *(own[i] for i in changed)]
    expected = _double(operation, arguments)
    count = len(next(each for each in arguments if isinstance(each, Tensor)))
    worst = 0.0
    for actual, right in zip(have, expected, strict=True):
        few = rows(len(actual), 2) if len(actual) == count else list(range(len(actual)))
        worst = max(worst, grouped(actual[few], right[few])) if right.is_floating_point() else worst
    return worst


def _tensors(result: Any) -> list[Tensor]:
    """Results as a list."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else [each for each in result if isinstance(each, Tensor)]


def _double(operation: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The operation in plain torch in float64: what it returns, then what it changes."""

    def widened(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.double() if argument.is_floating_point() else argument
        if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            return [each.double() for each in argument]
        return argument

    changed = mutated_arguments(operation)
    # float64 tensors are copied where the operation changes them: double() returns the tensor itself
    own = [widened(each).clone() if i in changed else widened(each) for i, each in enumerate(arguments)]
    eager = dispatch.implementation(operation, "eager")
    assert eager is not None
    return [*_tensors(eager.run(*own)), *(own[i] for i in changed)]


# --------------------------------------------------------------------------------------------------- what is written


def orders(entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """Labels of every call's ways, the fastest first, from what the tuner keeps."""
    timed = {call: entry["milliseconds"] for call, entry in sorted(entries.items()) if entry.get("milliseconds")}
    return {call: sorted(times, key=lambda label: times[label]) for call, times in timed.items()}


def document(on: int, entries: Mapping[str, Any], device: str, source: str = "measured") -> dict[str, Any]:
    """The content of ``clipfast/kernels/defaults/sm_90.json``."""
    return {"capability": on, "source": source, "device": device, "orders": orders(entries)}


def write_defaults(bench: Bench) -> None:
    """Writes the orders of all that the tuner has timed on this device so far."""
    device = torch.device(bench.device)
    folder = bench.results.path.parent
    if bench.dry:
        known = tuning.choices(folder / "tuned-dry.json")
        arguments = example_arguments("linear_activation")
        backends = [backend for backend in dispatch.BACKENDS if backend.name in ("triton", "eager")]
        tuning.fastest(
            "linear_activation", arguments, dispatch.variants("linear_activation", arguments, backends), known=known
        )
    else:
        known = tuning.choices(tuning.file_for(torch.device("cuda", torch.cuda.current_device())))
    name = "none" if bench.dry else torch.cuda.get_device_name()
    on = capability(bench)
    content = document(on, known.items(), name, "dry run" if device.type == "cpu" else "measured")
    if not content["orders"]:
        raise Failed("the tuner has timed nothing")
    path: Path = folder / f"defaults-sm_{on}.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    bench.record("defaults", {}, settings={}, figures={"calls": len(content["orders"]), "file": path.name})
