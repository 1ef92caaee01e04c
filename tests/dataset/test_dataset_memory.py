"""Peak memory of a pass: that of 50,000 images is that of 5,000, from tar shards and from files.

The bound is 5 % of the whole process, about 25 MB: less than 600 bytes for each of the other 45,000 images, so that a
list of their names with a few numbers each is too much.
"""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FEW, MANY = 5_000, 50_000
PER_SHARD, DIFFERENT = 1_000, 200
LARGER = 1.05

PASS = """
import sys
from pathlib import Path

import torch
from builders import clip_model

torch.set_num_threads(1)

from clipfast import wrap
from clipfast.dataset.collecting import collect
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.passes import PassOptions

source, folder, count = sys.argv[1:]
kept = {"codes": "float16", "embeddings": "float16"}
options = PassOptions(kept=kept, batch_size=64, unit_size=1000)
summary = collect(open_inputs([source]), Path(folder), wrap(clip_model()), options, threads=1)
assert summary.statuses == {"ok": int(count)}, summary.statuses
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", peak.split()[1])
"""


def jpegs() -> list[bytes]:
    """Images of 32 to 64 pixels, each different."""
    made = []
    for seed in range(DIFFERENT):
        rng, file = np.random.default_rng(seed), io.BytesIO()
        height, width = rng.integers(32, 65, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def tars(folder: Path, images: list[bytes], count: int) -> str:
    for shard in range(count // PER_SHARD):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                header = tarfile.TarInfo(f"{number:09}.jpg")
                header.size = len(images[number % DIFFERENT])
                tar.addfile(header, io.BytesIO(images[number % DIFFERENT]))
    return f"{folder}/*.tar"


def files(folder: Path, images: list[bytes], count: int) -> str:
    for number in range(count):
        path = folder / f"{number:09}.jpg"
        if number < DIFFERENT:
            path.write_bytes(images[number])
        else:
            os.link(folder / f"{number % DIFFERENT:09}.jpg", path)
    return str(folder)


def peak(source: str, collection: Path, count: int) -> int:
    """Kilobytes that a process needed at most for a pass."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-c", PASS, source, str(collection), str(count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("made", [tars, files], ids=["tars", "files"])
def test_ten_times_the_images_take_the_same_memory(tmp_path: Path, made: object) -> None:
    images, peaks = jpegs(), []
    for count in (FEW, MANY):
        folder = tmp_path / f"images-{count}"
        folder.mkdir()
        source = made(folder, images, count)  # type: ignore[operator]
        peaks.append(peak(source, tmp_path / f"collection-{count}", count))
    few, many = peaks
    print(f"{FEW} images: {few / 1024:.0f} MB; {MANY}: {many / 1024:.0f} MB")
    assert many <= LARGER * few
