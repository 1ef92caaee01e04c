"""Validation finds whatever is wrong with a collection, all of it, and nothing in a sound one."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from made_collections import Pictures, run, tiny_model

from clipfast import InputError, Model, Moments, storage
from clipfast.dataset import validating
from clipfast.dataset.manifest import BASIS, HEADER, MOMENTS, Manifest, Record
from clipfast.dataset.merging import MERGED
from clipfast.dataset.pieces import files
from clipfast.dataset.plan import FILES, UNITS
from clipfast.dataset.validating import validate

PICTURES = Pictures((9, 5, 7), bad=(2,), lost=(1,))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validating") / "whole"
    run(folder, model, PICTURES)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "collection")
    return tmp_path / "collection"


def unit_folder(folder: Path, unit: int) -> Path:
    return folder / "data" / Manifest(folder).record(unit).folder


def change_record(folder: Path, unit: int, change: Callable[[Record], Record]) -> None:
    manifest = Manifest(folder)
    manifest.write(change(manifest.record(unit)))


def with_files_as_they_are(folder: Path, unit: int) -> None:
    """Makes the record of a unit name the files that are there."""
    change_record(folder, unit, lambda record: replace(record, files=files(folder / "data" / record.folder)))
    (folder / MERGED).unlink(missing_ok=True)  # it is of the record before


def test_a_sound_collection(whole: Path) -> None:
    before = files(whole)
    seen: list[tuple[int, int]] = []
    assert validate(whole, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert files(whole) == before


def test_a_collection_without_arrays(model: Model, tmp_path: Path) -> None:
    run(tmp_path / "moments", model, PICTURES, {})
    assert validate(tmp_path / "moments") == []


def test_no_collection(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no collection"):
        validate(tmp_path)


def test_a_flipped_bit_is_found_wherever_it_is(folder: Path) -> None:
    generator = random.Random(3)
    names = [name for name in files(folder) if name not in (".lock", ".run", ".guard")]
    plan, unnoticed = list(Manifest(folder).plan.units()), []
    for _ in range(80):
        path = folder / generator.choice(names)
        content = path.read_bytes()
        place = generator.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :])
        try:
            findings = validate(folder)
        except InputError:
            assert path.name == HEADER
            findings = [""]
        assert not any("\n" in finding for finding in findings)
        if not findings:
            unnoticed.append(path.name)
            assert list(Manifest(folder).plan.units()) == plan  # a byte of Parquet without a meaning
        path.write_bytes(content)
    assert set(unnoticed) <= {MERGED, UNITS, FILES}  # a sum of other records is not used
    assert len(unnoticed) < 8
    assert validate(folder) == []


@pytest.mark.parametrize("change", ["cut", "gone", "other"])
@pytest.mark.slow
def test_every_file_is_checked(folder: Path, change: str) -> None:
    for name in files(folder):
        if name in (".lock", ".run", ".guard", HEADER, FILES, MERGED):
            continue
        path = folder / name
        content = path.read_bytes()
        if change == "cut":
            os.truncate(path, len(content) // 2)
        elif change == "other":
            path.write_bytes(bytes(len(content)))
        else:
            path.unlink()
        findings = validate(folder)
        assert findings, name
        own = path.name if name.startswith("units/") else name
        assert any(own in finding for finding in findings) or change == "gone", (name, findings)
        path.write_bytes(content)
    assert validate(folder) == []


def test_all_findings_are_reported(folder: Path) -> None:
    first, last = unit_folder(folder, 0), unit_folder(folder, 2)
    (first / "codes" / "c" / "0" / "0" / "0" / "0").unlink()
    os.truncate(last / "images.parquet", 100)
    (folder / "data" / "000001-00000000").mkdir()
    (folder / "data" / "000001-00000000" / "part").write_bytes(b"x" * 77)
    (folder / BASIS).unlink()
    size = Manifest(folder).record(2).files["images.parquet"][0]
    findings = validate(folder)
    assert [finding.replace(str(folder), "") for finding in findings] == [
        f"/{BASIS} is gone: collect the images again",
        f"/data/{first.name}/codes/c/0/0/0/0: it is gone",
        f"/data/{last.name}/images.parquet: it has 100 bytes, its record says {size}",
        "/data/000001-00000000: 77 bytes left over: no record names it; the next run removes it",
    ]


def test_files_that_are_left_over(folder: Path) -> None:
    (unit_folder(folder, 0) / "codes" / "c" / "9").mkdir()
    for place in (".clipfast-1.part", "units/notes", f"data/{unit_folder(folder, 0).name}/codes/c/9/0", "data/file"):
        (folder / place).write_bytes(b"12345")
    found = sorted(finding.replace(str(folder), "") for finding in validate(folder))
    assert found == [
        "/.clipfast-1.part: 5 bytes left over: no part of the collection",
        f"/data/{unit_folder(folder, 0).name}/codes/c/9/0: 5 bytes left over: no record names it",
        "/data/file: 5 bytes left over: no record names it; the next run removes it",
        "/units/notes: 5 bytes left over: no record",
    ]


def test_units_that_are_missing_or_damaged(folder: Path) -> None:
    (folder / "units" / "000000.json").unlink()
    (folder / "units" / "000007.json").write_text("{}")
    path = folder / "units" / "000002.json"
    path.write_text(path.read_text().replace("0", "1", 1))
    damaged, beyond, missing, leftover = validate(folder)
    assert damaged.endswith(
        "000002.json is damaged or was edited: its checksum does not match; `clipfast collection retry "
        f"{folder}` computes the unit again"
    )
    assert beyond.endswith("000007.json: the plan has 3 units")
    assert missing.endswith("1 of 3 units have no record (0): run the command that began the pass to finish it")
    assert "data/000000-" in leftover


def test_counts_that_do_not_fit(folder: Path) -> None:
    change_record(folder, 2, lambda record: replace(record, statuses={"ok": 3, "missing": 3, "decode_error": 1}))
    [finding] = validate(folder)
    assert finding.endswith(
        "images.parquet: it counts 2 decode_error, 2 missing, 3 ok, its record 1 decode_error, 3 missing, 3 ok"
    )
    change_record(folder, 2, lambda record: replace(record, statuses={"ok": 4, "missing": 3}))
    counted, rows, arrays, moments = validate(folder)
    assert counted.endswith("its record 3 missing, 4 ok")
    assert rows.endswith("images.parquet: the rows of its images are not 0 to 3")
    assert "is damaged: ValueError: shape (3, " in arrays
    assert moments.endswith("moments.safetensors holds 3 images, its record counts 4: it is damaged")


def test_arrays_that_do_not_fit(folder: Path) -> None:
    unit = unit_folder(folder, 0)
    shutil.rmtree(unit / "terms")
    with_files_as_they_are(folder, 0)
    [finding] = validate(folder)
    assert finding == f"{unit}: it has no terms, which the collection keeps"


def test_an_array_of_another_dtype(folder: Path, model: Model, tmp_path: Path) -> None:
    run(tmp_path / "half", model, PICTURES, {"codes": "float16"})
    unit = unit_folder(folder, 0)
    shutil.rmtree(unit / "codes")
    shutil.copytree(unit_folder(tmp_path / "half", 0) / "codes", unit / "codes")
    with_files_as_they_are(folder, 0)
    assert validate(folder) == [f"{unit / 'codes'}: it is float16, not float32"]


def test_an_array_that_is_not_kept(folder: Path, model: Model, tmp_path: Path) -> None:
    run(tmp_path / "less", model, PICTURES, {"codes": "float32"})
    unit = unit_folder(tmp_path / "less", 2)
    shutil.copytree(unit_folder(folder, 2) / "embeddings", unit / "embeddings")
    with_files_as_they_are(tmp_path / "less", 2)
    assert validate(tmp_path / "less") == [f"{unit / 'embeddings'}: the collection keeps no embeddings"]


def test_a_shard_that_no_record_names(folder: Path) -> None:
    unit = unit_folder(folder, 0)
    name = "codes/c/0/0/0/0"
    change_record(
        folder,
        0,
        lambda record: replace(record, files={file: own for file, own in record.files.items() if file != name}),
    )
    (folder / MERGED).unlink()
    assert validate(folder) == [
        f"{unit / 'codes'}: it has 0 shards, not 1",
        f"{unit / name}: {(unit / name).stat().st_size} bytes left over: no record names it",
    ]


def test_moments_that_are_not_the_sum(folder: Path) -> None:
    """The file is whole, and of the right records, but its numbers are others."""
    moments = Moments.load(folder / MOMENTS)
    moments.merge(moments)
    moments.save(folder / MOMENTS)
    content = json.loads((folder / MERGED).read_text())
    assert [finding for finding in validate(folder) if "it is not the file that was written" in finding]
    content["moments"] = storage.file_checksum(folder / MOMENTS)
    (folder / MERGED).write_text(json.dumps(content))
    [finding] = validate(folder)
    assert finding == f"{folder / MOMENTS}: it is not the sum of the units' moments: remove it, and it is made again"


def test_moments_of_other_records_are_not_compared(folder: Path) -> None:
    content = json.loads((folder / MERGED).read_text())
    (folder / MERGED).write_text(json.dumps(content | {"records": "of others"}))
    (folder / MOMENTS).write_bytes(b"")
    assert validate(folder) == []


def test_a_plan_that_is_not_the_one_of_the_pass(folder: Path, model: Model, tmp_path: Path) -> None:
    run(tmp_path / "other", model, Pictures((9, 6, 6), bad=(2,), lost=(1,)), {})
    shutil.copy(tmp_path / "other" / UNITS, folder / UNITS)
    [finding] = validate(folder)
    assert finding.endswith(f"{UNITS} or {FILES} is damaged: they are not what the pass was planned with")


def test_names_that_several_images_have(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one", model, Pictures((3, 2, 4), shared="the same"), {})
    assert validate(tmp_path / "one") == ["the same: 3 images have this name, in units 0, 1, 2"]
    monkeypatch.setattr(validating, "_SHOWN", 0)
    assert validate(tmp_path / "one") == [f"{tmp_path / 'one'}: 1 more names that several images have"]


# --------------------------------------------------------------------------------------------------------- inputs


@pytest.fixture
def shard(folder: Path, tmp_path: Path) -> Path:
    """The file that unit 0 was read from."""
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"bytes" * 1000)
    source = {"path": str(shard), "size": 5000, "checksum": xxhash.xxh3_128_hexdigest(shard.read_bytes())}
    change_record(folder, 0, lambda record: replace(record, source=source))
    change_record(folder, 2, lambda record: replace(record, source={"path": "", "checksum": None} | stamp(shard)))
    change_record(folder, 1, lambda record: replace(record, source=source))
    return shard


def stamp(path: Path) -> dict[str, object]:
    return {"path": str(path), "size": path.stat().st_size, "version": str(path.stat().st_mtime_ns)}


def test_shards_are_read_again(folder: Path, shard: Path) -> None:
    assert validate(folder, inputs=True) == []
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    content[2500] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert validate(folder) == []
    assert validate(folder, inputs=True) == [
        f"{shard}: it has changed since unit {unit} was collected: its checksum is another" for unit in (0, 1)
    ]
    os.utime(shard, ns=(0, 0))
    assert f"{shard}: it has changed since unit 2 was collected" in validate(folder, inputs=True)
    shard.unlink()
    assert validate(folder, inputs=True) == [
        f"{shard}: no such file",
        f"{shard}: no such file",
        f"{shard}: it is gone or cannot be read",
    ]


def test_files_are_looked_at_again(whole: Path) -> None:
    findings = validate(whole, inputs=True)  # the pictures were drawn: there are no such files
    assert findings[0] == (
        "unit 0: 8 of its files have changed or are gone (/pictures/1.png, /pictures/2.png, /pictures/3.png, …)"
    )
    assert len(findings) == 3
