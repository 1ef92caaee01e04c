"""``clipfast reproduce``: the paper's experiments on a user's own weights and data.

``--out`` gets ``results.md`` and ``results.json``, ``tables/NAME.json`` as soon as a table is done, ``figures/``, and
``collections/`` with the contributions of the images. A table whose file was made from the same weights, images and
options is not measured again; a collection goes on where it was stopped.
"""

from collections.abc import Mapping
from typing import Any

from clipfast.commands import console
from clipfast.commands.files import write_json
from clipfast.commands.interrupts import saving_interrupts
from clipfast.commands.loading import check_device, load_model, versions
from clipfast.commands.options import DTYPE, MODEL
from clipfast.commands.outcome import FAILED
from clipfast.commands.reproduce import published
from clipfast.commands.reproduce.options import DATA, TABLES, Options, missing
from clipfast.commands.reproduce.page import comparable, left_out, page
from clipfast.commands.reproduce.results import Store, digest
from clipfast.commands.reproduce.tables import table
from clipfast.commands.reproduce.workbench import Workbench
from clipfast.commands.results import prepare_results
from clipfast.commands.running import Placed
from clipfast.errors import ClipfastError
from clipfast.files import write_text

FORMAT = "clipfast.reproduce/1"
DONE, KEPT, EARLIER, WAITING = "done", "done before", "of an earlier run", "not done yet"


def run(options: Options) -> int:
    """Measures the tables; returns the exit code.

    Raises:
        ClipfastError: an option that does not fit, or a model that cannot be loaded.
        KeyboardInterrupt: a signal has arrived; tables and units that are done are kept.
        OSError: a result that cannot be written.
    """
    options.check()
    names = options.tables()
    prepare_results(options.out)
    for name in DATA:
        if options.data.place(name) is None and not options.only:
            console.note(f"not given, so left out: {missing(name)}")
    model, placed = options.model, Placed.of(options.run, options.model.device)
    # workers of a pass load the model themselves; what follows the pass is computed here, on the device itself
    device = (
        placed.load if placed.engine == "serial" else None if placed.engine == "ray" else check_device(model.device)
    )
    loaded = load_model(model.model or MODEL, model.pretrained, device, model.dtype or DTYPE)
    runner = _Runner(options, Workbench(options, loaded, placed))
    try:
        with saving_interrupts() as interrupts:
            for number, name in enumerate(names, 1):
                console.note(f"table {number} of {len(names)}, {name}: {TABLES[name].title}")
                runner.measure(name)
                interrupts.check()
    except KeyboardInterrupt as error:
        done = sum(state in (DONE, KEPT) for state in runner.states.values())
        said = f"; {error}" if str(error) else "; run the same command again to go on"
        raise KeyboardInterrupt(f"{done} of {len(names)} tables are done{said}") from None
    finally:
        runner.write()
    if options.json:
        console.say((options.out / "results.json").read_text(encoding="utf-8").rstrip())
    else:
        runner.show()
    console.note(f"results are in {options.out}/results.md")
    return FAILED if runner.failed else 0


class _Runner:
    """Measures tables one by one and keeps the page up to date.

    Args:
        options: of the command.
        bench: the model and the data.

    Attributes:
        states: how far each table is.
        failed: whether a table could not be measured, or images could not be used.
    """

    def __init__(self, options: Options, bench: Workbench) -> None:
        self._options, self._bench = options, bench
        self._store = Store(options.out)
        given = {name: options.data.place(info.data) is not None for name, info in TABLES.items()}
        self.states = {name: WAITING if given[name] else left_out(name) for name in TABLES}
        self._tables: dict[str, Mapping[str, Any]] = {}
        self.failed = False

    def measure(self, name: str) -> None:
        """Measures a table, or takes what an earlier run has measured."""
        bench = self._bench
        try:
            key = digest(bench.key(name))
            content = self._store.read(name, key)
            self.states[name] = KEPT
            if content is None:
                self.states[name] = WAITING
                result = table(name)(bench)
                compared = published.compare(name, bench.name, result.setup, result.rows)
                content = self._store.write(name, key, TABLES[name].title, bench.name, result, compared)
                self.states[name] = DONE
            for note in content["notes"]:
                console.note(f"{name}: {note}")
            self._tables[name] = content
            self.failed = self.failed or bool(content["failed"])
        except ClipfastError as error:
            self.states[name] = f"failed: {console.one_line(error)}"
            self.failed = True
            console.error(f"{name}: {error}")
        self.write()

    def write(self) -> None:
        """Writes the page and the JSON, with tables of earlier runs that this one has not come to."""
        tables, states = dict(self._tables), dict(self.states)
        for name in TABLES:
            earlier = self._store.read(name) if states[name] in (WAITING, left_out(name)) else None
            if earlier is not None and earlier["model"] == self._bench.name:
                tables[name], states[name] = earlier, EARLIER
        tables = {name: tables[name] for name in TABLES if name in tables}
        head = {
            "format": FORMAT,
            "model": self._bench.name,
            "dtype": self._options.model.dtype or DTYPE,
            "versions": versions(),
            "status": states,
        }
        write_json(self._options.out / "results.json", head | {"tables": tables})
        write_text(self._options.out / "results.md", page(head, tables))

    def show(self) -> None:
        """The state of every table, and what is comparable, on stdout."""
        lines = []
        for name, state in self.states.items():
            verdicts = [each["verdict"] for each in self._tables.get(name, {}).get("comparisons", ())]
            counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
            lines.append((name, state, counts))
        console.table(("table", "state", "published numbers"), lines)
        rows = [row for name, content in self._tables.items() for row in comparable(name, content)]
        if rows:
            console.table(("number", "published", "measured", "tolerance", "verdict"), rows)
