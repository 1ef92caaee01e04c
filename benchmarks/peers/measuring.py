"""Correctness, time and memory of one question."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PEERS
from benchmarks.peers.question import Inputs, NotPossible, Peer, Question, one_line
from benchmarks.results import Results
from clipfast.bench.measuring import Call, Comparison, pairs, require
from clipfast.bench.memory import peak_memory


@dataclass(frozen=True)
class Setting:
    """What a question is asked with.

    Attributes:
        model: an open_clip name, or that of the bundled model.
        batch: images.
        threads: of torch.
        checkout: of the published code, where one was given.
    """

    model: str
    batch: int
    threads: int
    checkout: Path | None = None

    def inputs(self) -> Inputs:
        """Model, images and texts."""
        return Inputs.of(self.model, self.batch, self.threads, self.checkout)


def load(name: str) -> Peer:
    """A peer by its key in :data:`benchmarks.peers.PEERS`."""
    peer: Peer = import_module(f"benchmarks.peers.{PEERS[name]}").PEER
    return peer


def call(peer: str, question: str, side: str, model: str, batch: int, threads: int) -> Call:
    """One side of a question, ready to run, from plain values: a process of its own builds it, and nothing else."""
    (asked,) = (each for each in load(peer).questions if each.name == question)
    inputs = Setting(model, batch, threads).inputs()
    built = {"ours": asked.ours, "theirs": asked.theirs}[side](inputs)
    del inputs
    gc.collect()  # what was converted is freed before the memory in use is read
    return built.answer


def measure(
    key: str,
    question: Question,
    setting: Setting,
    count: int | None,
    results: Results | None,
    say: Callable[[str], None],
) -> None:
    """Asks one question: compares the answers, then times and weighs both sides and writes the result.

    Args:
        key: of the peer.
        question: one of its questions.
        setting: what it is asked with.
        count: pairs; None compares the answers alone.
        results: gets the result, or why there is none.
        say: prints a line.

    Raises:
        WrongResult: the answers differ.
    """
    peer = load(key)
    case = f"{peer.name}: {question.name}, {setting.model}, batch {setting.batch}"
    described: dict[str, Any] = {
        "peer": peer.name,
        "version": peer.version(),
        "question": question.name,
        "asked": question.asked,
        "fair": question.fair,
        "model": setting.model,
        "images": setting.batch,
        "threads": setting.threads,
        "dtype": "float32",
        "device": "cpu",
    }

    def refuse(reason: str) -> None:
        say(f"{case}: not run: {reason}")
        if results is not None:
            results.write(case, {"settings": described, "not_run": reason})

    if (reason := peer.missing()) is not None:
        return refuse(reason)
    inputs = setting.inputs()
    try:
        theirs = question.theirs(inputs.copied())
    except NotPossible as failure:
        return refuse(str(failure))
    except Exception as failure:
        return refuse(f"{peer.version()} with torch {torch.__version__}: {one_line(failure)}")
    try:
        ours = question.ours(inputs.copied())
        check = question.check(ours.answer(), theirs.answer())
        require([check])
        if count is None:
            return say(f"{case}: agrees to {check.error:.1e}")
        timed = pairs(ours.timed, theirs.timed, pairs=count, warmup=1)
        comparison = Comparison(timed.seconds_a, timed.seconds_b, (check,))
        plain: dict[str, Any] = {"model": setting.model, "batch": setting.batch, "threads": setting.threads}
        target = f"{__name__}:call"
        memory = (
            peak_memory(target, peer=key, question=question.name, side="ours", **plain),
            theirs.peak()
            if theirs.peak is not None
            else peak_memory(target, peer=key, question=question.name, side="theirs", **plain),
        )
    finally:
        theirs.close()
    say(
        f"{case}: agrees to {check.error:.1e}, {comparison.ratio:.3g} times as fast, "
        f"peak {memory[0].peak_mb:.0f} against {memory[1].peak_mb:.0f} MB"
    )
    if results is not None:
        results.compared(case, comparison, a="clipfast", b=peer.name, settings=described, memory=memory)
    return None
