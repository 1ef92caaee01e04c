"""Running the command line as its users do, and what it is run on."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
from builders import randomise
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from clipfast.cli.app import run

COMMAND = (sys.executable, "-m", "clipfast")
LAYERS, HEADS = 2, 2
CONTEXT = 12

_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": LAYERS},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_model(folder: Path) -> Path:
    model = CLIP(_CONFIG["embed_dim"], vision_cfg=_CONFIG["vision_cfg"], text_cfg=_CONFIG["text_cfg"])
    randomise(model, seed=3)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": _CONFIG, "preprocess_cfg": preprocess}))
    return folder


def heed_signals() -> None:
    """Resets signals in a child process: background jobs of a shell ignore SIGINT, and under nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_signals,
    )


def clipfast(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def messages(stderr: str) -> list[str]:
    """Lines of stderr but for the one that says which model runs where."""
    return [line for line in stderr.splitlines() if not line.startswith("model ")]


def picture(seed: int = 0, width: int = 48, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_good(folder: Path) -> list[str]:
    """One file per kind of image that must just work; returns their names in order."""
    folder.mkdir(parents=True, exist_ok=True)
    base = picture()
    base.save(folder / "a-rgb.jpg")
    base.convert("CMYK").save(folder / "b-cmyk.jpg")
    base.convert("L").save(folder / "c-grey.png")
    Image.fromarray(np.asarray(base.convert("L"), dtype=np.uint16) * 257).save(folder / "d-sixteen.png")
    transparent = base.convert("RGBA")
    transparent.putalpha(base.convert("L"))
    transparent.save(folder / "e-alpha.png")
    base.quantize(16).save(folder / "f-palette.gif", transparency=3)
    return sorted(path.name for path in folder.iterdir())


def write_bad(folder: Path) -> dict[str, str]:
    """One file per kind of damage; returns names and a word each error must contain."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole.jpg"
    picture(1, 300, 300).save(whole, quality=95)
    data = whole.read_bytes()
    whole.unlink()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html>\n<html><body>404\nnot found</body></html>\n")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "noise.jpg").write_bytes(bytes(range(256)) * 4)
    return {"truncated.jpg": "truncated", "page.jpg": "HTML", "empty.jpg": "empty", "noise.jpg": "not an image"}


def inside(*arguments: object, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """As :func:`clipfast` in this process, for commands that are refused at once; leaves nothing behind."""
    logger = logging.getLogger("clipfast")
    out, err = io.StringIO(), io.StringIO()
    shown, handlers, propagate = warnings.showwarning, list(logger.handlers), logger.propagate
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(argument) for argument in arguments])
    finally:
        warnings.showwarning, logger.handlers[:], logger.propagate = shown, handlers, propagate
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
