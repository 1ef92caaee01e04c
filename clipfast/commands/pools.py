"""Pools of texts that heads are named by: read, cut to what the model can encode, encoded."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from clipfast import descriptions
from clipfast.commands import console
from clipfast.commands.options import PoolOptions
from clipfast.commands.text_features import encode_texts
from clipfast.errors import InputError
from clipfast.model import Model

RANDOM = "random"
"""The pool of random vectors, which has no texts."""


def read_pool(pool: str) -> tuple[list[str], list[str]]:
    """Texts of a pool by name or of a file, none for random vectors; and what was noticed in the file.

    Raises:
        InputError: neither a pool nor a readable file of texts.
    """
    if pool == RANDOM:
        return [], []
    if pool in descriptions.POOLS:
        return descriptions.pool(pool), []
    if not Path(pool).exists():
        known = ", ".join([*descriptions.POOLS, RANDOM])
        raise InputError(f"--pool is {pool!r}: neither a file nor one of {known}")
    read = descriptions.read(Path(pool))
    return list(read.texts), list(read.notes)


def fitting(model: Model, texts: Sequence[str], pool: str) -> list[str]:
    """The texts of a pool without those that the model cannot read whole, of which a warning tells.

    Raises:
        InputError: none is left, or a model without a tokenizer.
    """
    long = frozenset(model.too_long(texts))
    if texts and len(long) == len(texts):
        raise InputError(f"every text of the pool {pool} is longer than this model reads")
    if long:
        first = texts[min(long)]
        console.warn(
            f"{len(long)} of {len(texts)} texts of {pool} are longer than this model reads: left out ({first!r}, …)"
        )
    return [text for position, text in enumerate(texts) if position not in long]


def pool_features(model: Model, texts: Sequence[str], pool: PoolOptions) -> Tensor:
    """Features of the texts, or as many random unit vectors as the general pool has texts."""
    if pool.pool == RANDOM:
        count = len(descriptions.pool("general"))
        return descriptions.random_features(count, model.tower.embed_dim, pool.seed).to(model.device)
    return encode_texts(model, texts)
