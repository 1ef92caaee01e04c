"""``clipfast segment --phrase``: files and JSON equal to the analysis, and options that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from commandline import inside
from PIL import Image

import clipfast
from clipfast.analyses.referring import Settings, Vocabulary, segment
from clipfast.commands.options import ClassOptions, InputOptions
from clipfast.commands.segment.command import Options, run
from clipfast.scenes.drawing import render
from clipfast.scenes.referring import sample_crowd

PHRASES = ("the leftmost star", "the object below the circle")
NOUNS = ("star", "circle", "ring", "sea")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        Image.fromarray(render(sample_crowd(5, "test", index))).save(folder / f"{index}.png")
    return folder


def test_files_hold_what_the_analysis_finds(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("\n".join(NOUNS) + "\n")
    (pictures / "broken.png").write_bytes(b"no image")
    options = Options(
        InputOptions([pictures], batch_size=2),
        ClassOptions(prompt=("a {}",)),
        phrase=PHRASES,
        proposals=2,
        background_texts=str(tmp_path / "nouns.txt"),
        threshold="0.4",
        out=tmp_path / "out",
    )
    assert run(options) == 2  # one file is left out
    (pictures / "broken.png").unlink()
    result = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert (result["images"], result["complete"], result["cut"]) == (3, True, 0.4)
    assert [failed["file"].endswith("broken.png") for failed in result["failed"]] == [True]
    assert result["phrases"][1] == {
        "text": PHRASES[1],
        "target": "object",
        "relations": [{"kind": "below", "landmarks": ["circle"]}],
        "places": [],
        "extremes": [],
    }
    vocabulary = Vocabulary(nouns=NOUNS, templates=("a {}",))
    model = clipfast.load("scenes")
    paths = [pictures / f"{index}.png" for index in range(3)]
    for at, phrase in enumerate(PHRASES):
        for entry, found in zip(
            result["pictures"], segment(model, paths, phrase, vocabulary, Settings(0.4)), strict=True
        ):
            drawn = entry["maps"][at]
            assert drawn["text"] == phrase
            assert drawn["proposals"][0]["mask"] == drawn["mask"]
            assert Image.open(tmp_path / "out" / drawn["heat"]).size == (64, 64)
            assert len(drawn["proposals"]) == min(2, len(found.proposals))
            for written, expected in zip(drawn["proposals"], found.proposals, strict=False):
                mask = np.asarray(Image.open(tmp_path / "out" / written["mask"])) == 255
                assert (mask == expected.mask.numpy()).mean() > 0.99
                assert written["score"] == pytest.approx(expected.score, abs=1e-3)
                assert tuple(written["box"]) == pytest.approx(expected.box, abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--phrase", "left of the sea"), "does not say what to find"),
        (("--phrase", "a star", "--texts", "a star"), "--phrase and --texts exclude each other"),
        (("--phrase", "a star", "--masks", "."), "--phrase and --masks exclude each other"),
        (("--phrase", "a star", "--threshold", "2"), "--threshold is '2'"),
        (("--phrase", "a star", "--background-texts", "nowhere"), "--background-texts is 'nowhere'"),
        (("--phrase", "a star", "--prompt", "a photo"), "needs one {}"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    pictures: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = inside("segment", pictures, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
