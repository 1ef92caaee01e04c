"""Offsets of the Triton kernels that are products of 32 bits: ``python -m benchmarks.offsets``.

Triton passes an integer below 2³¹ as one of 32 bits, and the product of two such numbers has 32 bits, too. A stride is
as large as its user's layout makes it: views of one large buffer, parts far apart. So what a stride is multiplied with
has to have 64 bits already, or the launch has to see that the product stays small. Every kernel is lowered to Triton's
intermediate language, with strides that nothing is known of, and every product of 32 bits that depends on one of them
is listed; the exit code is 1 if one is not in :data:`BOUNDED`. No GPU is needed, and nothing runs.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import triton
from triton._C.libtriton import ir

from benchmarks.compiled import offline
from benchmarks.specimens import specimens
from clipfast.kernels.launch import Launch

BOUNDED = {
    ("_attention_kernel", "s_n"): "a tile of rows; plan() copies where LARGEST_TILE rows are 2^31 elements or more",
    ("_mean_row_kernel", "s_n"): "a tile of rows; plan() copies where LARGEST_TILE rows are 2^31 elements or more",
    ("_statistics_kernel", "s_n"): "a tile of rows; plan() copies where LARGEST_TILE rows are 2^31 elements or more",
    ("_weighted_rows_kernel", "s_n"): "a tile of rows; plan() copies where LARGEST_TILE rows are 2^31 elements or more",
}
"""(kernel, stride) → why a product of 32 bits cannot overflow."""
STRIDE = "s_"
"""What the name of an argument begins with that is a stride."""
UNKNOWN = 2**31 - 1
"""A stride of 32 bits of which the compiler knows nothing: neither 1 nor a multiple of anything."""

_ARGUMENT = re.compile(r"%([\w-]+): i(?:32|64)\b")
_ASSIGNED = re.compile(r"\s*%([\w-]+)(?::\d+)? = (.*?)(?: loc\(.*)?$")
_USED = re.compile(r"%([\w-]+)(?:#\d+)?")
_CARRIED = re.compile(r"%([\w-]+) = %([\w-]+)")
_PRODUCTS = ("arith.muli", "arith.shli")
_FRESH = ("tt.load", "arith.cmpi", "arith.remsi", "arith.remui")
"""Operations whose result is not the size of what they are given."""


def lowered(launch: Launch, capability: int = 90) -> str:
    """A launch in Triton's intermediate language, functions inlined, before anything is decided for a GPU."""
    kernel, texts = launch.kernel, []

    def lower(key, signature, device, constexprs, options, attrs, warmup):  # type: ignore[no-untyped-def]
        """In place of compiling."""
        _, _, target, backend, _ = kernel.device_caches[device]
        source, context, stages = kernel.ASTSource(kernel, signature, constexprs, attrs), ir.context(), {}
        ir.load_dialects(context)
        backend.load_dialects(context)
        made = backend.get_codegen_implementation(options), backend.get_module_map(), context
        backend.add_stages(stages, options, source.language)
        texts.append(str(stages["ttir"](source.make_ir(target, options, *made), {})))

    kernel._do_compile = lower
    try:
        with offline(capability):
            kernel.run(
                **launch.arguments,
                **launch.constants,
                **launch.config.blocks,
                num_warps=launch.config.warps,
                num_stages=launch.config.stages,
                grid=launch.grid,
                warmup=True,
            )
    finally:
        del kernel._do_compile
    return texts[0]


def unknown_strides(launch: Launch) -> Launch:
    """The launch with strides of which the compiler knows nothing."""
    arguments = {name: UNKNOWN if name.startswith(STRIDE) else value for name, value in launch.arguments.items()}
    return replace(launch, arguments=arguments)


def narrow_products(text: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Products of 32 bits in Triton's intermediate language, with the integer arguments that they depend on."""
    depends: dict[str, frozenset[str]] = {}
    for line in text.splitlines():
        if "tt.func" in line:
            depends |= {name: frozenset((name,)) for name in _ARGUMENT.findall(line)}
            continue
        assigned = _ASSIGNED.match(line)
        if assigned is None:
            continue
        name, value = assigned.groups()
        operation = value.split(maxsplit=1)[0]
        if operation == "scf.for":
            depends |= {inner: depends.get(outer, frozenset()) for inner, outer in _CARRIED.findall(value)}
        used = frozenset() if operation in _FRESH else frozenset(_USED.findall(value))
        depends[name] = frozenset().union(*(depends.get(each, frozenset()) for each in used))
        if operation in _PRODUCTS and value.rstrip().endswith(("i32", "i32>")) and depends[name]:
            yield value, depends[name]


def strides(launch: Launch, capability: int = 90) -> set[str]:
    """The strides that a launch multiplies in 32 bits."""
    found = [names for _, names in narrow_products(lowered(unknown_strides(launch), capability))]
    return {name for names in found for name in names if name.startswith(STRIDE)}


def _kind(launch: Launch) -> str:
    """What tells one kind of launch from another: sizes of tiles change no way that an offset is computed."""
    constants = dict(launch.constants) | {"DESCRIPTORS": launch.config.blocks.get("DESCRIPTORS")}
    return f"{launch.kernel.__name__} {constants}"


def main() -> int:
    """Prints what is found; returns 1 if something is not bounded, 2 if Triton interprets."""
    if triton.knobs.runtime.interpret:
        print("benchmarks.offsets: TRITON_INTERPRET is set: unset it to lower kernels", file=sys.stderr)
        return 2
    kinds = {_kind(specimen.launch): (specimen.launch, on) for on in (80, 90, 100) for specimen in specimens(on)}
    kernels = {launch.kernel.__name__ for launch, _ in kinds.values()}
    found = {(launch.kernel.__name__, name) for launch, on in kinds.values() for name in strides(launch, on)}
    for kernel, name in sorted(found):
        print(f"{kernel} {name}: {BOUNDED.get((kernel, name), 'FAULT: may overflow')}")
    print(f"{len(kinds)} launches of {len(kernels)} kernels, {len(found - set(BOUNDED))} with faults")
    return 1 if found - set(BOUNDED) else 0


if __name__ == "__main__":
    raise SystemExit(main())
