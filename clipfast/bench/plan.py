"""What to measure: every combination of models, dtypes, backends and batch sizes, and the outputs of each."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from clipfast.bench.inputs import DTYPES, TEXTS, known
from clipfast.bench.outputs import COMPILED, NAIVE_FORM, OUTPUTS
from clipfast.errors import InputError
from clipfast.kernels import dispatch


@dataclass(frozen=True)
class Setup:
    """One combination; the names are those of the command line.

    Attributes:
        model: as ``clipfast.load`` takes it.
        dtype: a key of :data:`clipfast.bench.inputs.DTYPES`.
        backend: ``"auto"`` or a backend's name.
        batch: images at once.
    """

    model: str
    dtype: str
    backend: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}, {self.backend}"

    def to_json(self) -> dict[str, Any]:
        """The combination in the layout of a result file."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """Everything a run measures.

    Attributes:
        models: names.
        batches: images at once.
        dtypes: keys of :data:`clipfast.bench.inputs.DTYPES`.
        backends: ``"auto"`` or names.
        outputs: of :data:`clipfast.bench.outputs.OUTPUTS`.
        texts: how many text directions the maps have.
        device: where to compute.
        threads: threads torch computes with.
        pairs: interleaved pairs that count.
        warmup: pairs that run before.
        naive: also compare with the definition written out.
        compiled: also compare with the compiled plain forward.
        memory: measure peak memory.
        image_size: height and width of the images; None for those of each model.
    """

    models: tuple[str, ...] = ("ViT-B-32",)
    batches: tuple[int, ...] = (8,)
    dtypes: tuple[str, ...] = ("fp32",)
    backends: tuple[str, ...] = (dispatch.AUTO,)
    outputs: tuple[str, ...] = OUTPUTS
    texts: int = TEXTS
    device: str = "cpu"
    threads: int = 1
    pairs: int = 7
    warmup: int = 2
    naive: bool = False
    compiled: bool = False
    memory: bool = True
    image_size: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises for a plan that no machine could measure, before anything is built.

        Raises:
            InputError: an unknown name, a number out of range, a backend that cannot run here.
            ModelError: a model that does not exist.
        """
        _all_of("--dtype", self.dtypes, tuple(DTYPES))
        _all_of("--outputs", self.outputs, OUTPUTS, "; --naive and --compile add the baselines")
        numbers = {"--batch": min(self.batches, default=1), "--texts": self.texts, "--threads": self.threads}
        for option, number in {**numbers, "--pairs": self.pairs}.items():
            if number < 1:
                raise InputError(f"{option} is {number}: give at least 1")
        if self.warmup < 0:
            raise InputError(f"--warmup is {self.warmup}: give 0 or more")
        if not self.device.startswith(("cpu", "cuda")):
            raise InputError(f"{self.device} cannot be measured: choose cpu or cuda")
        for backend in self.backends:
            try:
                dispatch.check(backend)
            except dispatch.BackendUnavailable as error:
                raise InputError(str(error)) from error
        for model in self.models:
            known(model)

    def setups(self) -> Iterator[Setup]:
        """Every combination; those of the same weights are adjacent."""
        yield from (Setup(*each) for each in product(self.models, self.dtypes, self.backends, self.batches))

    def rows(self) -> list[str]:
        """What is measured for each combination: the outputs, then the baselines."""
        naive = dict.fromkeys(NAIVE_FORM[output] for output in self.outputs if output in NAIVE_FORM)
        return [*self.outputs, *([COMPILED] if self.compiled else []), *(naive if self.naive else [])]

    def to_json(self) -> dict[str, Any]:
        """The plan in the layout of a result file."""
        return asdict(self)


def _all_of(option: str, given: Sequence[str], known: Sequence[str], more: str = "") -> None:
    if not given:
        raise InputError(f"{option} is empty: choose from {', '.join(known)}")
    for name in given:
        if name not in known:
            raise InputError(f"{option} does not know {name!r}: choose from {', '.join(known)}{more}")


def parse_outputs(given: Sequence[str]) -> tuple[str, ...]:
    """Outputs from names, each of which may hold several with commas; in canonical order, all of them for no names.

    Unknown names stay at the end, so that :meth:`Plan.check` can report them.
    """
    names = dict.fromkeys(name.strip() for part in given for name in part.split(",") if name.strip())
    if not given:
        return OUTPUTS
    return (*(name for name in OUTPUTS if name in names), *(name for name in names if name not in OUTPUTS))
