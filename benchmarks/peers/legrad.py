"""LeGrad's own package: heat maps of an image for several prompts."""

import contextlib
import io
from functools import partial
from importlib.metadata import version
from typing import cast

import torch
from torch import Tensor

import clipfast
from benchmarks import cases
from benchmarks.peers.question import PROMPTS, Answer, Inputs, NotPossible, Peer, Question, Side
from clipfast.compat.legrad import LeWrapper


def _ours(inputs: Inputs, first: int) -> Side:
    wrapped = LeWrapper(clipfast.wrap(inputs.vision.visual), layer_index=first)
    image = inputs.images[:1]
    return Side(lambda: wrapped.compute_legrad_clip(inputs.texts, image)[0])


def _theirs(inputs: Inputs, first: int) -> Side:
    import legrad

    image = inputs.images[:1]
    with torch.no_grad():
        expected = inputs.vision.encode_image(image)
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it activates
        wrapped = legrad.LeWrapper(inputs.vision, layer_index=first)
    with torch.no_grad():
        error = cases.relative(wrapped.encode_image(image), expected)
    if not error <= cases.BOUND:
        raise NotPossible(
            f"with open_clip {version('open_clip_torch')} the wrapped model's embedding is wrong by {error:.2g} of its "
            "largest number: the layers that are not replaced attend over the batch"
        )

    def answer() -> Answer:
        maps = cast(Tensor, wrapped.compute_legrad(inputs.texts, image=image))  # [1, T, height, width]
        return maps[0].detach()

    return Side(answer)


PEER = Peer(
    "LeGrad",
    "legrad_torch",
    "legrad",
    (
        Question(
            f"heat maps for {PROMPTS} prompts",
            "LeGrad's heat maps of the first image, [T, height, width] from 0 to 1, over all layers",
            "`LeWrapper(model, layer_index=0)` repeats the image once per prompt; clipfast's prompts share a forward.",
            partial(_ours, first=0),
            partial(_theirs, first=0),
        ),
        Question(
            f"heat maps for {PROMPTS} prompts, last two layers",
            "the same over the last two layers, which is the package's default",
            "`LeWrapper(model)`.",
            partial(_ours, first=-2),
            partial(_theirs, first=-2),
        ),
    ),
)
