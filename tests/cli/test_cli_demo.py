"""The demo on a model that has learned nothing: everything but what the bundled weights know."""

from pathlib import Path

import pytest
from commandline import LAYERS, picture
from PIL import Image

from clipfast.commands.demo.command import Options, run, scene_subject
from clipfast.errors import InputError


def test_scenes_and_photographs(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture().save(photos / "scene-00.png")  # as a scene is called
    (photos / "bad.png").write_bytes(b"")
    code = run(Options(photos=[photos], out=tmp_path / "out", scenes=1, model=str(model_folder)))
    captured = capsys.readouterr()
    assert code == 2
    assert "bad.png: an empty file" in captured.err
    assert "1 of 2 photographs failed" in captured.err
    panels = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert panels == ["heads/photo-scene-00.png", "heads/scene-00.png", "photo-scene-00.png", "scene-00.png"]
    for panel in panels:
        with Image.open(tmp_path / "out" / panel) as image:
            image.load()
    rows = [line.split("\t") for line in captured.out.splitlines() if line.startswith(("scene-00", "photo-"))]
    assert [len(row[3].split()) for row in rows] == [LAYERS, LAYERS]
    assert "sum check" in captured.out


def test_no_scenes_and_no_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(Options(photos=(), out=tmp_path, scenes=0))


def test_subjects_are_drawn_from_the_seed() -> None:
    one, same, other = scene_subject(3, 1), scene_subject(3, 1), scene_subject(4, 1)
    assert one.texts == same.texts
    assert one.picture.tobytes() == same.picture.tobytes()
    assert one.picture.tobytes() != other.picture.tobytes()
    assert 4 <= len(one.texts) <= 6
