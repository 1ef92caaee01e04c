"""Collections on disk: every interruption leaves one to go on with, and changes of its files are noticed."""

import json
import os
import random
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from builders import clip_model, pixels

from clipfast import Contributions, InputError, Model, Moments, wrap
from clipfast.dataset import collection as reading
from clipfast.dataset import store, writing
from clipfast.dataset.collection import Collection, Entry, Header, refuse_collection
from clipfast.dataset.writing import CollectionWriter, Failure
from clipfast.files import write_text

SETTINGS = {"model": "tiny", "weights": "abc", "images": "def"}
NAMES = ("a\u2028b", "c\x85d", "e\nf", "g\udcff", "h\ud800", "i")
BATCHES = 4


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


@pytest.fixture(scope="module")
def batches(model: Model) -> list[tuple[list[Entry], Contributions]]:
    made = []
    for number in range(BATCHES):
        entries = [Entry(f"{number}/{name}", f"{number}-{place}", f"/{name}") for place, name in enumerate(NAMES)]
        images = pixels(model.module.visual, len(NAMES), seed=number)
        made.append((entries, model.decompose(images, class_token=True)))
    return made


@pytest.fixture
def one_file_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MAX_BYTES", 1)


def opened(folder: Path, settings: dict[str, Any] = SETTINGS, keep: bool = True) -> CollectionWriter:
    return CollectionWriter(folder, settings, keep, Moments())


def go_on(folder: Path, batches: list[tuple[list[Entry], Contributions]], complete: bool = True) -> None:
    with opened(folder) as writer:
        for number in range(writer.position, len(batches)):
            writer.add(*batches[number], position=number + 1)
            if writer.is_due:
                writer.flush(complete=False)
        writer.flush(complete=complete)


def contents(folder: Path) -> tuple[list[Entry], dict[str, torch.Tensor], list[torch.Tensor]]:
    collection = Collection(folder)
    codes = [contributions.codes for _, contributions in collection.batches()]
    entries = [replace(entry, shard=None, row=0) for entry in collection.entries]  # files may be divided otherwise
    return entries, collection.moments._sums, [torch.cat(codes)]


def assert_same(have: Path, expected: Path) -> None:
    """To the bit."""
    old, new = contents(expected), contents(have)
    assert new[0] == old[0]
    assert new[1].keys() == old[1].keys()
    assert all(torch.equal(new[1][name], old[1][name]) for name in old[1])
    assert torch.equal(new[2][0], old[2][0])


@pytest.fixture(scope="module")
def whole(batches: list[tuple[list[Entry], Contributions]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    go_on(folder, batches)
    return folder


def test_a_collection_is_read_as_it_was_written(whole: Path, batches: list[tuple[list[Entry], Contributions]]) -> None:
    """Names with line separators and undecodable bytes too."""
    entries, sums, codes = contents(whole)
    assert entries == [entry for some, _ in batches for entry in some]
    moments = Moments()
    for _, contributions in batches:
        moments.update(contributions)
    assert all(torch.equal(sums[name], tensor) for name, tensor in moments._sums.items())
    assert torch.equal(codes[0], torch.cat([contributions.codes for _, contributions in batches]))
    names = sorted(path.name for path in whole.iterdir())
    assert names == [
        ".lock",
        "collection.json",
        "contributions-00000.safetensors",
        "images.jsonl",
        "moments-00001.safetensors",
    ]


# ------------------------------------------------------------------------------------------------- interruptions

TRACED = ("dataset/writing.py", "dataset/store.py", "analyses/moments.py", "clipfast/storage.py", "clipfast/files.py")


class InterruptAt:
    """Raises KeyboardInterrupt at a certain line that runs, as a signal can; counts lines before it."""

    def __init__(self, line: int) -> None:
        self.line, self.lines = line, 0

    def __call__(self, frame: FrameType, event: str, _: object) -> "InterruptAt | None":
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted_pass(folder: Path, batches: list[tuple[list[Entry], Contributions]], line: int) -> bool:
    """A pass that is interrupted at a line of its second batch or of the flush after it; then saves, if it can."""
    with opened(folder) as writer:
        writer.add(*batches[0], position=1)
        writer.flush(complete=False)
        tracer = InterruptAt(line)
        before = sys.gettrace()
        try:
            sys.settrace(tracer)
            try:
                writer.add(*batches[1], position=2)
                writer.flush(complete=False)
            finally:
                sys.settrace(before)
        except KeyboardInterrupt:
            if line // 2 % 2:  # else the process ends without
                writer.flush(complete=False)
            return True
    return False


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interruption_at_any_line_loses_nothing(
    step: int, whole: Path, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    """Of adding a batch and of writing it: reading works afterwards, and going on gives the same bits."""
    line = random.Random(step).randrange(step)
    while True:
        line += step
        folder = tmp_path / str(line)
        folder.mkdir()
        if not interrupted_pass(folder, batches, line):
            break
        state = Collection(folder, unfinished=True)
        assert len(state.entries) == state.moments.count == sum(len(some) for some, _ in state.batches())
        go_on(folder, batches)
        assert_same(folder, whole)
        assert len(list(folder.glob("moments-*"))) == 1
        shutil.rmtree(folder)
    assert line > 100


@pytest.mark.parametrize("limit", [100, 700, 3000, 10_000])
def test_a_full_disk_loses_nothing(
    limit: int, whole: Path, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    """The limit on a file's size acts as a full disk: the write fails in the middle. The flush is tried twice."""
    with opened(tmp_path) as writer:
        writer.add(*batches[0], position=1)
        writer.flush(complete=False)
        writer.add(*batches[1], position=2)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            for _ in range(2):
                with pytest.raises(OSError, match=str(tmp_path)):
                    writer.flush(complete=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        state = Collection(tmp_path, unfinished=True)
        assert (state.moments.count, state.complete) == (len(NAMES), False)
    go_on(tmp_path, batches)
    assert_same(tmp_path, whole)


def test_a_batch_that_does_not_fit_changes_nothing(
    model: Model, whole: Path, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    """Neither one with values that are not finite, nor one of which the class token was not kept."""
    entries, contributions = batches[1]
    broken = contributions.clone()
    broken.codes[0, 0, 0, 0] = float("nan")
    with opened(tmp_path) as writer:
        writer.add(*batches[0], position=1)
        for unfit in (broken, model.decompose(pixels(model.module.visual, len(NAMES)))):
            with pytest.raises(InputError):
                writer.add(entries, unfit, position=2)
            assert (len(writer.entries), writer.moments.count, writer.position) == (len(NAMES), len(NAMES), 1)
        writer.flush(complete=False)
    go_on(tmp_path, batches)
    assert_same(tmp_path, whole)


def test_leftovers_of_a_killed_writer_are_removed(
    whole: Path, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "c")
    ours = ("contributions-00007.safetensors", "moments-00009.safetensors", f".clipfast-{'0' * 16}.part")
    theirs = ("contributions.safetensors", "notes-00001.safetensors", ".clipfast-mine.part", "stats.json")
    for name in (*ours, *theirs):
        (folder / name).write_text("left")
    with (folder / "images.jsonl").open("a") as file:
        file.write('{"file": "half')
    go_on(folder, batches)
    assert_same(folder, whole)
    assert not [name for name in ours if (folder / name).exists()]
    assert all((folder / name).exists() for name in theirs)


# ------------------------------------------------------------------------------------------------- what is refused


def test_another_writer_is_refused(batches: list[tuple[list[Entry], Contributions]], tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.add(*batches[0])
        with pytest.raises(InputError, match="is being written by another process"):
            opened(tmp_path)
        writer.flush(complete=True)
    with opened(tmp_path):
        pass


def test_an_exception_releases_the_lock(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with pytest.raises(InputError, match="holds images collected with model"):
        opened(tmp_path, SETTINGS | {"model": "other"})
    with opened(tmp_path):
        pass


def test_every_setting_that_differs_is_named(whole: Path) -> None:
    with pytest.raises(InputError) as raised:
        CollectionWriter(
            whole, {"model": "large", "weights": "x", "images": "def"}, True, Moments(), {"weights": "other weights"}
        )
    assert str(raised.value) == (
        f"{whole} holds images collected with model 'tiny', not 'large'; other weights: give another folder"
    )


def test_results_of_another_command_are_not_overwritten(
    batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    batches[0][1].save(tmp_path / "contributions-00000.safetensors")
    before = (tmp_path / "contributions-00000.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds results of another command"):
        opened(tmp_path)
    assert (tmp_path / "contributions-00000.safetensors").read_bytes() == before


def test_unfinished_collections_are_read_on_request_only(
    batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    with opened(tmp_path, SETTINGS | {"sources": 24}):
        pass
    with pytest.raises(InputError, match="was stopped before any image"):
        Collection(tmp_path, unfinished=True)
    with opened(tmp_path, SETTINGS | {"sources": 24}) as writer:
        writer.add(*batches[0])
        writer.flush(complete=False)
    with pytest.raises(InputError, match="an unfinished pass with 6 of 24 images: run the command that began it once"):
        Collection(tmp_path)
    assert not Collection(tmp_path, unfinished=True).complete


def test_refuse_collection(whole: Path, tmp_path: Path) -> None:
    refuse_collection(tmp_path)
    with pytest.raises(InputError, match="holds a collection, and results here would overwrite it"):
        refuse_collection(whole)


@pytest.fixture
def divided(one_file_per_batch: None, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path) -> Path:
    """A collection with a file of contributions per batch."""
    folder = tmp_path / "divided"
    folder.mkdir()
    go_on(folder, batches)
    assert len(list(folder.glob("contributions-*"))) == BATCHES
    return folder


def read_everything(folder: Path) -> None:
    list(Collection(folder).batches())


def test_swapped_files_are_noticed(divided: Path) -> None:
    first, second = (divided / f"contributions-0000{number}.safetensors" for number in (1, 2))
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    with pytest.raises(InputError, match=r"contributions-00001.safetensors is not the file that this pass wrote"):
        read_everything(divided)


def test_swapped_rows_and_rows_of_another_pass_are_noticed(divided: Path) -> None:
    path = divided / "contributions-00001.safetensors"
    contributions = Contributions.load(path)
    contributions.select([1, 0, *range(2, len(contributions))]).save(path)
    with pytest.raises(InputError, match=r"contributions-00001.safetensors is not the file that this pass wrote"):
        read_everything(divided)
    contributions.save(path)
    read_everything(divided)


def test_moments_of_another_pass_are_noticed(
    divided: Path, batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    (path,) = divided.glob("moments-*")
    moments = Moments()
    for _, contributions in reversed(batches):
        moments.update(contributions)
    moments.save(path)
    with pytest.raises(InputError, match=r"moments-0000.* is not the file that this pass wrote"):
        read_everything(divided)
    path.unlink()
    with pytest.raises(InputError, match=r"moments-0000.* is gone"):
        read_everything(divided)


@pytest.mark.parametrize("name", [reading.HEADER, reading.IMAGES])
def test_edited_lists_are_noticed(name: str, divided: Path) -> None:
    path = divided / name
    text = path.read_text()
    for old, new in (('"file": "contributions-00001', '"file": "contributions-00002'), ("true", "false"), ("0", "1")):
        edited = text.replace(old, new, 1)
        if edited != text:
            path.write_text(edited)
            with pytest.raises(InputError, match=f"{name} is damaged or was edited"):
                read_everything(divided)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=f"{name} is damaged"):
        read_everything(divided)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        read_everything(divided)
    path.write_text(text)
    read_everything(divided)


def test_counts_that_differ_are_noticed(divided: Path) -> None:
    """Behind a checksum that matches, as no damage would leave it."""
    header = Header.read(divided)
    for changed in (replace(header, count=header.count - 1), replace(header, count=header.count + 1)):
        write_text(divided / reading.HEADER, changed.to_json())
        with pytest.raises(InputError, match=r"holds 24 images, collection.json counts 2[35]"):
            read_everything(divided)


def test_planted_links_are_not_followed(batches: list[tuple[list[Entry], Contributions]], tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "c"
    for name in (reading.IMAGES, writing.LOCK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        victim.write_text("precious")
        (folder / name).symlink_to(victim)
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            go_on(folder, batches)
        assert victim.read_text() == "precious"


def test_failures_are_listed_until_the_image_is_read(
    batches: list[tuple[list[Entry], Contributions]], tmp_path: Path
) -> None:
    entries, contributions = batches[0]
    failure = Failure.of(entries[0], "unreadable")
    with opened(tmp_path) as writer:
        writer.add(entries[1:], contributions.select(range(1, len(entries))), [failure], position=6)
        writer.add([], None, [failure])
        writer.flush(complete=True)
    assert [failed["file"] for failed in Collection(tmp_path).header["failed"]] == [entries[0].file]
    with opened(tmp_path) as writer:
        assert writer.failed == [failure]
        writer.add(entries[:1], contributions.select([0]))
        writer.flush(complete=True)
    assert Collection(tmp_path).header["failed"] == []
    assert len(Collection(tmp_path).entries) == len(entries)


def test_lines_are_ascii_and_end_with_a_newline_alone(whole: Path) -> None:
    lines = (whole / reading.IMAGES).read_bytes().decode("ascii").split("\n")
    assert lines.pop() == ""
    assert [os.path.basename(json.loads(line)["file"]) for line in lines] == [*NAMES] * BATCHES
