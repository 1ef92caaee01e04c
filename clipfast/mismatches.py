"""Parts of a model that do not belong together, where that can be known: each is said in one line.

A model with another activation, other pixel values or another tokenizer than it was trained with gives numbers without
an error. What is not known for certain is not said.
"""

import warnings
from collections.abc import Callable
from typing import Any, cast

from PIL import Image
from torch import Tensor, nn

from clipfast.summary import Normalisation, normalisation
from clipfast.towers.tokenizers import TokenizerFacts, facts_of
from clipfast.towers.tower import Tower

_ROUNDED = 1.05
"""Text encoders have rows for a rounded number of tokens, or none for some special ones."""
_OPENAI = "openai/clip-vit-"
"""Repositories on the Hugging Face hub whose models were trained with QuickGELU and heads of 64."""
_NEAR = 1e-3


def warn(found: list[str]) -> None:
    """Warns about each in one line, at the place that calls ``clipfast.load`` or ``clipfast.wrap``."""
    for line in found:
        warnings.warn(line, UserWarning, stacklevel=3)


def mismatches(
    module: nn.Module,
    tower: Tower,
    *,
    name: str,
    preprocess: Callable[[Image.Image], Tensor],
    tokenize: object,
    trained: Normalisation | None = None,
) -> list[str]:
    """What does not belong together in a model, in one line each.

    Args:
        module: the model.
        tower: its tower.
        name: of the model.
        preprocess: PIL image → ``[3, height, width]``.
        tokenize: its function from texts to tokens; None for none.
        trained: the mean and standard deviation of the images that its weights were trained with, where they are known.
    """
    found = [_of_texts(module, name, tokenize), _of_openai(module, tower)]
    if trained is not None:
        found.append(_of_images(name, normalisation(preprocess, tower.image_size), trained))
    return [line for line in found if line is not None]


def _of_images(name: str, used: Normalisation | None, trained: Normalisation) -> str | None:
    if used is None:
        return None
    pairs = zip((*used.mean, *used.std), (*trained.mean, *trained.std), strict=True)
    if all(abs(one - other) <= _NEAR for one, other in pairs):
        return None
    return f"{name} was trained on images of {_words(trained)}, and its preprocessing gives {_words(used)}"


def _words(values: Normalisation) -> str:
    mean, std = ("/".join(f"{value:.3g}" for value in each) for each in (values.mean, values.std))
    return f"mean {mean} and standard deviation {std}"


def _of_texts(module: nn.Module, name: str, tokenize: object) -> str | None:
    """A tokenizer of another vocabulary, or another length of texts, than the text encoder's."""
    facts, (rows, context) = facts_of(tokenize), _text_encoder(module)
    if facts is None:
        return None
    advice = "pass tokenize= of the model's own"
    if rows is not None and _differ(facts, rows):
        return f"{facts.kind} knows {facts.vocabulary} tokens, and the text encoder of {name} {rows}: {advice}"
    if context is not None and facts.context is not None and facts.context != context:
        return f"{facts.kind} gives {facts.context} tokens per text, and {name} reads {context}: {advice}"
    return None


def _differ(facts: TokenizerFacts, rows: int) -> bool:
    """Whether a tokenizer is not the one of a text encoder with embeddings of that many tokens.

    A text encoder may have more than its tokenizer knows, for tokens to come; CLIP's own has not.
    """
    if facts.vocabulary is None:
        return False
    is_too_small = facts.kind == "SimpleTokenizer" and rows > _ROUNDED * facts.vocabulary
    return is_too_small or facts.vocabulary > _ROUNDED * rows


def _text_encoder(module: Any) -> tuple[int | None, int | None]:
    """How many tokens a text encoder has embeddings of, and how many it reads; None where it does not say."""
    config = getattr(getattr(module, "config", None), "text_config", None)
    if config is not None:  # of transformers
        rows, context = config.vocab_size, config.max_position_embeddings
    else:
        text = getattr(module, "text", module)
        rows, context = getattr(text, "vocab_size", None), getattr(text, "context_length", None)
    return rows if isinstance(rows, int) else None, context if isinstance(context, int) else None


def _of_openai(module: nn.Module, tower: Tower) -> str | None:
    """Settings of a model from OpenAI's repositories that are not those it was trained with."""
    source = str(getattr(module, "name_or_path", "") or "")
    if not source.startswith(_OPENAI) or not tower.blocks:
        return None
    wrong = []
    if tower.activation != "quick_gelu":
        wrong.append(f"QuickGELU, and its config says {tower.activation}")
    if tower.head_dim != 64:
        wrong.append(f"heads of 64, and its config says {tower.head_dim}")
    return f"{source} was trained with {'; '.join(wrong)}" if wrong else None


def known(values: object) -> Normalisation | None:
    """The mean and standard deviation in a package's description of weights; None where it does not say."""
    if not isinstance(values, dict) or "mean" not in values or "std" not in values:
        return None
    mean, std = (tuple(map(float, cast(Any, values[key]))) for key in ("mean", "std"))
    return Normalisation(mean, std)
