"""``clipfast bench``, ``clipfast models`` and ``clipfast doctor``."""

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import DeviceOption, Dtype, JsonOption


@command
def bench(
    model: Annotated[
        list[str], typer.Option(help='An open_clip name with random seeded weights, "scenes", or a folder; repeat.')
    ] = ["ViT-B-32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Images at once; repeat.")] = [8],  # noqa: B006
    dtype: Annotated[list[Dtype], typer.Option(help="Precision of the weights; repeat.")] = [Dtype.fp32],  # noqa: B006
    backend: Annotated[list[str], typer.Option(help="auto, or a name `clipfast doctor` lists; repeat.")] = ["auto"],  # noqa: B006
    outputs: Annotated[
        list[str] | None, typer.Option(help="plain, heads, attention, maps, tokens: with commas or repeated; all.")
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Random directions that maps are drawn for.")] = 16,
    device: DeviceOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads torch computes with; its default.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs that count.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Pairs that run before.")] = 2,
    naive: Annotated[bool, typer.Option(help="Against the definition written out, too: slow.")] = False,
    compile: Annotated[bool, typer.Option(help="Against torch.compile of the plain forward, too.")] = False,
    memory: Annotated[bool, typer.Option(help="Peak memory; on the CPU a fresh process for each.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.svg.")] = Path("out/bench"),
    as_json: JsonOption = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Measure nothing; compare two results.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="RESULTS.json", help="Measure nothing; draw a result's chart again.")
    ] = None,
) -> int:
    """Measure decomposed forwards against plain ones, behind a check that they are right."""
    if compare is not None:
        from clipfast.commands.bench_results import compare_files

        return compare_files(*compare)
    if chart is not None:
        from clipfast.commands.bench_results import draw

        return draw(chart)
    from clipfast.commands.bench import Options, run

    return run(
        Options(
            model=model,
            batch=batch,
            dtype=[each.value for each in dtype],
            backend=backend,
            outputs=outputs or (),
            texts=texts,
            device=device,
            threads=threads,
            pairs=pairs,
            warmup=warmup,
            naive=naive,
            compile=compile,
            memory=memory,
            out=out,
            json=as_json,
        )
    )


@command
def models(
    wanted: Annotated[str | None, typer.Argument(metavar="[FILTER]", help="Part of a name.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Those that are refused, too, with the reasons.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> int:
    """List the models that can be decomposed, and say why others cannot."""
    from clipfast.commands.models import run

    return run(wanted, every, as_json)


@command
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> int:
    """Say what this installation has: versions, processor, devices, backends, the bundled model."""
    from clipfast.commands.doctor import run

    return run(as_json)
