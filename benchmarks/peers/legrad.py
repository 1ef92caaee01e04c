"""LeGrad's own package: heat maps of an image for several prompts."""

import contextlib
import io
from typing import cast

from torch import Tensor

import clipfast
from benchmarks.peers.ours import heat
from benchmarks.peers.question import PROMPTS, Answer, Inputs, Peer, Question, Side
from clipfast.analyses.relevance import legrad


def _ours(inputs: Inputs) -> Side:
    tower = clipfast.wrap(inputs.vision.visual).tower
    images = inputs.images[:1].expand(len(inputs.texts), -1, -1, -1)
    return Side(lambda: heat(legrad(tower, images, inputs.texts), tower.image_size))


def _theirs(inputs: Inputs) -> Side:
    from legrad import LeWrapper

    with contextlib.redirect_stdout(io.StringIO()):  # it says what it activates
        wrapped = LeWrapper(inputs.vision, layer_index=0)
    image = inputs.images[:1]

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
            "`LeWrapper(model, layer_index=0)`. Its default, the last two layers alone, is wrong with open_clip 3: the "
            "layers that it does not replace then attend over the batch. Both repeat the image once per prompt.",
            _ours,
            _theirs,
        ),
    ),
)
