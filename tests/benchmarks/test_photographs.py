"""The image files of the pipeline benchmark, and the open_clip loop that it compares with."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import clipfast
from benchmarks import cases, photographs
from clipfast.bench.inputs import module


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return photographs.draw(tmp_path_factory.mktemp("photographs"), 5)


def test_files_are_reproducible_jpegs_of_a_photographs_size(paths: list[Path], tmp_path: Path) -> None:
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", photographs.SIZE)
        assert 50_000 < path.stat().st_size < 150_000
    assert [path.read_bytes() for path in photographs.draw(tmp_path, 2)] == [path.read_bytes() for path in paths[:2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_loop_agrees_in_pixels_and_embeddings(paths: list[Path], workers: int) -> None:
    clip = module("scenes")
    model = clipfast.wrap(clip)
    loop = photographs.Loop(clip, paths, 2, workers)
    batches = list(model.batches(paths, 2))
    assert [len(batch) for batch in loop.batches] == [2, 2, 1]
    assert torch.equal(torch.cat(list(loop.batches)), torch.cat(batches))
    embeddings = torch.cat([model.decompose(batch).embedding for batch in batches])
    assert cases.difference(cases.unit(embeddings), cases.unit(loop())) <= cases.BOUND


def test_fastest_number_of_workers_is_chosen(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {0: 3.0, 1: 1.0, 2: 2.0}
    monkeypatch.setattr(photographs, "seconds", lambda loop: times[loop.batches.num_workers])
    loop, chosen = photographs.best_loop(module("scenes"), paths, 2)
    assert loop.batches.num_workers == chosen["num_workers"] == 1
    assert chosen["seconds_by_workers"] == {"0": 3.0, "1": 1.0, "2": 2.0}


def test_decoding_returns_core_seconds(paths: list[Path]) -> None:
    assert 0 < photographs.decoding(clipfast.load("scenes"), paths, rounds=1) < 5.0
