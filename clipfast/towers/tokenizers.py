"""What is known of a tokenizer, whatever package it comes from."""

from functools import partial
from typing import Any, NamedTuple


class TokenizerFacts(NamedTuple):
    """What a tokenizer says of itself.

    Attributes:
        kind: its class.
        vocabulary: how many tokens it knows; None where it does not say.
        context: how many it gives of a text, or at most; None where it does not say.
    """

    kind: str
    vocabulary: int | None
    context: int | None


def facts_of(tokenize: Any) -> TokenizerFacts | None:
    """What is known of a function from texts to tokens; None for no function."""
    if tokenize is None:
        return None
    while isinstance(tokenize, partial) and tokenize.args:  # clipfast's own, around a package's tokenizer
        tokenize = tokenize.args[0]
    inner = getattr(tokenize, "tokenizer", None)  # of transformers, in open_clip's class or in clipfast's
    context = _number(tokenize, "context_length", "context")
    if inner is None:
        return TokenizerFacts(_name(tokenize), _number(tokenize, "vocab_size"), context)
    # its length counts added tokens, which vocab_size leaves out
    vocabulary = len(inner) if hasattr(inner, "__len__") else _number(inner, "vocab_size")
    return TokenizerFacts(_name(inner), vocabulary, context)


def _number(thing: Any, *names: str) -> int | None:
    values = (getattr(thing, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
