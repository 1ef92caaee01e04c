"""Compiles the kernels for GPUs without having one: registers, spills, shared memory and tensor-core instructions.

A :class:`~clipfast.kernels.launch.Launch` made from tensors on torch's ``meta`` device is compiled by Triton
for a given compute capability, with the argument specialisation, options and passes of a real launch. Triton's
disassembler reads the machine code back. Nothing runs, so nothing is timed. ``python -m benchmarks.compiled`` writes
the table of every kernel and configuration to ``benchmarks/results/compiled.md`` and ``.json``; its exit code is 1 if
one breaks a rule (:func:`faults`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.specimens import Specimen, specimens
from clipfast.bench import machine
from clipfast.kernels.launch import AMD, Launch

GFX942 = 942
"""MI300, for which Triton's HIP compiler builds; stands where a compute capability does."""
CAPABILITIES = (80, 90, 100, 120, GFX942)
"""Ampere, Hopper, Blackwell for data centres, Blackwell for workstations, and AMD's CDNA 3."""
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024, GFX942: 64 * 1024}
"""Maximum shared memory of one program, in bytes."""
_ONCE = "values stored before the loop over keys and read once after it (LDL.LU): cheaper than a register less in it"
ALLOWED_SPILLS: dict[tuple[str, int], tuple[int, str]] = {
    ("_attention_kernel", 80): (2, _ONCE),
    ("_attention_kernel", 90): (3, _ONCE),
    ("_attention_kernel", 100): (7, _ONCE),
}
"""(kernel, capability) → accepted loads and stores of spilled registers, and the reason."""
UNTUNED = (120, GFX942)
"""What kernels have no configurations of their own for: they compile, fit and use matrix units, and may spill a bit."""
FOLDER = Path(__file__).resolve().parent / "results"
_TENSOR_CORES = re.compile(r"\b(HGMMA|QGMMA|HMMA|IMMA|DMMA|UTC\w*MMA)\b")
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w*)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


class Interpreted(RuntimeError):
    """``TRITON_INTERPRET`` is set, so kernels are interpreted and cannot be compiled."""


class OfflineDriver:
    """Replaces Triton's driver and reports the GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("hip", "gfx942", 64) if capability == GFX942 else GPUTarget("cuda", capability, 32)
        self.device = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """One device per capability, so that Triton caches their binaries separately."""
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        """A stream that is never used."""
        return 0


@contextmanager
def offline(capability: int) -> Iterator[None]:
    """A context in which Triton compiles for this capability."""
    if triton.knobs.runtime.interpret:
        raise Interpreted("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    from triton.runtime import driver

    before = driver._active
    driver.set_active(OfflineDriver(capability))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class Compiled:
    """The binary of one launch.

    Attributes:
        kernel: name of the kernel.
        config: tile sizes, warps and stages.
        capability: of :data:`CAPABILITIES`.
        registers: per thread.
        spills: loads and stores of spilled registers in the code.
        shared: bytes of shared memory per program.
        programs: programs that fit on one multiprocessor by registers, threads and shared memory.
        tensor_cores: matrix instructions in the code.
        instructions: all instructions in the code.
        wide_loads: 16-byte loads, asynchronous copies and bulk copies.
    """

    kernel: str
    config: str
    capability: int
    registers: int
    spills: int
    shared: int
    programs: int
    tensor_cores: int
    instructions: int
    wide_loads: int

    def to_json(self) -> dict[str, Any]:
        """The entry of a result file."""
        return asdict(self)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch for a GPU that need not be present.

    Args:
        launch: a launch, usually made from ``meta`` tensors.
        capability: of :data:`CAPABILITIES`.

    Raises:
        Interpreted: Triton interprets kernels in this process.
    """
    with offline(capability):
        binary = launch.kernel.run(
            **launch.arguments,
            **launch.constants,
            **launch.config.blocks,
            num_warps=launch.config.warps,
            num_stages=launch.config.stages,
            grid=launch.grid,
            warmup=True,
        )
        binary = binary.result() if hasattr(binary, "result") else binary
    shared, warps = int(binary.metadata.shared), int(binary.metadata.num_warps)
    if capability == GFX942:
        return for_amd(launch, binary.asm["amdgcn"], shared, warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(binary.asm["cubin"])
    try:
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        code = _run(_tool("nvdisasm"), "-c", file.name)
    finally:
        os.unlink(file.name)
    counted = Counter(name.split(".")[0] for name in _INSTRUCTION.findall(code))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    return Compiled(
        kernel=launch.kernel.__name__,
        config=str(launch.config),
        capability=capability,
        registers=registers,
        spills=counted["LDL"] + counted["STL"],
        shared=shared,
        programs=resident(registers, warps, shared, capability),
        tensor_cores=len(_TENSOR_CORES.findall(code)),
        instructions=sum(counted.values()),
        wide_loads=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\b|\bUTMALDG\b", code)),
    )


def for_amd(launch: Launch, code: str, shared: int, warps: int) -> Compiled:
    """The figures of an assembly for CDNA 3, which names its registers and spills itself."""
    counted = Counter(_AMD_INSTRUCTION.findall(code))
    registers, spills = (
        int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return Compiled(
        kernel=launch.kernel.__name__,
        config=str(launch.config),
        capability=GFX942,
        registers=registers,
        spills=spills,
        shared=shared,
        programs=resident(registers, warps, shared, GFX942),
        tensor_cores=sum(count for name, count in counted.items() if name.startswith("v_mfma")),
        instructions=sum(counted.values()),
        wide_loads=sum(count for name, count in counted.items() if name.endswith("load_dwordx4")),
    )


def resident(registers: int, warps: int, shared: int, capability: int) -> int:
    """Programs that fit on one multiprocessor at once."""
    if capability == GFX942:  # four units of 512 registers and at most 8 warps of 64 threads
        per_unit = min(8, 512 // (8 * -(-registers // 8)))
        return min(4 * per_unit // warps, 64 * 1024 // max(shared, 1))
    if capability == 120:  # 48 warps and 100 KiB
        by_registers = 65536 // (32 * warps * (8 * -(-registers // 8)))
        return min(24, 48 // warps, by_registers, 100 * 1024 // (shared + 1024))
    total_shared = {80: 164, 90: 228, 100: 228}[capability] * 1024
    by_registers = 65536 // (32 * warps * (8 * -(-registers // 8)))
    by_shared = total_shared // (shared + 1024)
    return min(32, 64 // warps, by_registers, by_shared)


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        operation: name of the operation.
        case: sizes and dtype.
        products: whether tensor cores are expected.
        compiled: the binary.
    """

    operation: str
    case: str
    products: bool
    compiled: Compiled

    def to_json(self) -> dict[str, Any]:
        """The entry of the result file."""
        return {"operation": self.operation, "case": self.case} | self.compiled.to_json() | {"faults": faults(self)}


def faults(line: Line) -> list[str]:
    """The rules a binary breaks: unexpected spills, too much shared memory, no tensor cores, an empty body."""
    binary = line.compiled
    allowed, _ = ALLOWED_SPILLS.get((binary.kernel, binary.capability), (0, ""))
    wrong = []
    if binary.spills > allowed and binary.capability not in UNTUNED:
        wrong.append(f"{binary.spills} spills")
    if binary.shared > SHARED_LIMITS[binary.capability]:
        wrong.append(f"{binary.shared} bytes of shared memory")
    if line.products and not binary.tensor_cores:
        wrong.append("no tensor-core instruction")
    if binary.instructions < 20:
        wrong.append("an empty body")
    return wrong


def _distinct(capability: int) -> list[Specimen]:
    """Specimens without duplicates: those that the compiler cannot tell apart."""
    seen: dict[str, Specimen] = {}
    for specimen in specimens(AMD if capability == GFX942 else capability):
        seen.setdefault(
            f"{specimen.operation} {specimen.case} {specimen.launch.kernel} {specimen.launch.config}", specimen
        )
    return list(seen.values())


def _sample(capability: int) -> list[Specimen]:
    """The last specimen, usually the largest, of every kernel, dtypes and, where they are its own, configuration."""
    chosen = {}
    for specimen in _distinct(capability):
        launch = specimen.launch
        dtypes = tuple(value.dtype for value in launch.arguments.values() if isinstance(value, torch.Tensor))
        config = "" if capability in UNTUNED else str(launch.config)
        chosen[launch.kernel, config, dtypes] = specimen
    return list(chosen.values())


def _compile(task: tuple[int, int, bool]) -> Line:
    capability, index, sample = task
    specimen = (_sample if sample else _distinct)(capability)[index]
    return Line(specimen.operation, specimen.case, specimen.products, compile_launch(specimen.launch, capability))


def compile_all(capabilities: Sequence[int], only: str = "", processes: int = 2, *, sample: bool = False) -> list[Line]:
    """Every specimen of these capabilities, or those whose operation's name contains ``only``, or a sample."""
    tasks = [
        (capability, index, sample)
        for capability in capabilities
        for index, specimen in enumerate((_sample if sample else _distinct)(capability))
        if only in specimen.operation
    ]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile, tasks, chunksize=4))


def outdated(folder: Path, capabilities: Sequence[int]) -> int:
    """How many launches a table has too many or too few."""
    launches = json.loads((folder / "compiled.json").read_text(encoding="utf-8"))["launches"]
    keys = ("operation", "case", "config", "capability")
    have = {tuple(launch[key] for key in keys) for launch in launches if launch["capability"] in capabilities}
    wanted = {
        (each.operation, each.case, str(each.launch.config), capability)
        for capability in capabilities
        for each in _distinct(capability)
    }
    return len(have ^ wanted)


def gpu(capability: int) -> str:
    """The compiler's name of what ``capability`` stands for."""
    return "gfx942" if capability == GFX942 else f"sm_{capability}"


HEADER = ("operation", "case", "config", "GPU", "registers", "spills", "shared", "programs", "tensor", "instructions")


def markdown(lines: Sequence[Line]) -> str:
    """The committed table as Markdown."""
    versions = machine.versions()
    spilled = sum(line.compiled.spills > 0 for line in lines)
    head = [
        "# What the kernels compile to",
        "",
        f"{len(lines)} launches, compiled by Triton {versions['triton']} without a GPU",
        f"(`python -m benchmarks.compiled`), {spilled} of which spill registers. No figure is a time. Config: tiles,",
        "w warps, s stages. Shared: bytes of shared memory per program; programs: how many fit on one multiprocessor;",
        "tensor: tensor-core instructions in the code. Ampere (sm_80), Hopper (sm_90) and Blackwell (sm_100) have",
        "configurations of their own; sm_120 and gfx942 (MI300) take those of Ampere that fit.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    body = []
    for line in lines:
        c = line.compiled
        cells = (line.operation, line.case, c.config, gpu(c.capability), c.registers, c.spills, c.shared, c.programs)
        body.append(f"| {' | '.join(str(cell) for cell in (*cells, c.tensor_cores, c.instructions))} |")
    reasons = [
        f"- {kernel}, {gpu(capability)}: at most {count}: {why}"
        for (kernel, capability), (count, why) in ALLOWED_SPILLS.items()
    ]
    return "\n".join([*head, *body, *(["", "Spills that are left:", "", *reasons] if reasons else [])]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, writes the table and prints the broken rules; returns 1 if there are any, 2 if Triton interprets."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--only", default="", help="operations whose name contains this; nothing is written")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="one case of every kernel, dtype and own configuration; nothing is written; 1 if the table lacks a launch",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    settings = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("benchmarks.compiled: TRITON_INTERPRET is set: unset it to compile", file=sys.stderr)
        return 2
    lines = compile_all(settings.capabilities, settings.only, settings.processes, sample=settings.sample)
    wrong = [
        f"{line.operation} {line.case} {line.compiled.config} {gpu(line.compiled.capability)}: {', '.join(broken)}"
        for line in lines
        if (broken := faults(line))
    ]
    if settings.sample and (count := outdated(settings.out, settings.capabilities)):
        wrong.append(
            f"{settings.out / 'compiled.json'} differs in {count} launches: run `python -m benchmarks.compiled`"
        )
    if settings.only or settings.sample:
        print(markdown(lines))
    else:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "compiled.md").write_text(markdown(lines), encoding="utf-8")
        document = {"versions": machine.versions(), "code": machine.code(), "launches": [x.to_json() for x in lines]}
        (settings.out / "compiled.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"FAULT {line}")
    print(f"{len(lines)} launches compiled, {len(wrong)} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
