"""Writes the text pools from the word lists: ``python -m clipfast.descriptions.compose``.

The same word lists give the same bytes. ``words/general/<category>.toml`` is one category of the general pool, with

- ``texts``: complete descriptions;
- ``groups``: ``templates`` that take turns over the ``words`` (``"classes:mammals"`` stands for all class names of that
  kind), each word once; with ``others``, every pair of a word and an other word once.

In a template ``{}`` is the word, ``{a}`` the word with its article, ``{s}`` its plural, ``{A}`` and ``{S}`` the same
with a capital; ``{other}`` and ``{other_s}`` are the other word and its plural.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np

from clipfast.descriptions import FOLDER, INDEX, POOLS, grammar, normalised
from clipfast.errors import InputError
from clipfast.files import write_text
from clipfast.scenes.captions import phrase, prompts
from clipfast.scenes.vocabulary import ATTRIBUTES

WORDS: Final = FOLDER / "words"

Pool = dict[str, list[str]]
"""Texts by category, in order."""

_SEED: Final = 0
_TRIPLES: Final = 250
_TRIES: Final = 20


def main(arguments: list[str] | None = None) -> int:
    """The command: writes every pool and the index."""
    parser = argparse.ArgumentParser(
        prog="python -m clipfast.descriptions.compose", description="Write the text pools."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    options = parser.parse_args(arguments)
    for name, text in files().items():
        write_text(options.out / name, text)
    return 0


def files() -> dict[str, str]:
    """The contents of every file that this script writes, by name."""
    pools = {"general": general(), "classes": classes(), "common_words": common_words(), "scenes": scenes()}
    assert set(pools) == set(POOLS)
    written = {f"{name}.txt": "".join(f"{text}\n" for text in _flat(pool)) for name, pool in pools.items()}
    return written | {INDEX.name: _index(pools)}


def _flat(pool: Pool) -> list[str]:
    return [text for texts in pool.values() for text in texts]


def _index(pools: Mapping[str, Pool]) -> str:
    lines = ["# Lines per category of each pool, in the order of the file. Written by compose.py."]
    for name, pool in pools.items():
        lines += ["", f"[{name}]", *(f'"{category}" = {len(texts)}' for category, texts in pool.items())]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def _distinct(pool: Pool, name: str) -> Pool:
    """Returns the pool; raises InputError if a text occurs twice."""
    seen: dict[str, str] = {}
    for category, texts in pool.items():
        for text in texts:
            key = normalised(text)
            if key in seen:
                raise InputError(f"{name}: {text!r} occurs in {seen[key]} and again in {category}")
            seen[key] = category
    return pool


# ------------------------------------------------------------------------------------------------- general, classes


def classes() -> Pool:
    """Class names by kind; a name of several kinds is listed under the first."""
    seen: set[str] = set()
    return {kind: [name for name in names if _new(name, seen)] for kind, names in _read(WORDS / "classes.toml").items()}


def general() -> Pool:
    """Image descriptions by category.

    Raises:
        InputError: a description occurs twice.
    """
    kinds = _read(WORDS / "classes.toml")
    pool: Pool = {}
    for path in sorted((WORDS / "general").glob("*.toml")):
        content = _read(path)
        texts = list(content.get("texts", ()))
        for group in content.get("groups", ()):
            texts += _filled(group, kinds)
        pool[path.stem.replace("_", " ")] = texts
    return _distinct(pool, "general")


def _filled(group: Mapping[str, Any], kinds: Mapping[str, list[str]]) -> Iterator[str]:
    words: list[str] = []
    for word in group["words"]:
        kind = word.removeprefix("classes:")
        words += kinds[kind] if kind != word else [word]
    pairs = [(word, other) for word in words for other in group.get("others", [""])]
    for index, (word, other) in enumerate(pairs):
        yield _fill(group["templates"][index % len(group["templates"])], word, other)


def _fill(template: str, word: str, other: str) -> str:
    """A template filled with its words; the module docstring lists the fields."""
    parts = {"a": grammar.with_article(word), "s": grammar.plural(word)}
    parts |= {"A": _capital(parts["a"]), "S": _capital(parts["s"])}
    if other:
        parts |= {"other": other, "other_s": grammar.plural(other)}
    return _capital(template.format(word, **parts))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------- common words


def common_words() -> Pool:
    """English words by kind, with their regular forms; a word of several kinds is listed under the first."""
    content = _read(WORDS / "common.toml")
    seen: set[str] = set()
    pool: Pool = {}
    for kind, words in content.items():
        forms = [form for word in words for form in _forms(kind, word)]
        pool[kind] = [form for form in forms if _new(form, seen)]
    return pool


def _forms(kind: str, word: str) -> list[str]:
    if kind == "nouns":
        return [word, grammar.plural(word)]
    if kind == "regular_verbs":
        return list(grammar.verb_forms(word))
    if kind == "irregular_verbs":  # "go went gone"
        base, *pasts = word.split()
        return [base, grammar.third_person(base), *pasts, grammar.participle(base)]
    return word.split()


def _new(word: str, seen: set[str]) -> bool:
    key = normalised(word)
    return not (key in seen or seen.add(key))  # type: ignore[func-returns-value]


# ---------------------------------------------------------------------------------------------------------- scenes


def scenes() -> Pool:
    """Descriptions for the bundled model, by the one to three attributes they name (``"shape, colour"``).

    Single attributes have all wordings of the zero-shot prompts. Every possible pair of values has one wording; triples
    are a sample.
    """
    rng = np.random.default_rng(_SEED)
    seen: set[str] = set()
    pool: Pool = {
        name: [text for texts in prompts(name).values() for text in texts if _new(text, seen)] for name in ATTRIBUTES
    }
    for names in combinations(ATTRIBUTES, 2):
        values = [(first, second) for first in ATTRIBUTES[names[0]] for second in ATTRIBUTES[names[1]]]
        asserted = [dict(zip(names, pair, strict=True)) for pair in values]
        pool[", ".join(names)] = [text for pair in asserted if _possible(pair) for text in _worded(pair, rng, seen)]
    triples = list(combinations(ATTRIBUTES, 3))
    for _ in range(_TRIPLES):
        names3 = triples[int(rng.integers(len(triples)))]
        triple = {name: ATTRIBUTES[name][int(rng.integers(len(ATTRIBUTES[name])))] for name in names3}
        if _possible(triple):
            pool.setdefault(", ".join(names3), []).extend(_worded(triple, rng, seen))
    return {names: texts for names, texts in pool.items() if texts}


def _possible(asserted: Mapping[str, str]) -> bool:
    """Whether a scene can have these attributes: only a single object has a position."""
    return "position" not in asserted or asserted.get("count", "one") == "one"


def _worded(asserted: Mapping[str, str], rng: np.random.Generator, seen: set[str]) -> list[str]:
    """One new wording as a list; an empty list if no new one came up."""
    for _ in range(_TRIES):
        text = phrase(asserted, rng)
        clumsy = text.startswith(("there is ", "this is ")) and set(asserted) <= {"background", "lighting"}
        if not clumsy and _new(text, seen):  # "there is trees"
            return [text]
    return []


if __name__ == "__main__":
    sys.exit(main())
