"""Damaged result files: every flipped bit is noticed or changes nothing, with one kind of error."""

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import clip_model, pixels
from safetensors import safe_open
from safetensors.torch import save_file

from clipfast import Contributions, InputError, Moments, storage, wrap
from clipfast.analyses.retrieval import Index

FLIPS = 300


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model = wrap(clip_model())
    contributions = model.decompose(pixels(model.module.visual), texts=["a", "b"], maps="summed", class_token=True)
    contributions.save(folder / "contributions")
    moments = Moments(model)
    moments.update(contributions)
    moments.save(folder / "moments")
    index = Index([(0, 0), (1, 1)])
    index.add(contributions, ["x", "\udcff", "z"][: len(contributions)])
    index.save(folder / "index")
    return folder


LOADERS: dict[str, Callable[[Path], object]] = {
    "contributions": Contributions.load,
    "moments": Moments.load,
    "index": Index.load,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_flipped_bits_are_noticed(kind: str, files: Path, tmp_path: Path) -> None:
    """Half of the flips are in the header, where names, types and shapes are. What still loads saves the same bytes."""
    data = (files / kind).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(5)
    places = [*range(8), *rng.sample(range(8, header), FLIPS // 2), *rng.sample(range(header, len(data)), FLIPS // 2)]
    noticed = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "file"
        path.write_bytes(damaged)
        try:
            loaded = LOADERS[kind](path)
        except InputError:
            noticed += 1
        else:
            loaded.save(tmp_path / "again")  # type: ignore[attr-defined]
            assert (tmp_path / "again").read_bytes() == data, f"byte {place} of {kind}"
    assert noticed > 0.95 * len(places)


@pytest.mark.parametrize("kind", LOADERS)
def test_truncated_files_are_noticed(kind: str, files: Path, tmp_path: Path) -> None:
    data = (files / kind).read_bytes()
    for size in (0, 1, 7, 8, 9, 200, len(data) // 2, len(data) - 1):
        (tmp_path / "file").write_bytes(data[:size])
        with pytest.raises(InputError, match="is damaged"):
            LOADERS[kind](tmp_path / "file")


@pytest.mark.parametrize(
    "header",
    ["", "{", "null", "[" * 100_000, "[]", '"text"', "{}", '{"format": 1}', '{"format": "KIND", "checksums": 1}'],
    ids=lambda header: header[:12] or "empty",
)
@pytest.mark.parametrize("kind", LOADERS)
def test_headers_that_do_not_fit(kind: str, header: str, files: Path, tmp_path: Path) -> None:
    """Also behind a checksum that matches, as no damage would leave it."""
    with safe_open(files / kind, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = json.loads(file.metadata()["clipfast"][32:])
    text = header.replace("KIND", written["format"])
    for entry in (text, storage.checksum(text.encode()) + text):
        save_file(tensors, tmp_path / "file", metadata={"clipfast": entry})
        with pytest.raises(InputError, match=r"is damaged|not one that|older version"):
            LOADERS[kind](tmp_path / "file")


@pytest.mark.parametrize("kind", LOADERS)
def test_entries_that_are_missing(kind: str, files: Path, tmp_path: Path) -> None:
    with safe_open(files / kind, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = json.loads(file.metadata()["clipfast"][32:])
    del written["checksums"]
    for name in written:
        header = {key: value for key, value in written.items() if key != name}
        storage.write(tmp_path / "file", header, tensors)
        with pytest.raises(InputError, match="not one that" if name == "format" else "is damaged"):
            LOADERS[kind](tmp_path / "file")


def test_files_without_checksums_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"format": "clipfast.contributions/1", "layers": [0]})
    save_file({"codes": torch.ones(2)}, tmp_path / "old", metadata={"clipfast": header})
    with pytest.raises(InputError, match="written by an older version of clipfast, without checksums"):
        Contributions.load(tmp_path / "old")


def test_the_checksum_of_a_file_is_that_of_its_contents(files: Path, tmp_path: Path) -> None:
    loaded = Contributions.load(files / "contributions")
    loaded.save(tmp_path / "again")
    assert storage.file_checksum(tmp_path / "again") == storage.file_checksum(files / "contributions")
    assert storage.file_checksum(files / "moments") != storage.file_checksum(files / "contributions")
    loaded.codes[0, 0, 0, 0] += 1
    loaded.save(tmp_path / "again")
    assert storage.file_checksum(tmp_path / "again") != storage.file_checksum(files / "contributions")


def test_shapes_and_dtypes_are_part_of_the_checksum(tmp_path: Path) -> None:
    checksums = set()
    for tensor in (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.int32)):
        storage.write(tmp_path / "file", {"format": "x"}, {"a": tensor})
        checksums.add(storage.file_checksum(tmp_path / "file"))
    assert len(checksums) == 4


def test_a_save_that_fails_leaves_the_old_file(files: Path, tmp_path: Path) -> None:
    """The limit on a file's size acts as a full disk does."""
    path = tmp_path / "moments"
    moments = Moments.load(files / "moments")
    moments.save(path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="moments"):
            moments.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["moments"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="fifo is not a regular file"):
        Contributions.load(tmp_path / "fifo")
