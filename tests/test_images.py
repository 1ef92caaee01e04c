"""Opening image files: handled, or one ImageError that names the file."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tolerances import JPEG

from clipfast import ImageError
from clipfast.images import as_rgb, open_image

SIZE = (6, 4)  # width, height


def rgb(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, SIZE, colour)


def of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("name", "image", "colour"),
    [
        ("rgb.png", flat("RGB", (1, 2, 3)), (1, 2, 3)),
        ("rgb.bmp", flat("RGB", (1, 2, 3)), (1, 2, 3)),
        ("rgb.tif", flat("RGB", (1, 2, 3)), (1, 2, 3)),
        ("grey.png", flat("L", 77), (77, 77, 77)),
        ("grey.tif", flat("L", 77), (77, 77, 77)),
        ("bits.png", flat("1", 1), (255, 255, 255)),
        ("grey-alpha.png", flat("LA", (100, 255)), (100, 100, 100)),
        ("grey-clear.png", flat("LA", (100, 0)), (255, 255, 255)),
        ("alpha.png", flat("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
        ("clear.png", flat("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        ("half.png", flat("RGBA", (0, 0, 0, 51)), (204, 204, 204)),  # a fifth of black on white
        ("clear.webp", flat("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        ("cmyk.tif", flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        ("palette.png", flat("RGB", (9, 8, 7)).quantize(4), (9, 8, 7)),
        ("palette.gif", flat("RGB", (9, 8, 7)).quantize(4), (9, 8, 7)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, name: str, image: Image.Image, colour: tuple[int, int, int]) -> None:
    path = save(tmp_path / name, image)
    assert rgb(path).shape == (SIZE[1], SIZE[0], 3)
    assert np.array_equal(np.unique(rgb(path).reshape(-1, 3), axis=0), [colour])


def test_a_cmyk_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    path = save(tmp_path / "print.jpg", flat("CMYK", (0, 255, 255, 0)), quality=100)
    assert np.abs(rgb(path).astype(int) - (255, 0, 0)).max() <= JPEG


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_full_range(tmp_path: Path, suffix: str) -> None:
    """0 … 65535 becomes 0 … 255: 257 is one step, and nothing is cut off."""
    steps = np.array([[0, 257, 2570, 25700, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"deep.{suffix}", of(steps))
    assert rgb(path)[0, :, 0].tolist() == [0, 1, 10, 100, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_dark_sixteen_bit_image_stays_dark(tmp_path: Path, suffix: str) -> None:
    """All values below 256: what counts is what 16 bits can hold, not what this image holds."""
    path = save(tmp_path / f"night.{suffix}", of(np.array([[0, 100, 255]], dtype=np.uint16)))
    assert rgb(path)[0, :, 0].tolist() == [0, 0, 1]


def test_values_above_sixteen_bits_do_not_wrap_around(tmp_path: Path) -> None:
    path = save(tmp_path / "deeper.tif", of(np.array([[0, 65535, 66000, 2_000_000]], dtype=np.int32)))
    values = rgb(path)[0, :, 0].tolist()
    assert values == sorted(values), "brighter pixels came out darker"
    assert values[-1] == 255


def test_floating_point_grey_is_not_wrapped_around(tmp_path: Path) -> None:
    path = save(tmp_path / "float.tif", of(np.array([[-3.0, 0.0, 100.0, 255.0]], dtype=np.float32)))
    assert rgb(path)[0, :, 0].tolist() == [0, 0, 100, 255]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    for name in ("index.png", "index.gif"):
        pixels = rgb(save(tmp_path / name, image, transparency=0))
        assert pixels[0, 0].tolist() == [200, 100, 50]
        assert pixels[1:].min() == 255


@pytest.mark.parametrize(
    ("mode", "colour", "key", "other"), [("RGB", (10, 20, 30), (10, 20, 30), (1, 2, 3)), ("L", 40, 40, 7)]
)
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str, colour: object, key: object, other: object) -> None:
    """PNG's tRNS chunk: one colour of an image without an alpha channel means see-through."""
    image = flat(mode, colour)
    image.putpixel((0, 0), other)
    pixels = rgb(save(tmp_path / "keyed.png", image, transparency=key))
    assert pixels[0, 0].tolist() == (list(other) if mode == "RGB" else [other] * 3)
    assert pixels[1:].min() == 255


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),  # a camera held upright: turn clockwise
        (7, lambda a: np.rot90(a.swapaxes(0, 1), 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    stored = np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint8).reshape(SIZE[1], SIZE[0], 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "camera.png", of(stored), exif=exif)
    assert np.array_equal(rgb(path), turn(stored))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [flat("RGB", (200, 0, 0)), flat("RGB", (0, 200, 0))]
    path = save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert rgb(path)[0, 0].tolist() == [200, 0, 0]


def test_an_image_already_open_is_not_changed() -> None:
    image = flat("LA", (100, 0))
    assert np.asarray(as_rgb(image)).min() == 255
    assert image.mode == "LA"


# ---------------------------------------------------------------------------------------------------------- errors


def refused(path: Path, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    contents = {
        "empty.jpg": (b"", "an empty file"),
        "page.jpg": (b"\n <!DOCTYPE html><html><body>404</body></html>", "an HTML page, not an image"),
        "bare.jpg": (b"<html><body>404</body></html>", "an HTML page, not an image"),
        "notes.png": (b"buy milk\n" * 40, "not an image that can be read"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, reason)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.jpg", "no such file")
    refused(tmp_path, "a folder, not an image")
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file" / "inside.jpg", "")


def noise(size: int = 40) -> Image.Image:
    return of(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def encoded(kind: str) -> bytes:
    buffer = BytesIO()
    noise().save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_half_a_file_is_truncated(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"half.{kind.lower()}"
    whole = encoded(kind)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of the very damage this test does
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_file_is_read_or_refused_but_raises_nothing_else(tmp_path: Path, kind: str) -> None:
    """Decoders raise what they like on damage; 60 damaged copies, the same ones in every run."""
    random = np.random.default_rng(1)
    whole = encoded(kind)
    path = tmp_path / f"damaged.{kind.lower()}"
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(20, len(whole) + 1)])
        try:
            outcomes.add(open_image(path).mode)
        except ImageError as error:
            message = str(error)
            outcomes.add("refused in one line" if message.startswith(f"{path}: ") and "\n" not in message else message)
    assert "refused in one line" in outcomes
    assert outcomes <= {"refused in one line", "RGB"}


def test_a_decompression_bomb_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.png", noise())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(path, "too large to decode safely")


def test_a_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    """A few kilobytes of compressed comment that unpack to megabytes: the decoder gives up, and says so."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    refused(save(tmp_path / "chatty.png", noise(), pnginfo=info), "")
