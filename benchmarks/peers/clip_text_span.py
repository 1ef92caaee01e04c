"""The published code, in a process of its own: needs ``--clip-text-span PATH``, see :mod:`benchmarks.reference`."""

import tempfile
from functools import partial
from pathlib import Path

import torch

import clipfast
from benchmarks import cases
from benchmarks.bench_reference import BOUND
from benchmarks.peers import ours
from benchmarks.peers.question import Inputs, NotPossible, Peer, Question, Side
from benchmarks.reference import Reference, ReferenceFailed
from clipfast.bench.memory import Peak


def _theirs(inputs: Inputs, spatial: bool) -> Side:
    if inputs.checkout is None:
        raise NotPossible("no checkout of the published code: give --clip-text-span PATH")
    folder = tempfile.TemporaryDirectory()
    visual = inputs.vision.visual
    try:
        process = Reference(
            inputs.checkout,
            inputs.name,
            visual,
            inputs.images,
            spatial=spatial,
            threads=inputs.threads,
            folder=Path(folder.name),
        )
    except ReferenceFailed as failure:
        folder.cleanup()
        raise NotPossible(str(failure)) from failure

    def peak() -> Peak:
        reported = process.peak()
        return Peak(reported["loaded_mb"], reported["peak_mb"], "in its own process")

    def close() -> None:
        process.__exit__(None, None, None)
        folder.cleanup()

    return Side(lambda: process.result().attentions, process.run, peak, close)


def _tokens(inputs: Inputs) -> Side:
    model = clipfast.wrap(inputs.vision.visual)

    def answer() -> torch.Tensor:
        return cases.all_tokens(model, inputs.images)[1]

    return Side(answer)


PEER = Peer(
    "clip_text_span",
    "",
    "",
    (
        Question(
            "heads' contributions",
            "every head's contribution to the embedding, [B, L, H, D]",
            '`attn_method="head_no_spatial"` of the checkout, with the same weights in its own copy of open_clip.',
            ours.heads,
            partial(_theirs, spatial=False),
            bound=BOUND,
        ),
        Question(
            "tokens' contributions",
            "every token's contribution through every head, [B, L, N, H, D]",
            '`attn_method="head"` of the checkout, with the same weights in its own copy of open_clip.',
            _tokens,
            partial(_theirs, spatial=True),
            bound=BOUND,
        ),
    ),
)
