"""Reading images for commands: batches in the order of the files, and failures in that order."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commandline import picture, write_bad, write_good

import clipfast
from clipfast.commands.reading import reading
from clipfast.dataset.files import Source, find_images
from clipfast.errors import ClipfastError


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return clipfast.load("scenes")


def test_batches_leave_out_unreadable_images_and_report_them_in_order(tmp_path: Path, model: clipfast.Model) -> None:
    write_good(tmp_path)
    bad = write_bad(tmp_path)
    for number in range(10):
        picture(number, 30 + number, 60 - number).save(tmp_path / f"z{number}.jpg")
    sources, _, _ = find_images([tmp_path])
    failed: list[tuple[str, str]] = []

    def fail(source: Source, error: ClipfastError) -> None:
        failed.append((source.path.name, str(error)))

    with reading(model, sources, lambda source: source, 3, fail) as batches:
        for number, batch in enumerate(batches):
            files = sources[3 * number : 3 * number + 3]
            assert batch.items == [source for source in files if source.path.name not in bad]
            assert batch.failed == len(files) - len(batch.items)
            assert [name for name, _ in failed] == [
                source.path.name for source in sources[: 3 * number + 3] if source.path.name in bad
            ]
            pictures = [source.open() for source in batch.items]
            assert batch.sizes == [image.size for image in pictures]
            if pictures:
                assert torch.equal(batch.pixels, torch.stack([model.preprocess(image) for image in pictures]))
    assert number == 6
    for name, message in failed:
        assert message.startswith(str(tmp_path / name))
        assert bad[name] in message


def test_an_interrupt_stops_reading(tmp_path: Path, model: clipfast.Model) -> None:
    picture().save(tmp_path / "a.png")
    source = find_images([tmp_path / "a.png"])[0][0]
    started = 0

    def counted(_: int) -> Source:
        nonlocal started
        started += 1
        return source

    def interrupted() -> None:
        with reading(model, range(1000), counted, 4, print) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started <= 8  # the batch in use, and the next
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipfast-reading")]
