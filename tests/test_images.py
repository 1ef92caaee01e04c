"""Opening image files: pixels of every mode and format, or one ImageError that names the file."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from subprocess import CalledProcessError

import numpy as np
import pytest
from builders import ROOT
from PIL import EpsImagePlugin, Image, PngImagePlugin
from tolerances import JPEG

from clipfast import ImageError
from clipfast.images import SUFFIXES, as_rgb, decode_pixels, open_image, open_pixels

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
    """All values are below 256; the range of the type counts, not that of the image."""
    path = save(tmp_path / f"night.{suffix}", of(np.array([[0, 100, 255]], dtype=np.uint16)))
    assert rgb(path)[0, :, 0].tolist() == [0, 0, 1]


def test_values_above_sixteen_bits_do_not_wrap_around(tmp_path: Path) -> None:
    path = save(tmp_path / "deeper.tif", of(np.array([[0, 65535, 66000, 2_000_000]], dtype=np.int32)))
    values = rgb(path)[0, :, 0].tolist()
    assert values == sorted(values), "brighter pixels came out darker"
    assert values[-1] == 255


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-0.02, 0.2, 1.03], [0, 51, 255]),  # resampling overshoots at edges
        ([0.0, 0.001, 0.01], [0, 0, 3]),  # a dark image stays dark
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-3.0, 100.0, 260.0], [0, 100, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_floating_point_pixels_are_scaled_by_their_range(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    path = save(tmp_path / "float.tif", of(np.array([values], dtype=np.float32)))
    assert rgb(path)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([-1.0, 0.0, 1.0], "from -1 to 1: expected 0 to 1 or 0 to 255"),
        ([0.0, 65535.0], "from 0 to 65535"),
        ([-200.0, 200.0], "from -200 to 200"),
        ([0.0, float("nan")], "not finite"),
        ([float("nan"), 1.0], "not finite"),
        ([0.0, float("inf")], "not finite"),
        ([float("-inf"), 1.0], "not finite"),
    ],
)
def test_floating_point_pixels_of_no_known_range_are_refused(tmp_path: Path, values: list[float], reason: str) -> None:
    refused(save(tmp_path / "float.tif", of(np.array([values], dtype=np.float32))), reason)


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
    """PNG's tRNS chunk: one colour of an image without an alpha channel is transparent."""
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


def test_a_pil_image_is_not_changed() -> None:
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


def test_files_that_are_no_images_are_refused_by_kind(tmp_path: Path) -> None:
    contents = {
        "empty.jpg": (b"", "an empty file"),
        "page.jpg": (b"\n <!DOCTYPE html><html><body>404</body></html>", "an HTML page, not an image"),
        "bare.jpg": (b"<html><body>404</body></html>", "an HTML page, not an image"),
        "notes.png": (b"buy milk\n" * 40, "not an image that can be read"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, reason)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
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
def test_half_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"half.{kind.lower()}"
    whole = encoded(kind)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of the damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF"])
def test_a_damaged_file_is_read_or_refused_but_raises_nothing_else(tmp_path: Path, kind: str) -> None:
    """Decoders raise exceptions of any kind; 60 damaged copies, the same ones in every run."""
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


# --------------------------------------------------------------------------------------------------------- formats

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
    b"newpath 0 0 moveto 9 9 lineto stroke\nshowpage\n%%EOF\n"
)


def test_postscript_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone would run Ghostscript, whatever the file is called."""
    program, started = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    path = tmp_path / "a.jpg"
    path.write_bytes(POSTSCRIPT)
    for read in (open_image, open_pixels):
        with pytest.raises(ImageError, match=r"a\.jpg: PostScript or PDF, not an image"):
            read(path)
    assert not started.exists()
    with Image.open(path) as image, pytest.raises(CalledProcessError):
        image.load()
    assert started.exists(), "this test cannot fail: Pillow does not run Ghostscript"


def test_images_are_opened_in_one_place() -> None:
    """Any other call of ``Image.open`` could decode a format, or open a file, that is not listed."""
    sources = [path for path in (ROOT / "clipfast").rglob("*.py") if "Image.open(" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in sources] == ["clipfast/images.py"]


KINDS = {
    ".jp2": "JPEG2000",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".apng": "PNG",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
}


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_listed_ending_is_read(tmp_path: Path, suffix: str) -> None:
    Image.init()
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    path = save(
        tmp_path / f"a{suffix.upper()}", noise().convert(mode), format=KINDS.get(suffix, Image.EXTENSION[suffix])
    )
    assert rgb(path).shape == (40, 40, 3)


def test_the_content_decides_on_the_format_and_the_ending_on_tga(tmp_path: Path) -> None:
    save(tmp_path / "png.jpg", noise(), format="PNG")
    assert np.array_equal(rgb(tmp_path / "png.jpg"), np.asarray(noise()))
    save(tmp_path / "tga.jpg", noise(), format="TGA")
    refused(tmp_path / "tga.jpg", "not an image that can be read")


@pytest.mark.parametrize("kind", ["PSD", "ICO", "PCX", "SGI", "XBM", "DDS", "QOI"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "PSD":  # which Pillow only reads
        (tmp_path / "a.png").write_bytes(b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\4" * 2 + b"\0\x08\0\3" + bytes(99))
    else:
        save(tmp_path / "a.png", noise().convert("1" if kind == "XBM" else "RGB"), format=kind)
    refused(tmp_path / "a.png", "not an image that can be read")


def test_masks_keep_their_mode(tmp_path: Path) -> None:
    indexed = Image.new("P", SIZE, 7)
    indexed.putpalette(range(256))
    save(tmp_path / "mask.png", indexed)
    mask = open_pixels(tmp_path / "mask.png")
    assert mask.mode == "P"
    assert np.asarray(mask).max() == 7
    assert np.asarray(decode_pixels(BytesIO((tmp_path / "mask.png").read_bytes()), "mask.png")).min() == 7


def test_names_in_errors_are_one_line(tmp_path: Path) -> None:
    for name, shown in (("a\nb.jpg", "a\\nb.jpg"), ("\udcff.jpg", "\\udcff.jpg"), ("a\u2028.jpg", "a\\u2028.jpg")):
        path = tmp_path / name
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert str(caught.value) == f"{tmp_path}/{shown}: no such file"
        save(tmp_path / "plain.png", noise()).rename(path)
        assert rgb(path).shape == (40, 40, 3)


def test_a_decompression_bomb_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.png", noise())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(path, "too large to decode safely")


def test_a_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    """A few kilobytes of compressed comment that unpack to megabytes."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    refused(save(tmp_path / "chatty.png", noise(), pnginfo=info), "")
