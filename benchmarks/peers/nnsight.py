"""nnsight: a trace that saves what every output projection reads."""

import torch

from benchmarks.peers import ours
from benchmarks.peers.conversions import to_transformers
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from benchmarks.peers.transformers import readout_of


def _heads(inputs: Inputs) -> Side:
    import nnsight

    module = to_transformers(inputs.vision.visual)
    readout = readout_of(module)
    model = nnsight.NNsight(module)
    layers = model.vision_model.encoder.layers

    @torch.no_grad()
    def answer() -> Answer:
        with model.trace(pixel_values=inputs.images):
            mixed = nnsight.save([layer.self_attn.out_proj.input[:, 0] for layer in layers])
            last = nnsight.save(model.vision_model.post_layernorm.input)
        return readout.heads(mixed, last)

    return Side(answer)


PEER = Peer(
    "nnsight",
    "nnsight",
    "nnsight",
    (
        Question(
            "heads' contributions",
            "every head's contribution to the embedding, [B, L, H, D]",
            "One trace of transformers' model that saves the class token's input of every output projection, then the "
            "definition written out.",
            ours.heads,
            _heads,
        ),
    ),
)
