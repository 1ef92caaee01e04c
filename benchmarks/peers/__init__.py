"""clipfast beside other packages: the same questions, weights and images; correctness, then time and memory.

``python -m benchmarks.peers`` runs whichever packages are installed; none is a dependency. One file per package has a
``PEER`` (:class:`benchmarks.peers.question.Peer`) with what it is asked.
"""

from benchmarks.peers.page import summary, tables

__all__ = ["PEERS", "QUESTION", "SENTENCE", "summary", "tables"]

QUESTION = "peers"
SENTENCE = "How do other packages answer the same questions, and at what cost?"
PEERS = {
    "clip-text-span": "clip_text_span",
    "transformers": "transformers",
    "vit-prisma": "vit_prisma",
    "transformer-lens": "transformer_lens",
    "legrad": "legrad",
    "captum": "captum",
    "grad-cam": "grad_cam",
    "nnsight": "nnsight",
}
"""Name on the command line → module of this package."""
