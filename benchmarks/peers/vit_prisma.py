"""ViT-Prisma: a cache of activations of a ``HookedViT``."""

import contextlib
import io
from typing import Any

import torch

from benchmarks.peers import ours
from benchmarks.peers.conversions import to_prisma
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from benchmarks.peers.terms import Readout


def _heads(inputs: Inputs) -> Side:
    model, images = to_prisma(inputs.vision.visual), inputs.images
    count = model.cfg.n_layers
    final = f"blocks.{count - 1}.hook_resid_post"
    names = {f"blocks.{layer}.attn.hook_z" for layer in range(count)} | {final}
    attention: list[Any] = [block.attn for block in model.blocks]
    readout = Readout(
        tuple(each.W_O.detach() for each in attention),
        torch.stack([each.b_O.detach() for each in attention]),
        model.ln_final.w.detach(),
        model.ln_final.b.detach(),
        model.ln_final.eps,
        model.head.W_H.detach(),
    )

    @torch.inference_mode()
    def answer() -> Answer:
        _, cache = model.run_with_cache(images, names_filter=lambda name: name in names)
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it computes the results now
            stack = cache.stack_head_results(pos_slice=0)  # [L·H, B, W]
        results = stack.transpose(0, 1).unflatten(1, (count, -1))
        return readout.towards_embedding(results, cache[final][:, 0])

    return Side(answer)


def _patterns(inputs: Inputs) -> Side:
    model, images = to_prisma(inputs.vision.visual), inputs.images
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]

    @torch.inference_mode()
    def answer() -> Answer:
        _, cache = model.run_with_cache(images, names_filter=lambda name: name in names)
        return [cache[name] for name in names]

    return Side(answer)


PEER = Peer(
    "ViT-Prisma",
    "vit-prisma",
    "vit_prisma.models.base_vit",
    (
        Question(
            "heads' contributions",
            "every head's contribution to the embedding, [B, L, H, D]",
            "`run_with_cache` that keeps nothing but `hook_z` and the last residual stream, and "
            "`stack_head_results(pos_slice=0)`, which makes the results of all tokens first. Biases, the final norm "
            "and the projection follow by the definition: `apply_ln` leaves γ and β out and centres each term.",
            ours.heads,
            _heads,
        ),
        Question(
            "all attention patterns",
            "every row of attention in every layer and head, [B, H, N, N] per layer",
            "`run_with_cache` that keeps `hook_pattern` alone; clipfast's side is `attention_matrices` here, too.",
            ours.patterns,
            _patterns,
        ),
    ),
)
