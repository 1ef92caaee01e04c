"""Fast preprocessing: the same sizes and crops as the model's own, nearly the same pixels, and what it cannot do."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT
from flow_parts import encoded, model, picture, sample, samples
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, RandomCrop, Resize, ToTensor

from clipfast import ImageError, InputError
from clipfast.dataset.collecting import collect
from clipfast.dataset.collection import Collection
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.difference import Difference, difference, first_samples
from clipfast.dataset.flow.fast import Fast
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.plan import Unit, UnitError
from clipfast.images import decode_image, open_image
from clipfast.preprocessing import Prepare, Transform

SIZES = [(500, 375), (375, 500), (224, 224), (225, 640), (300, 224), (100, 80), (31, 400), (1024, 768), (1000, 999)]
CONFIGS = [
    PreprocessCfg(size=224),
    PreprocessCfg(size=224, interpolation="bilinear"),
    PreprocessCfg(size=(224, 160)),
    PreprocessCfg(size=224, resize_mode="squash"),
    PreprocessCfg(size=224, resize_mode="longest", fill_color=7),
    PreprocessCfg(size=(96, 160), resize_mode="longest"),
]


def last_steps(*steps: object) -> Compose:
    return Compose([*steps, *image_transform_v2(PreprocessCfg(), is_train=False).transforms[-3:]])


TRANSFORMS: list[Transform] = [
    *(image_transform_v2(config, is_train=False) for config in CONFIGS),
    last_steps(Resize(100, max_size=150, interpolation=InterpolationMode.BICUBIC), CenterCrop(100)),
    last_steps(Resize(64), CenterCrop((200, 40))),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=range(len(TRANSFORMS)))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_whole_images_get_nearly_the_same_pixels(transform: Transform, size: tuple[int, int]) -> None:
    """Without a JPEG only the resize differs: torch's weights have 16 bits, few bytes are cut off between its steps.

    A crop that is one pixel off changes these images by more than five levels on average.
    """
    image = picture(*size, seed=1)
    fast, prepare = Fast(transform), Prepare(transform)
    got, expected = fast.pixels(image, fast.size(size)).astype(int), prepare.pixels(image).astype(int)
    assert got.shape == expected.shape
    assert (np.abs(got - expected) > 2).mean() <= 0.002
    assert np.abs(got - expected).mean() <= 0.5
    assert np.array_equal(fast.levels, prepare.levels)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=range(len(TRANSFORMS)))
def test_sizes_after_resizing_are_those_of_the_steps(transform: Transform) -> None:
    rng = np.random.default_rng(0)
    resize, fast = transform.transforms[0], Fast(transform)  # type: ignore[attr-defined]
    for width, height in rng.integers(1, 400, (300, 2)).tolist():
        try:
            size = fast.size((width, height))
        except ImageError:
            continue  # the tests below
        assert size == resize(Image.new("RGB", (width, height))).size


@pytest.mark.parametrize(
    ("size", "scale"),
    [((2000, 1500), 4), ((1792, 1792), 8), ((1791, 1791), 4), ((448, 600), 2), ((447, 600), 1), ((100, 100), 1)],
)
def test_jpegs_are_decoded_at_the_smallest_size_not_below_the_resized_one(size: tuple[int, int], scale: int) -> None:
    fast = Fast(image_transform_v2(PreprocessCfg(), is_train=False))
    content = encoded(*size, 0)
    image = decode_image(io.BytesIO(content), "a.jpg", fast.size)
    assert image.size == (-(-size[0] // scale), -(-size[1] // scale))
    assert decode_image(io.BytesIO(content), "a.jpg").size == size


def test_a_turned_jpeg_is_reduced_by_its_upright_size(tmp_path: Path) -> None:
    """Resized to 400 × 100 upright; by the size that lies in the file it would be reduced to nothing or not at all."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(300, 1600, 3).save(tmp_path / "a.jpg", exif=exif)
    fast = Fast(image_transform_v2(PreprocessCfg(size=(100, 400), resize_mode="squash"), is_train=False))
    reduced, whole = open_image(tmp_path / "a.jpg", fast.size), open_image(tmp_path / "a.jpg")
    assert (whole.size, reduced.size) == ((1600, 300), (800, 150))
    got, expected = (fast.pixels(image, fast.size(whole.size)).astype(int) for image in (reduced, whole))
    assert np.abs(got - expected).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes(tmp_path: Path, mode: str) -> None:
    picture(640, 480, 1).convert(mode).save(tmp_path / "a.jpg", quality=95)
    decoders = [Decoder(model(), each, leaves_bytes=True) for each in ("exact", "fast")]
    pixels = [decoder.empty(1) for decoder in decoders]
    for decoder, place in zip(decoders, pixels, strict=True):
        decoder.decode(sample(0, (tmp_path / "a.jpg").read_bytes()), place[0].numpy())
    assert (pixels[0].int() - pixels[1].int()).abs().double().mean() < 6


def test_numbers_are_those_of_the_bytes() -> None:
    tiny = model()
    [content] = [each.content for each in samples(1)]
    as_bytes, as_numbers = Decoder(tiny, "fast", leaves_bytes=True), Decoder(tiny, "fast")
    left, looked_up = as_bytes.empty(1), as_numbers.empty(1)
    as_bytes.decode(sample(0, content), left[0].numpy())
    as_numbers.decode(sample(0, content), looked_up[0].numpy())
    assert as_bytes.levels is not None
    for channel in range(3):
        expected = torch.from_numpy(as_bytes.levels[channel])[left[0, :, :, channel].long()]
        assert torch.equal(looked_up[0, channel], expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_images_that_are_too_long_and_narrow_are_refused(form: str) -> None:
    decoder = Decoder(model(), "fast")
    with pytest.raises(ImageError, match=r"0003.jpg: too long and narrow: 60000 × 1 pixels") as caught:
        decoder.decode(sample(3, encoded(60_000, 1, 0, form)), decoder.empty(1)[0].numpy())
    assert caught.value.status == "too_large"


def _blurred(image: Image.Image) -> Image.Image:
    return image


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: ToTensor()(image),
        Compose([Resize(224), ToTensor()]),
        last_steps(),
        last_steps(CenterCrop(224)),
        last_steps(_blurred, Resize(224)),
        last_steps(Resize(224), RandomCrop(200)),
        last_steps(Resize(224), CenterCrop(224), CenterCrop(200)),
        last_steps(Resize(224, interpolation=InterpolationMode.NEAREST)),
        Compose([Resize(224), ToTensor(), Normalize(0.5, 0.5)]),
    ],
    ids=range(9),
)
def test_other_steps_have_no_fast_form(transform: Callable[[Image.Image], torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"^this model's preprocessing has no fast form: [^\n]+$"):
        Fast(transform)


def test_the_difference_is_that_of_all_pixels_and_embeddings() -> None:
    tiny, given = model(), samples(12)
    given[3] = sample(3, b"no image")
    measured = difference(tiny, given)
    assert measured is not None
    assert measured.images == 11
    images = [decode_image(io.BytesIO(each.content), each.id) for each in given if each is not given[3]]
    fast, prepare = Fast(tiny.preprocess), Prepare(tiny.preprocess)
    reduced = [decode_image(io.BytesIO(each.content), each.id, fast.size) for each in given if each is not given[3]]
    ours = np.stack([fast.pixels(less, fast.size(image.size)) for less, image in zip(reduced, images, strict=True)])
    own = np.stack([prepare.pixels(image) for image in images])
    levels = np.abs(ours.astype(int) - own)
    assert measured.largest == levels.max() > 0
    assert measured.mean == pytest.approx(levels.mean(), rel=1e-9)
    tables = torch.from_numpy(fast.levels)

    def embeddings(pixels: np.ndarray) -> torch.Tensor:
        channels = [tables[channel][torch.from_numpy(pixels[..., channel]).long()] for channel in range(3)]
        return tiny.decompose(torch.stack(channels, 1)).embedding.double()

    cosine = torch.cosine_similarity(embeddings(ours), embeddings(own))
    assert measured.least_cosine == pytest.approx(float(cosine.min()), abs=1e-6)
    assert measured.mean_cosine == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert str(measured).count("\n") == 0
    assert Difference(**measured.to_json()) == measured


def test_at_most_so_many_images_are_compared() -> None:
    given = iter(samples(30))
    measured = difference(model(), given, images=9)
    assert measured is not None
    assert measured.images == 9
    assert difference(model(), [sample(0, b"x")] * 3) is None


def test_the_first_samples_are_those_of_the_first_units() -> None:
    class Units:
        name = "units"

        def units(self, size: int) -> object:
            raise AssertionError

        def read(self, unit: Unit) -> object:
            yield sample(unit.number, b"a")
            if unit.number == 0:
                raise UnitError("damaged", "cut")

    units = (Unit("shard", "/a", number=number) for number in range(1000))
    first = first_samples([Units()], units)  # type: ignore[list-item]
    assert [next(first).id for _ in range(3)] == ["0000.jpg", "0001.jpg", "0002.jpg"]
    assert next(units).number == 3


def test_photographs_differ_little() -> None:
    folder = ROOT.parent / "shared" / "photos"
    if not folder.exists():
        pytest.skip(f"no photographs in {folder}")
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    fast, prepare = Fast(transform), Prepare(transform)
    means = []
    with tarfile.open(folder / "photos-0000.tar") as tar:
        for member in [each for each in tar if each.name.endswith(".jpg")][:16]:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            whole = decode_image(io.BytesIO(data), member.name)
            reduced = decode_image(io.BytesIO(data), member.name, fast.size)
            got = fast.pixels(reduced, fast.size(whole.size)).astype(int)
            means.append(np.abs(got - prepare.pixels(whole)).mean())
    assert len(means) == 16
    assert max(means) < 4


def test_a_fast_pass_measures_its_difference_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, folder, tiny = tmp_path / "images", tmp_path / "collection", model()
    images.mkdir()
    for each in samples(12):
        assert isinstance(each.content, bytes)
        (images / each.id).write_bytes(each.content)
    inputs = open_inputs([images])
    options = PassOptions(preprocess="fast", unit_size=4)
    summary = collect(inputs, folder, tiny, options)
    expected = difference(tiny, samples(12))
    assert summary.difference == expected is not None
    assert [record.getMessage() for record in caplog.records] == [str(expected)]
    assert Collection(folder).count == 12
    assert Collection(folder).manifest.settings.preprocessing["mode"] == "fast"
    assert collect(inputs, folder, tiny, options).difference is None  # nothing is left to do

    (folder / "units" / "000001.json").unlink()  # as if it had been stopped before that unit
    monkeypatch.setattr("clipfast.dataset.flow.difference.difference", lambda *_: pytest.fail("measured again"))
    assert collect(inputs, folder, tiny, options).difference == expected
    with pytest.raises(InputError, match="preprocessing mode 'fast', not 'exact'"):
        collect(inputs, folder, tiny, PassOptions(unit_size=4))


def test_a_fast_pass_without_a_fast_form_writes_nothing(tmp_path: Path) -> None:
    tiny = model()
    tiny.preprocess = lambda image: ToTensor()(image)
    (tmp_path / "a.jpg").write_bytes(encoded(40, 30, 0))
    with pytest.raises(InputError, match="no fast form"):
        collect(open_inputs([tmp_path / "a.jpg"]), tmp_path / "c", tiny, PassOptions(preprocess="fast"))
    assert not list((tmp_path / "c").iterdir())


def test_fast_and_exact_passes_differ_by_the_pixels_alone(tmp_path: Path) -> None:
    """PNGs of the resized size are not resized: both passes see the same bytes."""
    tiny, images = model(), tmp_path / "images"
    images.mkdir()
    for number in range(5):
        (images / f"{number}.png").write_bytes(encoded(24, 24, number, "PNG"))
    inputs = open_inputs([images])
    for mode in ("exact", "fast"):
        collect(inputs, tmp_path / mode, tiny, PassOptions(preprocess=mode))  # type: ignore[arg-type]
    exact, fast = (Collection(tmp_path / mode).moments for mode in ("exact", "fast"))
    assert all(torch.equal(exact._sums[name], fast._sums[name]) for name in exact._sums)
