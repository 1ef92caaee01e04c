"""The other side of the pipeline benchmark: the files, and the loop that open_clip's users write."""

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


def test_files_are_jpegs_as_a_camera_leaves_them(paths: list[Path], tmp_path: Path) -> None:
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", photographs.SIZE)
        assert 50_000 < path.stat().st_size < 150_000
    assert [path.read_bytes() for path in photographs.draw(tmp_path, 2)] == [path.read_bytes() for path in paths[:2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loop_sees_the_same_pixels_and_embeds_them_alike(paths: list[Path], workers: int) -> None:
    built = module("scenes")
    model = clipfast.wrap(built)
    loop = photographs.Loop(built, paths, 2, workers)
    batches = list(model.batches(paths, 2))
    assert [len(batch) for batch in loop.batches] == [2, 2, 1]
    assert torch.equal(torch.cat(list(loop.batches)), torch.cat(batches))
    found = torch.cat([model.decompose(batch).embedding for batch in batches])
    assert cases.difference(cases.unit(found), cases.unit(loop())) <= cases.BOUND


def test_the_fastest_number_of_workers_is_taken(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    took = {0: 3.0, 1: 1.0, 2: 2.0}
    monkeypatch.setattr(photographs, "seconds", lambda loop: took[loop.batches.num_workers])
    loop, chosen = photographs.best_loop(module("scenes"), paths, 2)
    assert loop.batches.num_workers == chosen["num_workers"] == 1
    assert chosen["seconds_by_workers"] == {"0": 3.0, "1": 1.0, "2": 2.0}


def test_decoding_is_counted_in_time_of_one_core(paths: list[Path]) -> None:
    assert 0 < photographs.decoding(clipfast.load("scenes"), paths, rounds=1) < 5.0
