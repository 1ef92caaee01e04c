"""The command: ``python -m benchmarks.peers [--only NAME …] [--model NAME …] [--pairs N] [--dry-run]``.

Some packages change torch or the model when they are imported, so each runs in a process of its own.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkout import NotACheckout, validate
from benchmarks.peers import PEERS, QUESTION, SENTENCE
from benchmarks.results import FOLDER, Results
from clipfast.bench.measuring import WrongResult
from clipfast.errors import ClipfastError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=SENTENCE)
    parser.add_argument("--only", action="append", choices=PEERS, help="a package, repeatable (all)")
    parser.add_argument("--model", action="append", help="an open_clip name, repeatable (ViT-B-32 and ViT-B-16)")
    parser.add_argument("--batch", action="append", type=int, help="images, repeatable (8 and 1)")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of a comparison (7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--clip-text-span", type=Path, metavar="PATH", help="a checkout of the published code")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--dry-run", action="store_true", help="compare the answers; time and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Asks every question; returns 1 where an answer is wrong and 2 where an argument is."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in (
        ("pairs", options.pairs),
        ("threads", options.threads),
        *(("batch", b) for b in options.batch or ()),
    ):
        if value < 1:
            parser.error(f"--{name} is {value}: at least 1 is needed")
    if options.clip_text_span is not None:
        try:
            options.clip_text_span = validate(options.clip_text_span)
        except NotACheckout as failure:
            parser.error(str(failure).replace("--reference", "--clip-text-span"))
    os.environ.setdefault(
        "HF_HUB_OFFLINE", "1"
    )  # nothing is downloaded: some packages look for files by the model's name
    names = options.only or list(PEERS)
    if len(names) > 1:
        given = list(sys.argv[1:] if arguments is None else arguments)
        return max(_alone(name, given) for name in names)
    return _ask(names[0], options)


def _alone(name: str, arguments: Sequence[str]) -> int:
    """One package in a process of its own; options given later win, so ``--only`` of all is taken out."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--only":
            next(rest)
        elif not argument.startswith("--only="):
            kept.append(argument)
    return subprocess.run([sys.executable, "-m", "benchmarks.peers", *kept, "--only", name], check=False).returncode


def _ask(name: str, options: argparse.Namespace) -> int:
    from benchmarks.peers.measuring import Setting, load, measure

    results = None if options.dry_run else Results(QUESTION, SENTENCE, folder=options.out)
    code = 0
    for model in options.model or ("ViT-B-32", "ViT-B-16"):
        for batch in options.batch or (8, 1):
            setting = Setting(model, batch, options.threads, options.clip_text_span)
            for question in load(name).questions:
                try:
                    measure(name, question, setting, None if options.dry_run else options.pairs, results, _say)
                except WrongResult as failure:
                    _say(f"{name}: {model}, batch {batch}: {failure}")
                    code = 1
                except ClipfastError as failure:
                    _say(f"{name}: {failure}")
                    return 2
    return code


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
