"""``clipfast bench``: how fast decompositions are here, against the model's own forward and the naive form.

Written under the folder given as ``--out``: ``bench.json`` with every pair, and what is made from it alone:
``bench.md`` and ``bench.svg``. What cannot be measured is a row with its reason, and the exit code is then 2; a result
that is wrong is not timed and the exit code is 1.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clipfast.bench import chart, table
from clipfast.bench.document import document
from clipfast.bench.machine import cores as cores_here
from clipfast.bench.machine import moment
from clipfast.bench.plan import Plan, parse_outputs
from clipfast.bench.run import EVERY, WRONG, measure_plan
from clipfast.commands import console
from clipfast.commands.bench.options import Options
from clipfast.commands.files import write_json
from clipfast.commands.loading import check_device
from clipfast.commands.options import parse_size
from clipfast.commands.outcome import FAILED, INTERRUPTED
from clipfast.commands.results import prepare_results
from clipfast.files import write_text

WRONG_RESULT = 1
"""Exit code: a fault of clipfast."""


def plan_of(options: Options) -> Plan:
    """The plan that options ask for, checked.

    Raises:
        ClipfastError: an option that does not fit.
    """
    chosen = check_device(options.device)
    plan = Plan(
        models=tuple(dict.fromkeys(options.model)),
        batches=tuple(dict.fromkeys(options.batch)),
        dtypes=tuple(dict.fromkeys(options.dtype)),
        backends=tuple(dict.fromkeys(options.backend)),
        outputs=parse_outputs(options.outputs),
        texts=options.texts,
        device=str(chosen or ("cuda" if torch.cuda.is_available() else "cpu")),
        threads=torch.get_num_threads() if options.threads is None else options.threads,
        pairs=options.pairs,
        warmup=options.warmup,
        naive=options.naive,
        compiled=options.compile,
        memory=options.memory,
        image_size=parse_size(options.image_size),
    )
    with console.status("reading the list of models"):
        plan.check()
    return plan


def run(options: Options) -> int:
    """Measures; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit.
        OSError: a result that cannot be written.
    """
    prepare_results(options.out)
    plan = plan_of(options)
    outputs = len(plan.rows())
    total = outputs * len(list(plan.setups()))
    _warn_when_busy()
    entries: list[dict[str, Any]] = []
    done, complete = 0, False
    try:
        with console.progress("measuring", total) as advance:
            for entry in measure_plan(plan):
                entries.append(entry)
                steps = outputs if entry["output"] == EVERY else 1
                done += steps
                advance(steps)
                _say(entry, f"{done}/{total}")
        complete = True
    except KeyboardInterrupt:
        console.error(f"interrupted: {done} of {total} are done")
    finally:
        # also after an error: what was measured took its time
        _finish(options, document(plan.to_json(), entries, complete=complete))
    return _exit_code(entries) if complete else INTERRUPTED


def _warn_when_busy() -> None:
    load, cores = moment()["load_average"], cores_here()
    if load > cores / 2:
        console.warn(f"other work is running here (load average {load:.1f} on {cores} cores): figures will scatter")


def _say(entry: Mapping[str, Any], place: str) -> None:
    """One line about what has just been measured, on stderr."""
    name = f"{entry['model']}, batch {entry['batch']}, {entry['dtype']}, {entry['backend']}: {entry['output']}"
    if entry["failed"]:
        console.error(f"[{place}] {name}: {entry['failed']['kind']}: {entry['failed']['reason']}")
        return
    ratio = entry["against"]["plain"]["ratio_b_over_a"]["median"]
    console.note(f"[{place}] {name} {entry['images_per_second']:.4g} images/s, {ratio:.3g} × plain")
    probe = (entry["memory"] or {}).get("failed")
    if probe:
        console.error(f"{name}: its memory was not measured: {probe}")


def _finish(options: Options, result: dict[str, Any]) -> None:
    """Writes the three files and prints the table, or the document."""
    write_json(options.out / "bench.json", result)
    write_text(options.out / "bench.md", table.markdown(result))
    write_text(options.out / "bench.svg", chart.svg(result))
    if options.json:
        console.say(json.dumps(result, indent=2))
        return
    console.table(*table.cells(result))
    console.note(f"results are in {options.out}: bench.json, bench.md, bench.svg")


def _exit_code(entries: Sequence[Mapping[str, Any]]) -> int:
    failed = [entry["failed"]["kind"] for entry in entries if entry["failed"]]
    if failed:
        console.error(f"{len(failed)} of {len(entries)} rows were not measured")
    if WRONG in failed:
        return WRONG_RESULT
    unprobed = any((entry.get("memory") or {}).get("failed") for entry in entries)
    return FAILED if failed or unprobed else 0
