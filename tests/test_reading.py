"""Reading images ahead: the bits of open_clip's own preprocessing, the order of batches, threads and errors."""

import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from builders import ROOT, clip_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, ToTensor

from clipfast import ImageError, InputError, Model, forward, preprocessing, reading, wrap
from clipfast.images import decode_image, open_image
from clipfast.preprocessing import Prepare, Transform
from clipfast.reading import computing, prepared, read_ahead

WAIT = 30.0  # seconds that a test waits for a thread
SIZES = ((224, 224), (640, 480), (479, 641), (1, 1), (3, 500), (333, 100), (224, 300), (1200, 225))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------- the same bits


CONFIGS = (
    PreprocessCfg(),
    PreprocessCfg(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    PreprocessCfg(size=(96, 64), mean=(0.1, 0.2, 0.3), std=(0.25, 0.2, 0.3)),
    PreprocessCfg(size=80, interpolation="bilinear", resize_mode="squash"),
    PreprocessCfg(size=(90, 120), resize_mode="longest", fill_color=7),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.resize_mode}-{config.size}")
def test_images_of_every_size_give_the_bits_of_the_preprocessing(config: PreprocessCfg) -> None:
    transform = image_transform_v2(config, is_train=False)
    prepare = Prepare(transform)
    for seed, size in enumerate(SIZES):
        got, expected = prepare(picture(*size, seed)), transform(picture(*size, seed))
        assert got.dtype == expected.dtype == torch.float32
        assert torch.equal(got, expected), size


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_files_of_every_mode_give_the_bits_of_the_preprocessing(tmp_path: Path, mode: str) -> None:
    image = picture(300, 260)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image if mode == "I;16" else image.convert(mode)).save(path)
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    assert torch.equal(Prepare(transform)(open_image(path)), transform(open_image(path)))


def test_photographs_give_the_bits_of_the_preprocessing() -> None:
    """Opened as open_clip's users open them, which gives the same pixels for RGB and grey files without orientation."""
    folder = ROOT.parent / "shared" / "photos"
    shards = sorted(folder.glob("photos-*.tar"))
    if not shards:
        pytest.skip("no photographs beside this checkout")
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    prepare, seen = Prepare(transform), 0
    with tarfile.open(shards[0]) as archive:
        for member in [member for member in archive if member.name.endswith(".jpg")][:25]:
            data = archive.extractfile(member).read()  # type: ignore[union-attr]
            got, expected = prepare(decode_image(BytesIO(data), member.name)), transform(Image.open(BytesIO(data)))
            assert torch.equal(got, expected), member.name
            seen += 1
    assert seen == 25


EXTREME = ((1, 100_000), (1_000_000, 1), (1, 3), (40, 5_000), (1, 1), (3000, 2), (7, 149_800), (5, 3))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.resize_mode}-{config.size}")
def test_the_size_after_resizing_is_known_before(config: PreprocessCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is refused if and only if it would be too large after resizing; the test resizes no pixels."""
    transform = image_transform_v2(config, is_train=False)
    sizes: list[tuple[int, int]] = []

    def resize(image: Image.Image, size: tuple[int, int], *_: object, **__: object) -> Image.Image:
        sizes.append(size)
        return Image.new("RGB", tuple(min(side, 5000) for side in size))  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize)
    for size in EXTREME:
        sizes.clear()
        image = Image.new("RGB", size)
        try:
            transform(image)
        except ValueError:  # no pixel is left
            sizes.append((0, 0))
        ((width, height),) = sizes or [size]
        if 0 < width * height <= preprocessing.MAX_RESIZED_PIXELS:
            Prepare(transform)(image)
        else:
            with pytest.raises(ImageError, match=rf"^a\.png: too long and narrow: {size[0]} × {size[1]} pixels"):
                Prepare(transform)(image, "a.png")


def test_every_byte_value_of_every_channel_is_normalised() -> None:
    ramp = np.zeros((3, 256, 3), np.uint8)
    for channel in range(3):
        ramp[channel, :, channel] = np.arange(256)
    transform = image_transform_v2(PreprocessCfg(size=(3, 256), resize_mode="squash"), is_train=False)
    got = Prepare(transform)(Image.fromarray(ramp))
    mean, std = (torch.tensor(values) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = (torch.from_numpy(ramp).float() / 255 - mean) / std
    assert torch.equal(got, expected.permute(2, 0, 1))


def test_bytes_are_normalised_once_and_not_per_image() -> None:
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    calls: list[tuple[int, ...]] = []
    transform.transforms[-1].register_forward_hook(lambda module, given, result: calls.append(tuple(result.shape)))
    prepare = Prepare(transform)
    for seed in range(3):
        prepare(picture(260, 240, seed))
    assert calls == [(3, 1, 256)]


def _inverted(tensor: torch.Tensor) -> torch.Tensor:
    return 1 - tensor


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: torch.full((3, 4, 4), float(image.width)),
        ToTensor(),
        Compose([ToTensor()]),
        Compose([]),
        Compose([*image_transform_v2(PreprocessCfg(size=32), is_train=False).transforms, _inverted]),
        Compose([*image_transform_v2(PreprocessCfg(size=32), is_train=False).transforms[-2:]]),
    ],
    ids=["function", "one step", "steps of other kinds", "no steps", "a step more", "no conversion"],
)
def test_unknown_preprocessing_is_called_unchanged(transform: Transform) -> None:
    image = picture(50, 40)
    got, expected = Prepare(transform)(image), transform(image)
    assert (got is image) if expected is image else torch.equal(got, expected)


def test_a_default_dtype_of_64_bits_is_kept() -> None:
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    torch.set_default_dtype(torch.float64)
    try:
        got, expected = Prepare(transform)(picture(50, 40)), transform(picture(50, 40))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


# -------------------------------------------------------------------------------------------------------- reading ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipfast-reading")]


def test_batches_keep_the_order_of_the_items() -> None:
    later = threading.Event()

    def read(item: int) -> int:
        if item == 0:
            assert later.wait(WAIT)  # the first item ends after the third
        if item == 2:
            later.set()
        return 10 * item

    batches = [[each.result() for each in batch] for batch in read_ahead(read, range(7), 3, threads=2)]
    assert batches == [[0, 10, 20], [30, 40, 50], [60]]


def test_the_next_batch_is_read_while_one_is_used() -> None:
    read = [threading.Event() for _ in range(6)]
    with closing(read_ahead(lambda item: read[item].set(), range(6), 2, threads=1)) as batches:
        next(batches)
        assert read[2].wait(WAIT)  # the next batch has not been asked for
        assert read[3].wait(WAIT)


def test_at_most_two_batches_are_started() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with closing(read_ahead(lambda item: item, items(), 4, threads=2)) as batches:
        for used in range(1, 4):
            assert len(next(batches)) == 4
            assert taken == 4 * (used + 1)


def test_an_error_is_kept_with_its_item() -> None:
    def read(item: int) -> int:
        if item % 3 == 1:
            raise ImageError(f"{item}.jpg: damaged")
        return item

    results = [result for batch in read_ahead(read, range(6), 4) for result in batch]
    assert [result.item for result in results] == list(range(6))
    assert [result.value for result in results] == [0, None, 2, 3, None, 5]
    assert [str(result.error) for result in results if result.error] == ["1.jpg: damaged", "4.jpg: damaged"]
    with pytest.raises(ImageError, match=r"^4\.jpg: damaged$"):
        results[4].result()


def test_unexpected_exceptions_are_raised_with_their_batch() -> None:
    batches = read_ahead(lambda item: 1 // (3 - item), range(6), 2)
    assert [each.value for each in next(batches)] == [0, 0]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert readers() == []


def test_closing_stops_reading() -> None:
    started: list[int] = []
    go = threading.Event()

    def read(item: int) -> None:
        started.append(item)
        if item >= 2:
            assert go.wait(WAIT)

    with closing(read_ahead(read, range(100), 2, threads=1)) as batches:
        next(batches)
        threading.Timer(0.2, go.set).start()  # an image that is being read is read to its end
    assert set(started) <= {0, 1, 2}
    assert readers() == []


# ------------------------------------------------------------------------------------------- sharing cores with a model


def test_no_image_is_started_while_a_model_uses_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_available_cores", torch.get_num_threads)
    started = [threading.Event() for _ in range(4)]
    with closing(read_ahead(lambda item: started[item].set(), range(4), 2, threads=2)) as batches:
        with computing():
            next(batches)  # an awaited batch is read all the same
            assert not started[2].wait(0.2)
            assert not started[3].is_set()
        assert started[2].wait(WAIT)
        assert started[3].wait(WAIT)


def test_reading_goes_on_with_the_cores_that_a_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one core left, one of two threads goes on while the model computes."""
    monkeypatch.setattr(reading, "_available_cores", lambda: torch.get_num_threads() + 1)
    lock, reading_now, most = threading.Lock(), 0, 0
    done = threading.Semaphore(0)

    def read(item: int) -> None:
        nonlocal reading_now, most
        with lock:
            reading_now += 1
            most = max(most, reading_now if item >= 4 else 0)
        time.sleep(0.01)
        with lock:
            reading_now -= 1
        done.release()

    with closing(read_ahead(read, range(12), 4, threads=2)) as batches:
        with computing():
            next(batches)
            for _ in range(8):
                assert done.acquire(timeout=WAIT)
        assert most == 1


def test_a_forward_that_fails_returns_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_available_cores", torch.get_num_threads)
    with pytest.raises(KeyboardInterrupt), computing():
        raise KeyboardInterrupt
    started = threading.Event()
    with closing(read_ahead(lambda item: started.set() if item else None, range(2), 1, threads=1)) as batches:
        next(batches)
        assert started.wait(WAIT)


def test_closing_does_not_wait_for_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_available_cores", torch.get_num_threads)
    batches = read_ahead(lambda item: item, range(40), 4, threads=2)
    with computing():
        next(batches)
        batches.close()
        assert readers() == []


def test_decompose_keeps_its_cores(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """A batch that is asked for during a forward is read; the one after it waits for the end of the forward."""
    monkeypatch.setattr(reading, "_available_cores", torch.get_num_threads)
    pixels = torch.zeros(1, 3, 24, 24)
    started = threading.Event()
    during: list[bool] = []
    own = forward.decompose

    def watched(*arguments: object) -> object:
        next(batches)
        during.append(started.wait(0.2))
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("clipfast.model.decompose", watched)
    with closing(read_ahead(lambda item: started.set() if item else None, range(2), 1, threads=1)) as batches:
        model.decompose(pixels)
        assert started.wait(WAIT)
    assert during == [False]


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (-1, None), (1, 0)])
def test_sizes_and_thread_counts_below_one_are_refused(size: int, threads: int | None) -> None:
    with pytest.raises(InputError, match="at least one is needed of either"):
        read_ahead(lambda item: item, range(3), size, threads)


def test_no_items_give_no_batches() -> None:
    assert list(read_ahead(lambda item: item, [], 3)) == []
    assert readers() == []


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        picture(40 + number, 50 - number, number).save(folder / f"{number}.jpg", quality=90)
    return sorted(folder.iterdir())


def test_batches_are_the_images_of_their_files(model: Model, paths: list[Path]) -> None:
    expected = torch.stack([model.preprocess(Image.open(path)) for path in paths])
    assert torch.equal(model.prepare(paths), expected)
    for size, lengths in ((3, [3, 3, 1]), (7, [7]), (100, [7])):
        batches = list(model.batches(iter(paths), size))
        assert [len(batch) for batch in batches] == lengths
        assert torch.equal(torch.cat(batches), expected)
    assert list(model.batches([])) == []


def test_batches_have_the_models_dtype(paths: list[Path]) -> None:
    half = wrap(clip_model().to(torch.bfloat16))
    (batch,) = half.batches(paths[:2])
    assert batch.dtype == torch.bfloat16
    assert torch.equal(batch, torch.stack([half.preprocess(Image.open(path)) for path in paths[:2]]).bfloat16())


def test_a_file_that_cannot_be_read_raises_with_its_batch(model: Model, paths: list[Path], tmp_path: Path) -> None:
    batches = model.batches([*paths[:2], tmp_path / "gone.jpg"], 2)
    assert len(next(batches)) == 2
    with pytest.raises(ImageError, match=r"gone\.jpg: no such file$"):
        next(batches)
    with pytest.raises(InputError, match="batches of 0 images"):
        model.batches(paths, 0)


def test_images_that_cannot_be_read_are_skipped_and_reported(model: Model, paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"no image")
    damaged = Image.open(BytesIO(paths[0].read_bytes()[:-200]))
    images = [paths[0], tmp_path / "gone.jpg", tmp_path / "text.jpg", damaged, str(paths[1]), Image.open(paths[2])]
    batches = prepared(model.preprocess, images, 2, on_error="skip")
    got, indices = [], []
    for batch in batches:
        got.append(batch)
        indices.append(batches.indices)
    assert [len(batch) for batch in got] == [1, 2]
    assert indices == [[0], [4, 5]]
    assert torch.equal(torch.cat(got), torch.stack([model.preprocess(Image.open(path)) for path in paths[:3]]))
    assert [(each.index, each.image) for each in batches.skipped] == [(n, images[n]) for n in (1, 2, 3)]
    reasons = [str(each.error) for each in batches.skipped]
    assert reasons[:2] == [f"{tmp_path}/gone.jpg: no such file", f"{tmp_path}/text.jpg: not an image that can be read"]
    assert reasons[2].startswith("image 3: damaged or truncated")
    assert readers() == []


def test_unreadable_images_alone_give_no_batches(model: Model, tmp_path: Path) -> None:
    batches = prepared(model.preprocess, [tmp_path / f"{n}.jpg" for n in range(5)], 2, on_error="skip")
    assert list(batches) == []
    assert [each.index for each in batches.skipped] == [0, 1, 2, 3, 4]


def test_a_pil_image_that_is_damaged_raises_an_image_error(model: Model, paths: list[Path]) -> None:
    damaged = Image.open(BytesIO(paths[0].read_bytes()[:-200]))
    batches = prepared(model.preprocess, [paths[0], damaged], 1)
    next(batches)
    with pytest.raises(ImageError, match=r"^image 1: damaged or truncated"):
        next(batches)
    assert readers() == []


def test_pixels_of_a_pil_image_that_cannot_be_converted(model: Model, paths: list[Path]) -> None:
    images = [paths[0], Image.new("F", (30, 30), 70_000.0)]
    with pytest.raises(ImageError, match=r"^image 1: floating-point pixels from 70000 to 70000"):
        list(prepared(model.preprocess, images, 2))


def test_what_is_neither_a_path_nor_an_image_is_refused(model: Model, paths: list[Path]) -> None:
    with pytest.raises(InputError, match="image 1 is a ndarray: expected a path or a PIL image"):
        list(prepared(model.preprocess, [paths[0], np.zeros((4, 4, 3))], 2))  # type: ignore[list-item]
    with pytest.raises(InputError, match="on_error is 'ignore': expected 'raise' or 'skip'"):
        prepared(model.preprocess, paths, 2, on_error="ignore")  # type: ignore[arg-type]


def test_leaving_batches_early_stops_reading(model: Model, paths: list[Path]) -> None:
    batches = prepared(model.preprocess, paths * 50, 2)
    next(batches)
    batches.close()
    assert readers() == []
    batches = prepared(model.preprocess, paths * 50, 2)
    next(batches)
    del batches
    assert readers() == []


def test_the_number_of_threads_changes_nothing(paths: list[Path]) -> None:
    prepare = Prepare(image_transform_v2(PreprocessCfg(size=32), is_train=False))

    def rows(threads: int) -> Iterator[torch.Tensor]:
        for batch in read_ahead(lambda path: prepare(open_image(path)), paths, 2, threads):
            yield from (each.result() for each in batch)

    expected = torch.stack(list(rows(1)))
    for threads in (2, 5):
        assert torch.equal(torch.stack(list(rows(threads))), expected)


def test_pil_images_that_read_from_one_file(model: Model, paths: list[Path], tmp_path: Path) -> None:
    """Images of one archive that are not decoded yet share its position, so they cannot be decoded in threads."""
    many = paths * 6
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, path in enumerate(many):
            tar.add(path, f"{number}.jpg")
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with tarfile.open(tmp_path / "a.tar") as tar:
            lazy = [Image.open(tar.extractfile(member)) for member in tar]  # type: ignore[arg-type]
            got = model.prepare([*lazy, lazy[0]])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, model.prepare([*many, many[0]]))
