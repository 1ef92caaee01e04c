"""Which kind of input a file is, by the ending of its name."""

from typing import Literal

import fsspec.utils

from clipfast.images import SUFFIXES

Ending = Literal["image", "shard", "table", "list"]

TABLES = (".parquet", ".arrow", ".feather", ".ipc")
LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")
_SHORT = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
"""Short for ``.tar.gz`` and so on."""
_ALWAYS = ("gz", "bz2", "xz", "lzma", "zst")
"""Endings of compressed files that can be read without further packages."""


def uncompressed(name: str) -> str:
    """A name in lower case without the ending of a compression that fsspec knows, and without a URL's query."""
    name = name.lower()
    if "://" in name:
        name = name.partition("?")[0].partition("#")[0]
    stem, _, last = name.rpartition(".")
    return stem if stem and last in {*fsspec.utils.compressions, *_ALWAYS} else name


def kind_of(name: str) -> Ending | None:
    """The kind of a file, None where its ending is none that is known."""
    plain = uncompressed(name)
    if plain.endswith((".tar", *_SHORT)):
        return "shard"
    if plain.endswith(TABLES):
        return "table"
    if plain.endswith(LISTS):
        return "list"
    name = name.lower().partition("?")[0] if "://" in name else name.lower()
    dot = name.rfind(".")
    return "image" if dot >= 0 and name[dot:] in SUFFIXES and "/" not in name[dot:] else None
