"""The bundled model's tokenizer: open_clip's byte-pair tokenizer with merges learnt from the captions.

The merges file is gzipped text: a header line, then one merge "left right" per line. Any text can be
encoded because every byte is a symbol; every word of the captions is one token.
"""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from open_clip.tokenizer import SimpleTokenizer

from clipfast.files import atomic_write
from clipfast.scenes.captions import words

MERGES_FILE: Final = "bpe_merges.txt.gz"
CONTEXT_LENGTH: Final = 32
_HEADER: Final = "# clipfast scenes merges 1"
_END: Final = "</w>"


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges that turn every word (ASCII, lower case) of the vocabulary into one symbol.

    This is byte-pair encoding in which every word counts once. The most frequent pair is merged first,
    ties in alphabetical order, until no pair is left.
    """
    pieces = [[*word[:-1], word[-1] + _END] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for piece in pieces:
            pairs.update(pairwise(piece))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(piece):
        if tuple(piece[position : position + 2]) == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(piece[position])
            position += 1
    return merged


def write_merges(path: Path) -> None:
    """Write the merges file for the captions' words; its bytes are reproducible."""
    lines = [_HEADER, *(" ".join(pair) for pair in learn_merges([w.strip(",") for w in words()]))]
    # no newline at the end: open_clip would read an empty merge from it
    data = "\n".join(lines).encode()
    with (
        atomic_write(path) as partial,
        partial.open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed,
    ):
        packed.write(data)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; it maps a list of texts to int64 ids [n, 32]."""
    path = folder / MERGES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no merges file {path}")
    return SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT_LENGTH)
