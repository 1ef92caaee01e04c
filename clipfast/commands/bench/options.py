"""Options of ``clipfast bench``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Dtype, Flag, NonNegative, Positive, Texts


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure decomposed forwards against plain ones, after a check that they are right.

    Attributes:
        model: An open_clip name with random seeded weights, "scenes", or a folder; repeat.
        batch: Images at once; repeat.
        dtype: Precision of the weights; repeat.
        backend: auto, or a name that ``clipfast doctor`` lists; repeat.
        outputs: plain, heads, attention, maps, tokens: with commas or repeated. Default: all.
        image_size: Height and width of the images in pixels, such as 336x672, or one side. Default: each model's own.
        texts: Random directions that maps are drawn for.
        device: cpu, cuda or cuda:N. Default: CUDA where there is a device.
        threads: Threads torch computes with. Default: torch's own.
        pairs: Interleaved pairs that count.
        warmup: Pairs that run before.
        naive: Against the definition written out, too: slow.
        compile: Against torch.compile of the plain forward, too.
        memory: Peak memory; on the CPU a fresh process for each.
        out: Folder for bench.json, bench.md and bench.svg.
        json: Print the JSON instead of the table.
        compare: Measure nothing; compare two results, A.json and B.json.
        chart: Measure nothing; draw the chart of a result again.
    """

    model: Sequence[str] = ("ViT-B-32",)
    batch: Sequence[Positive] = (8,)
    dtype: Sequence[Dtype] = ("fp32",)
    backend: Sequence[str] = ("auto",)
    outputs: Texts = ()
    image_size: str | None = None
    texts: Positive = 16
    device: str | None = None
    threads: Positive | None = None
    pairs: Positive = 7
    warmup: NonNegative = 2
    naive: Annotated[Flag, Parameter(negative="--no-naive")] = False
    compile: Annotated[Flag, Parameter(negative="--no-compile")] = False
    memory: Annotated[bool, Parameter(negative="--no-memory")] = True
    out: Path = Path("out/bench")
    json: Flag = False
    compare: tuple[Path, Path] | None = None
    chart: Path | None = None
