"""The inputs that once made a program fail, and photographs, read as units. Skipped where they are not beside this."""

import re
import subprocess
import sys
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from builders import ROOT
from input_files import Given, everything

from clipfast.dataset.files import find_images
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import Labeller, all_names, peek
from clipfast.dataset.plan import write_plan
from clipfast.dataset.samples import Failure, Sample
from clipfast.errors import ImageError, InputError
from clipfast.images import decode_image, decoding, open_image

SHARED = ROOT.parent / "shared"
CASES = SHARED / "cases" / "make_cases.py"
PHOTOS = SHARED / "photos"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CASES.is_file():
        pytest.skip("no cases beside this checkout")
    path = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(CASES), str(path)], check=True, capture_output=True)
    return path


def status(sample: Sample) -> str:
    """What becomes of a sample when it is decoded."""
    if sample.failure is not None:
        return str(sample.failure.status)
    assert not hasattr(sample.content, "size")
    try:
        with decoding():
            if sample.content is None:
                open_image(sample.path)
            else:
                decode_image(BytesIO(sample.content), sample.id)  # type: ignore[arg-type]
    except ImageError as error:
        failure = Failure.of(error)
        assert "\n" not in failure.reason
        return str(failure.status)
    return "ok"


def outcome(path: Path) -> tuple[Counter[str], Given]:
    """The statuses of all images, in no more than a minute."""
    done: list[tuple[Counter[str], Given]] = []

    def run() -> None:
        have = everything(open_inputs([path])[0])
        done.append((Counter(map(status, have.samples)), have))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60.0)
    assert done, f"reading {path} waits or fails"
    return done[0]


def memory(kind: str) -> int:
    """Of this process, in kB."""
    [line] = re.findall(rf"^{kind}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line)


@pytest.mark.parametrize("name", ["line separator", "next line", "newline", "leading dash", "long", "bytes"])
def test_names(folder: Path, name: str) -> None:
    statuses, have = outcome(folder / f"name {name}")
    assert (statuses, have.error) == (Counter(ok=2), None)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("shape", ["1x1", "1x100000", "1000000x1", "10000000x1", "30000x30000"])
def test_shapes(folder: Path, shape: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew, at what is used now
    before = memory("VmRSS")
    statuses, have = outcome(folder / f"shape {shape}")
    assert memory("VmHWM") - before < 1 << 20
    assert have.error is None
    assert statuses["ok"] + statuses["too_large"] == 2
    assert statuses["ok"] >= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eps as jpg", {"ok": 1, "no_image": 1}),
        ("endings", {"ok": 5}),
        ("links", {"ok": 1, "missing": 1, "unreadable": 2}),
        ("fifo", {"ok": 1, "unreadable": 1}),
        ("dots.tar", {"ok": 4, "duplicate": 1}),
        ("cut.tar", {"ok": 3}),
        ("huge.tar", {}),
    ],
)
def test_formats_special_files_and_shards(folder: Path, name: str, expected: dict[str, int]) -> None:
    statuses, have = outcome(folder / name)
    assert statuses == Counter(expected)
    errors = {"fifo": "z.tar: a FIFO", "links": "zero.tar: a device", "cut.tar": "the file ends in the member"}
    message = (errors | {"huge.tar": "which claims 4398046511104 bytes"}).get(name)
    if message is None:
        assert have.error is None
    else:
        assert message in str(have.error)
    if name == "cut.tar":
        assert have.ids == [str(source) for source in find_images([folder / name]).sources]


def test_labels(folder: Path, tmp_path: Path) -> None:
    captions = open_inputs([folder / "captions.tar"])
    labeller = Labeller("shard", label="shap")
    with pytest.raises(InputError, match="has the label column 'shap': there are shape, txt"):
        labeller.check(peek(captions, write_plan(tmp_path, captions, 9)))
    birds = open_inputs([folder / "images"])
    labeller = Labeller(str(folder / "waterbirds.csv"), label="y", group=("y", "place"), where={"split": "2"})
    labeller.prepare(all_names(birds, write_plan(tmp_path, birds, 5)))
    kept = [labelled for sample in everything(birds[0]).samples if (labelled := labeller.apply(sample)) is not None]
    assert {Path(each.path).name: (each.label, each.group) for each in kept} == {
        f"{n}.jpg": (f"{n % 2}", f"y={n % 2}, place={n // 2 % 2}") for n in range(2, 12, 3)
    }
    deep = everything(open_inputs([folder / "deep"])[0]).samples
    labelled = map(Labeller("parent").apply, deep)
    labels = [each.label for each in labelled if each is not None]
    assert labels == ["abbey", "airfield", "bank"]


def test_photographs_in_shards_are_all_read() -> None:
    if not PHOTOS.is_dir():
        pytest.skip("no photographs beside this checkout")
    (source,) = open_inputs([PHOTOS])
    have = everything(source)
    assert have.error is None
    assert len(have.good) == len({sample.id for sample in have.good}) == 160
    assert {status(sample) for sample in have.good[::20]} == {"ok"}
    labeller = Labeller("shard")
    labeller.check(have.good[:32])
    labels = [labelled.label for sample in have.good if (labelled := labeller.apply(sample)) is not None]
    assert None not in labels
    assert not labeller.notes()
