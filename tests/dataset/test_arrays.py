"""What is kept per image of a unit: the numbers come back, chunk by chunk, and damage is never a number."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zarr
from builders import clip_model, pixels

from clipfast import Contributions, InputError, Model, NotKept, wrap
from clipfast.dataset import arrays, pieces
from clipfast.dataset.arrays import ARRAYS, ArrayWriter, UnitArrays, files, rows_of
from clipfast.dataset.manifest import Record
from clipfast.dataset.samples import Status

EVERYTHING = {"codes": "float16", "class_codes": "float32", "terms": "float16", "embeddings": "float32"}
SMALL = {"CHUNK_BYTES": 7 * 16 * 2, "ALIGNED": 4}
"""Chunks of four images of float16 codes."""


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


@pytest.fixture(scope="module")
def batches(model: Model) -> list[Contributions]:
    images = [pixels(model.module.visual, size, seed=seed) for seed, size in enumerate((5, 1, 8, 9))]
    return [model.decompose(batch, class_token=True) for batch in images]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards of several chunks for a few images."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", SMALL["CHUNK_BYTES"])
    monkeypatch.setattr(arrays, "ALIGNED", SMALL["ALIGNED"])
    for name, kind in ARRAYS.items():
        monkeypatch.setitem(ARRAYS, name, replace(kind, shard_bytes=1024))  # type: ignore[index]


def write(folder: Path, batches: list[Contributions], kept: dict[str, Any] = EVERYTHING) -> Record:
    folder.mkdir(parents=True)
    writer = ArrayWriter(folder, kept)
    for batch in batches:
        writer.add(batch)
    writer.finish()
    count = sum(map(len, batches))
    return Record(0, folder.name, {Status.OK: count}, files(folder))


def expected(batches: list[Contributions], kept: dict[str, Any] = EVERYTHING) -> dict[str, np.ndarray]:
    tensors = {
        "codes": [batch.codes for batch in batches],
        "class_codes": [batch.class_codes for batch in batches],
        "terms": [torch.cat([batch.start[:, None], batch.mlps, batch.rest[:, None]], 1) for batch in batches],
        "embeddings": [batch.embedding for batch in batches],
    }
    return {name: torch.cat(tensors[name]).numpy().astype(dtype) for name, dtype in kept.items()}


def test_numbers_come_back_from_several_shards(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    record = write(tmp_path / "unit", batches)
    assert sum(name.startswith("codes/c/") for name in record.files) > 2
    unit = UnitArrays(tmp_path / "unit", record)
    assert unit.names == tuple(ARRAYS)
    for name, values in expected(batches).items():
        read = unit.read(name)
        assert (read.dtype, unit.shape(name)) == (values.dtype, values.shape)
        assert read.tobytes() == values.tobytes()


def test_numbers_come_back_from_one_shard(tmp_path: Path, batches: list[Contributions]) -> None:
    record = write(tmp_path / "unit", batches)
    unit = UnitArrays(tmp_path / "unit", record)
    for name, values in expected(batches).items():
        assert unit.read(name).tobytes() == values.tobytes()


def test_numbers_of_double_precision_keep_their_bits(tmp_path: Path) -> None:
    model = wrap(clip_model().double())
    batch = model.decompose(pixels(model.module.visual, 4, dtype=torch.float64))
    record = write(tmp_path / "unit", [batch], dict.fromkeys(("codes", "terms", "embeddings"), "float64"))
    assert (UnitArrays(tmp_path / "unit", record).read("codes") == batch.codes.numpy()).all()
    assert UnitArrays(tmp_path / "unit", record).dtype("codes") == np.float64


def test_parts_are_chosen_by_name(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    unit = UnitArrays(tmp_path / "unit", write(tmp_path / "unit", batches))
    values = expected(batches)
    codes, terms = values["codes"], values["terms"]
    assert unit.labels("codes") == {"layer": [0, 1], "head": [0, 1]}
    assert (unit.read("codes", layers=[1], heads=[0]) == codes[:, 1:, :1]).all()
    assert (unit.read("codes", [20, 3, 4], heads=[1, 0]) == codes[[20, 3, 4]][:, :, ::-1]).all()
    assert (unit.read("codes", slice(17, 2, -3)) == codes[17:2:-3]).all()
    assert (unit.read("codes", slice(-3, None)) == codes[-3:]).all()
    assert unit.read("codes", slice(5, 5)).shape == (0, *codes.shape[1:])
    assert unit.labels("terms") == {"term": ["start", "L0.mlp", "L1.mlp", "rest"]}
    assert (unit.read("terms", terms=["L1.mlp", "start"]) == terms[:, [2, 0]]).all()


def test_layers_are_those_of_the_model(tmp_path: Path, model: Model) -> None:
    batch = model.decompose(pixels(model.module.visual, 3), layers=[1])
    unit = UnitArrays(tmp_path / "unit", write(tmp_path / "unit", [batch], {"codes": "float32"}))
    assert (unit.read("codes", layers=[1]) == batch.codes.numpy()).all()
    with pytest.raises(InputError, match="layer 0 is not there: choose from 1"):
        unit.read("codes", layers=[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("codes", {"layers": [2]}, "layer 2 is not there: choose from 0, 1"),
        ("codes", {"layers": [-1]}, "layer -1: give layers from 0"),
        ("codes", {"heads": [7]}, "head 7 is not there: choose from 0, 1"),
        ("codes", {"terms": ["rest"]}, "codes have no axis 'term': theirs are image, layer, head, dim"),
        ("terms", {"layers": [0]}, "terms have no axis 'layer'"),
        ("terms", {"terms": ["L9.mlp"]}, "term 'L9.mlp' is not there: choose from start, L0.mlp"),
        ("embeddings", {"rows": [23]}, "23 is outside an axis of embeddings: it has 23"),
    ],
)
def test_parts_that_are_not_there(
    tmp_path: Path, batches: list[Contributions], name: str, options: dict[str, Any], message: str
) -> None:
    unit = UnitArrays(tmp_path / "unit", write(tmp_path / "unit", batches))
    with pytest.raises(InputError, match=message):
        unit.read(name, **options)


def test_what_was_not_kept(tmp_path: Path, batches: list[Contributions]) -> None:
    unit = UnitArrays(tmp_path / "unit", write(tmp_path / "unit", batches, {"codes": "float16", "terms": None}))
    assert unit.names == ("codes",)
    with pytest.raises(NotKept, match="has no terms: they were not kept"):
        unit.read("terms")


def test_a_unit_without_images(tmp_path: Path) -> None:
    record = write(tmp_path / "unit", [])
    assert list(record.files) == ["zarr.json"]
    assert UnitArrays(tmp_path / "unit", record).names == ()


@pytest.mark.parametrize(
    ("kept", "message"),
    [({"heads": "float16"}, "'heads' cannot be kept: choose"), ({"codes": "int8"}, "codes cannot be kept as 'int8'")],
)
def test_options_that_do_not_exist(tmp_path: Path, kept: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ArrayWriter(tmp_path, kept)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (7e4, "float16"),
        (-65520.0, "float16"),
        (math.inf, "float16"),
        (math.nan, "float16"),
        (-math.inf, "float32"),
        (math.nan, "float64"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(
    tmp_path: Path, batches: list[Contributions], value: float, kept: str
) -> None:
    codes = batches[0].codes.clone()
    codes[2, 1, 0, 3] = value
    batch = batches[0]._with({"codes": codes})
    writer = ArrayWriter(tmp_path, {"embeddings": "float32", "codes": kept})
    advice = ": keep codes in float32" if kept == "float16" else "$"
    with pytest.raises(InputError, match=rf"codes from \S+ to \S+ do not fit {kept}{advice}"):
        writer.add(batch)
    writer.add(batches[1])  # nothing of the batch was taken
    writer.finish()
    unit = UnitArrays(tmp_path, Record(0, "", {Status.OK: 1}, files(tmp_path)))
    assert unit.shape("embeddings")[0] == unit.shape("codes")[0] == 1


@pytest.mark.parametrize("value", [65519.0, -65519.0])
def test_the_largest_number_of_float16(tmp_path: Path, batches: list[Contributions], value: float) -> None:
    codes = batches[1].codes.clone()
    codes[0, 1, 0, 3] = value
    record = write(tmp_path / "unit", [batches[1]._with({"codes": codes})], {"codes": "float16"})
    assert abs(UnitArrays(tmp_path / "unit", record).read("codes")[0, 1, 0, 3]) == 65504


def test_the_bytes_do_not_depend_on_the_run(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    first, second = (write(tmp_path / name, batches) for name in ("first", "second"))
    assert first.files == second.files


def test_any_zarr_reader_reads_it(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    write(tmp_path / "unit", batches)
    group: Any = zarr.open_group(tmp_path / "unit", mode="r")
    for name, values in expected(batches).items():
        assert (group[name][:] == values).all()
        assert group[name].metadata.dimension_names == ARRAYS[name].dims
        assert group[name].attrs["units"] == "1"


def test_a_chunk_is_of_one_head_and_128_kib() -> None:
    assert rows_of((24, 16, 64), 2, 48 << 20) == (1024, 1024)  # ViT-L
    assert rows_of((12, 12, 64), 2, 48 << 20) == (1024, 2048)  # ViT-B
    assert rows_of((32, 16, 80), 4, 48 << 20) == (256, 256)  # ViT-H, float32
    assert rows_of((27, 16, 1152), 4, 48 << 20) == (25, 25)
    assert rows_of((10, 10, 1 << 20), 4, 48 << 20) == (1, 1)
    for shape in ((24, 16, 64), (27, 16, 1152), (40, 16, 88)):
        chunk, shard = rows_of(shape, 2, 48 << 20)
        assert shard * math.prod(shape) * 2 <= 48 << 20
        assert chunk * shape[-1] * 2 <= 128 << 10


def test_a_small_unit_is_not_padded(tmp_path: Path, batches: list[Contributions]) -> None:
    record = write(tmp_path / "unit", batches, {"codes": "float32"})
    [size] = [size for name, (size, _) in record.files.items() if "/c/" in name]
    assert size <= 1.1 * expected(batches, {"codes": "float32"})["codes"].nbytes


def random_codes(batch: Contributions, shape: tuple[int, ...]) -> Contributions:
    """A batch with codes of random bits, which are finite and cannot be compressed."""
    images = shape[0]
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    tensors = {"embedding": batch.embedding[:1].expand(images, -1), "codes": (bits & ~(1 << 30)).view(torch.float32)}
    return replace(batch, embedding=tensors["embedding"], codes=tensors["codes"])


def test_one_head_costs_its_share_of_bytes(tmp_path: Path, batches: list[Contributions]) -> None:
    layers, heads, images = 4, 3, 5000
    batch = random_codes(batches[0], (images, layers, heads, 64))
    record = write(tmp_path / "unit", [batch], {"codes": "float32"})
    whole = sum(size for name, (size, _) in record.files.items() if "/c/" in name)
    assert whole == pytest.approx(batch.codes.nbytes, rel=0.05)
    unit = UnitArrays(tmp_path / "unit", record)
    read = unit.at("codes", [slice(None), [2], [1], slice(None)])
    assert (read[:, 0, 0] == batch.codes[:, 2, 1].numpy()).all()
    assert unit.bytes_read == pytest.approx(whole / (layers * heads), rel=0.02)


# --------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def unit(small: None, tmp_path: Path, batches: list[Contributions]) -> tuple[Path, Record]:
    folder = tmp_path / "data" / "unit"
    return folder, write(folder, batches)


def is_reported(folder: Path, record: Record, values: dict[str, np.ndarray]) -> bool:
    """Whether reading says that something is damaged; fails where a number is wrong or the message is of no use."""
    reported = False
    for name, everything in values.items():
        parts = (
            ([], [slice(None), [1]]) if name in ("codes", "class_codes") else ([], [[2]]) if name == "terms" else ([],)
        )
        for part in parts:
            for rows in (slice(None), [0, 9, 22], slice(20, 23)):
                places = [rows, *part, *[slice(None)] * (everything.ndim - 1 - len(part))]
                right = everything[rows][(slice(None), *part)]
                try:
                    read = UnitArrays(folder, record).at(name, places)
                except InputError as error:
                    message, reported = str(error), True
                    assert message.startswith(str(folder))
                    assert "clipfast collection validate" in message
                    assert "clipfast collection retry" in message
                    assert "\n" not in message
                else:
                    assert read.tobytes() == np.ascontiguousarray(right).tobytes()
    return reported


def test_a_flipped_bit_is_reported_or_harmless(unit: tuple[Path, Record], batches: list[Contributions]) -> None:
    folder, record = unit
    values = expected(batches)
    assert not is_reported(folder, record, values)
    generator = random.Random(17)
    harmless = []
    for _ in range(200):
        name = generator.choice(sorted(record.files))
        content = (folder / name).read_bytes()
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        (folder / name).write_bytes(flipped(content, place, bit))
        own = [name.partition("/")[0]] if "/" in name else list(values)
        if not is_reported(folder, record, {array: values[array] for array in own}):
            harmless.append(name)
        (folder / name).write_bytes(content)
    assert set(harmless) == {"zarr.json"}  # of the group, in which there is nothing to read


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_every_byte_of_a_shard_is_checked(unit: tuple[Path, Record], batches: list[Contributions]) -> None:
    folder, record = unit
    name = "codes/c/0/0/0/0"
    content = (folder / name).read_bytes()
    for place in range(0, len(content), 7):
        (folder / name).write_bytes(flipped(content, place, place % 8))
        with pytest.raises(InputError, match=r"codes/c/0/0/0/0 is damaged: its checksum is not that of the record"):
            UnitArrays(folder, record).at("codes", [slice(0, 8), *[slice(None)] * 3])
        with pytest.raises(InputError, match=r"codes/c/0/0/0/0 is damaged: bytes \d+ to \d+ are not those"):
            _ = [UnitArrays(folder, record).read("codes", slice(0, 8), heads=[head]) for head in range(2)]


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "gone", "folder", "another unit's"])
@pytest.mark.slow
def test_files_that_are_not_whole(unit: tuple[Path, Record], batches: list[Contributions], change: str) -> None:
    folder, record = unit
    values = expected(batches)
    other = folder.with_name("other")
    write(other, batches[::-1])
    for name in sorted(set(record.files) - {"zarr.json"}):
        path = folder / name
        content = path.read_bytes()
        if change == "cut":
            path.write_bytes(content[: len(content) - 1 - len(content) // 3])
        elif change == "longer":
            path.write_bytes(content + b"\0")
        elif change == "empty":
            path.write_bytes(b"")
        elif change == "another unit's":
            path.write_bytes((other / name).read_bytes())
        else:
            path.unlink()
            if change == "folder":
                path.mkdir()
        assert is_reported(folder, record, values), name
        if change == "folder":
            path.rmdir()
        path.write_bytes(content)
    assert not is_reported(folder, record, values)


def test_swapped_shards_of_equal_size_are_noticed(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    """Their indexes are the same, and the crc32c of every chunk is right."""
    batch = random_codes(batches[0], (16, 2, 2, 16))
    folder = tmp_path / "unit"
    record = write(folder, [batch], {"codes": "float32"})
    first, second = (folder / f"codes/c/{number}/0/0/0" for number in range(2))
    assert first.stat().st_size == second.stat().st_size
    contents = first.read_bytes(), second.read_bytes()
    assert contents[0] != contents[1]
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    for heads in (None, [1]):
        with pytest.raises(InputError, match=r"codes/c/[01]/0/0/0 is damaged"):
            UnitArrays(folder, record).read("codes", heads=heads)


def test_the_record_of_another_unit(small: None, tmp_path: Path, batches: list[Contributions]) -> None:
    record = write(tmp_path / "unit", batches)
    wrong = replace(record, statuses={Status.OK: 22})
    with pytest.raises(InputError, match=r"codes is damaged: ValueError: shape \(23, 2, 2, 16\) for 22 images"):
        UnitArrays(tmp_path / "unit", wrong).read("codes")


def test_a_file_that_the_disk_does_not_give(unit: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, record = unit
    reader = UnitArrays(folder, record)
    reader.shape("codes")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pieces, "open", fail, raising=False)
    with pytest.raises(InputError, match=r"codes/c/\d/0/0/0 cannot be read: Input/output error"):
        reader.read("codes", heads=[0])


def test_checksums_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "c").write_bytes(b"")
    found = files(tmp_path)
    assert list(found) == ["a/b", "c"]
    assert found == {
        "a/b": (3_000_000, xxhash.xxh3_128_hexdigest(b"x" * 3_000_000)),
        "c": (0, xxhash.xxh3_128_hexdigest(b"")),
    }
