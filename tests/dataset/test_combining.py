"""Merging parts of a pass, and passes over different images: the bits of one pass, or a refusal that says why."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from made import EVERYTHING, Made, contents, small_model

import clipfast
from clipfast.dataset import combining
from clipfast.dataset.collecting import Silent, collect
from clipfast.dataset.combining import merge, part_folder
from clipfast.dataset.duplicates import names_in_both
from clipfast.dataset.manifest import BASIS, HEADER, MOMENTS, Manifest, locked
from clipfast.dataset.plan import FILES, UNITS, Unit
from clipfast.dataset.samples import Sample
from clipfast.dataset.validating import validate
from clipfast.errors import InputError


@dataclass
class Others(Made):
    """Images of other names."""

    name: str = "others"

    def units(self, size: int) -> Iterator[Unit]:
        for unit in super().units(size):
            yield replace(unit, path=self.name)

    def read(self, unit: Unit) -> Iterator[Sample]:
        for sample in super().read(unit):
            yield replace(sample, id=f"{self.name} {sample.id}")


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return small_model()


@pytest.fixture(scope="module")
def whole(model: clipfast.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    collect([Made()], folder, model, EVERYTHING)
    return folder


Pass = Callable[..., Path]


@pytest.fixture
def passes(model: clipfast.Model) -> Pass:
    def run(folder: Path, *inputs: Any, **options: Any) -> Path:
        collect(inputs or [Made()], folder, model, replace(EVERYTHING, **options))
        return folder

    return run


def parts(passes: Pass, out: Path, count: int, *only: int) -> list[Path]:
    """Parts of a pass, as the jobs of an array collect them."""
    return [passes(part_folder(out, index, count), shard=(index, count)) for index in only or range(count)]


def assert_same(have: Path, expected: Path) -> None:
    assert contents(have) == contents(expected)
    for name in (HEADER, UNITS, FILES, BASIS, MOMENTS):
        assert (have / name).read_bytes() == (expected / name).read_bytes(), name
    assert validate(have) == []


def test_parts_of_an_array_become_what_one_pass_gives(passes: Pass, whole: Path, tmp_path: Path) -> None:
    made = parts(passes, tmp_path, 3)
    assert [path.relative_to(tmp_path).as_posix() for path in made] == [f"parts/{n:04}-of-0003" for n in range(3)]
    told = []
    done = merge([], tmp_path, advance=lambda *numbers: told.append(numbers))
    assert (done.folder, done.parts, done.units, done.images, done.copied) == (tmp_path, tuple(made), 5, 16, 5)
    assert told == [(number, 5) for number in range(1, 6)]
    assert_same(tmp_path, whole)
    again = merge([], tmp_path)
    assert (again.units, again.copied) == (5, 0)
    shutil.rmtree(tmp_path / "parts")
    assert_same(tmp_path, whole)


def test_named_parts_with_units_in_common(passes: Pass, whole: Path, tmp_path: Path) -> None:
    one, two = passes(tmp_path / "one", shard=(1, 2)), passes(tmp_path / "two")
    merge([one, two], tmp_path / "out")
    assert_same(tmp_path / "out", whole)


def test_what_is_missing_or_not_finished_is_named(
    passes: Pass, whole: Path, model: clipfast.Model, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"/parts holds no parts: collect them with --num-shards and --shard-index"):
        merge([], tmp_path)
    parts(passes, tmp_path, 4, 1, 3)
    with pytest.raises(InputError, match=r"/parts: parts 0, 2 of 4 are missing$"):
        merge([], tmp_path)
    parts(passes, tmp_path, 4, 2)
    with pytest.raises(InputError, match=r"/parts: part 0 of 4 is missing$"):
        merge([], tmp_path)
    stopped = part_folder(tmp_path, 0, 4)
    with pytest.raises(KeyboardInterrupt):  # it has units 0 and 4
        collect([Made()], stopped, model, replace(EVERYTHING, shard=(0, 4)), events=Stops(1))
    with pytest.raises(
        InputError, match=r"^not finished: .*/parts/0000-of-0004 lacks 1 of its units; run these passes"
    ):
        merge([], tmp_path)
    assert not (tmp_path / HEADER).exists()
    parts(passes, tmp_path, 4, 0)
    merge([], tmp_path)
    assert_same(tmp_path, whole)
    parts(passes, tmp_path, 2, 0)
    with pytest.raises(InputError, match=r"/parts holds parts of 2 and of 4: remove those that do not count"):
        merge([], tmp_path)
    named = [part_folder(tmp_path, index, 4) for index in (0, 1)]
    with pytest.raises(InputError, match=r"^not finished: .*0000-of-0004, .*0001-of-0004: units 2, 3 are missing; run"):
        merge(named, tmp_path / "out")


class Stops(Silent):
    """Ends a pass after some units."""

    def __init__(self, units: int) -> None:
        self.left = units

    def finished(self, outcome: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_merge_goes_on_where_it_was_stopped(
    passes: Pass, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts(passes, tmp_path, 2)
    write = Manifest.write

    def stop(manifest: Manifest, record: Any) -> None:
        if record.unit == 2:
            raise KeyboardInterrupt
        write(manifest, record)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            merge([], tmp_path)
    manifest = Manifest(tmp_path)
    assert manifest.finished() == {0, 1}
    manifest.new_folder(2)  # what a kill would have left
    assert merge([], tmp_path).copied == 3
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("links", [True, False])
def test_files_are_linked_or_copied(
    links: bool, passes: Pass, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts(passes, tmp_path, 2)
    if not links:
        monkeypatch.setattr(os, "link", _cannot_link)
    merge([], tmp_path)
    assert_same(tmp_path, whole)
    manifest = Manifest(tmp_path)
    paths = [manifest.data / record.folder / name for record in manifest.records() for name in record.files]
    assert {path.stat().st_nlink for path in paths} == {2 if links else 1}


def _cannot_link(*_: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.slow
def test_damage_of_a_part_is_found(
    damage: str, links: bool, passes: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Manifest(parts(passes, tmp_path, 2)[1])
    if not links:
        monkeypatch.setattr(os, "link", _cannot_link)
    path = part.data / part.record(3).folder / MOMENTS
    content = path.read_bytes()
    match damage:
        case "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            path.write_bytes(content[:-1])
        case "gone":
            path.unlink()
    with pytest.raises(InputError, match=rf"{MOMENTS} (is|has|holds) .*"):
        merge([], tmp_path)
    path.write_bytes(content)
    if damage == "changed" and links:  # it was noticed when the moments were summed: the file is the same
        assert merge([], tmp_path).copied == 0
    else:
        assert merge([], tmp_path).copied == 2
    assert validate(tmp_path) == []


def test_parts_that_do_not_fit_are_refused_with_every_reason(passes: Pass, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    collect([Made()], other, small_model(seed=4), replace(EVERYTHING, batch_size=2, shard=(1, 2)))
    first, second = parts(passes, tmp_path, 2, 0)[0], passes(tmp_path / "kept", kept={"codes": "float16"})
    with pytest.raises(InputError) as caught:
        merge([first, other, second], tmp_path / "out")
    for reason in (str(other), "batch size", "other weights", str(second), "kept codes", "kept terms"):
        assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_units_with_other_results_are_refused(passes: Pass, tmp_path: Path) -> None:
    one = passes(tmp_path / "one")
    two = passes(tmp_path / "two", Made(bad=frozenset({1})), shard=(0, 2))
    with pytest.raises(InputError, match=r"^unit 0 has other results in .*/two than in .*/one: the files were others"):
        merge([one, two], tmp_path / "out")
    merge([one], tmp_path / "out")
    with pytest.raises(InputError, match=r"^unit 0 has other results in .*/third than in .*/out: "):
        merge([passes(tmp_path / "third", Made(bad=frozenset({1})))], tmp_path / "out")


def test_folders_that_are_in_use_or_hold_something_else(passes: Pass, whole: Path, tmp_path: Path) -> None:
    [part] = parts(passes, tmp_path / "c", 1)
    with locked(part), pytest.raises(InputError, match="0000-of-0001 is being written by another process"):
        merge([], tmp_path / "c")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "moments.safetensors").write_bytes(b"results")
    with pytest.raises(InputError, match="holds results of another command"):
        merge([part], tmp_path / "results")
    other = passes(tmp_path / "other", Others())
    with pytest.raises(InputError, match=r"/other holds a pass over other images"):
        merge([part], other)
    with pytest.raises(InputError, match=r"/other cannot be merged into itself"):
        merge([part, other], other)
    with pytest.raises(InputError, match=r"/empty is no collection"):
        merge([tmp_path / "empty"], tmp_path / "out")


def test_a_damaged_plan_is_found(passes: Pass, tmp_path: Path) -> None:
    one, two = passes(tmp_path / "one"), passes(tmp_path / "two", Others())
    shutil.copy(two / UNITS, one / UNITS)
    shutil.copy(two / FILES, one / FILES)
    with pytest.raises(InputError, match="not what the pass was planned with"):
        merge([one], tmp_path / "out")


# ------------------------------------------------------------------------------------------------ different plans


def test_different_images_one_behind_the_other(passes: Pass, tmp_path: Path) -> None:
    """As one pass over all of them gives, in parts or not."""
    expected = passes(tmp_path / "expected", Made(), Others(10, frozenset()), Others(6, name="last"))
    others = passes(tmp_path / "others", Others(10, frozenset()), Others(6, name="last"))
    done = merge([*parts(passes, tmp_path / "c", 2), others], tmp_path / "out")
    assert (done.units, done.images, done.copied, done.duplicates) == (5 + 3 + 2, 16 + 10 + 5, 10, ())
    assert_same(tmp_path / "out", expected)
    assert passes(tmp_path / "out", Made(), Others(10, frozenset()), Others(6, name="last"))  # it can go on
    assert merge([*(tmp_path / "c" / "parts").iterdir(), others][::-1], tmp_path / "turned").units == 10


def test_names_that_occur_twice(passes: Pass, model: clipfast.Model, tmp_path: Path) -> None:
    one, two = passes(tmp_path / "one"), passes(tmp_path / "two", Made(6, frozenset()), Others(3))
    with pytest.raises(InputError) as caught:
        merge([one, two], tmp_path / "out")
    assert str(caught.value) == (
        "several of these collections have images of the same name (image 0, image 1, image 2, …): leave one of them "
        "out, or allow duplicates"
    )
    assert not (tmp_path / "out").exists()
    done = merge([one, two], tmp_path / "out", duplicates="report")
    assert done.duplicates == tuple(f"image {number}" for number in range(6))
    assert done.images == 16 + 6 + 3
    first, second = ([(Manifest(folder), unit) for unit in Manifest(folder).finished()] for folder in (one, two))
    assert list(names_in_both(first, second)) == list(done.duplicates)
    assert list(names_in_both(first[2:], second)) == []


def test_settings_of_different_images_have_to_fit(passes: Pass, tmp_path: Path) -> None:
    one, two = passes(tmp_path / "one"), passes(tmp_path / "two", Others(), unit_size=3, batch_size=2)
    with pytest.raises(
        InputError, match=r"do not fit to .*/one: .*/two holds .*batch size 2, not 3.*unit size 3, not 4"
    ):
        merge([one, two], tmp_path / "out")


def test_names_of_parts(tmp_path: Path) -> None:
    assert part_folder(tmp_path, 3, 16) == tmp_path / "parts" / "0003-of-0016"
    assert combining._PART.fullmatch(part_folder(tmp_path, 12345, 20000).name)
    for index in (-1, 16):
        with pytest.raises(InputError, match=rf"^part {index} of 16 does not exist: the parts are 0 to 15$"):
            part_folder(tmp_path, index, 16)
