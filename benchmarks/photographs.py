"""Synthetic JPEG files of a photograph's size, and the usual open_clip loop that reads and embeds them."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import clipfast
from clipfast.bench.measuring import seconds
from clipfast.images import open_image
from clipfast.reading import Prepare
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene

SIZE = (640, 480)  # width, height
QUALITY = 90
GRAIN = 8  # standard deviation of the noise, which determines most of the file size
WORKERS = (0, 1, 2)
"""Numbers of loader processes to try."""


def draw(folder: Path, count: int) -> list[Path]:
    """Writes scenes with grain as JPEG files of about 80 kB; the same files every time."""
    paths = []
    for index in range(count):
        rng = np.random.default_rng(index)
        scene = Image.fromarray(render(sample_scene(0, "test", index))).resize(SIZE, Image.Resampling.BICUBIC)
        pixels = np.asarray(scene) + rng.normal(0, GRAIN, (SIZE[1], SIZE[0], 3))
        paths.append(folder / f"{index:04d}.jpg")
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(paths[-1], quality=QUALITY)
    return paths


class Opened(Dataset[Tensor]):
    """The usual data set of open_clip users: open, preprocess."""

    def __init__(self, paths: Sequence[Path], preprocess: Any) -> None:
        self._paths, self._preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._paths[index]) as image:
            return self._preprocess(image)


class Loop:
    """open_clip's own preprocessing in a ``DataLoader``, its own forward under ``inference_mode``.

    The transform is the one that ``create_model_and_transforms`` returns for the module. Worker processes persist
    between calls, as in a long pass, which starts them once.

    Args:
        module: the model.
        paths: image files.
        batch: images per batch.
        workers: loader processes; 0 reads in the main process.
    """

    def __init__(self, module: nn.Module, paths: Sequence[Path], batch: int, workers: int) -> None:
        visual: Any = module.visual
        preprocess = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
        self._module: Any = module
        self._device = next(module.parameters()).device
        self.batches = DataLoader(
            Opened(paths, preprocess), batch_size=batch, num_workers=workers, persistent_workers=workers > 0
        )

    def __call__(self) -> Tensor:
        """Embeddings of all images, ``[K, D]``."""
        with torch.inference_mode():
            return torch.cat([self._module.encode_image(pixels.to(self._device)) for pixels in self.batches])


def best_loop(module: nn.Module, paths: Sequence[Path], batch: int, rounds: int = 3) -> tuple[Loop, dict[str, Any]]:
    """The loop with the fastest number of workers, and the times of all.

    Args:
        module: the model.
        paths: image files.
        batch: images per batch.
        rounds: timed rounds, in which the loops take turns; one untimed round comes first.
    """
    loops = {workers: Loop(module, paths, batch, workers) for workers in WORKERS}
    times_by_workers: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(rounds + 1):
        for workers, loop in loops.items():
            times_by_workers[workers].append(seconds(loop))
    medians = {workers: statistics.median(times[1:]) for workers, times in times_by_workers.items()}
    best = min(medians, key=medians.__getitem__)
    return loops[best], {"num_workers": best, "seconds_by_workers": {str(key): value for key, value in medians.items()}}


def decoding(model: clipfast.Model, paths: Sequence[Path], rounds: int = 3) -> float:
    """Core seconds to read and prepare the files, independent of the load of the machine."""
    prepare = Prepare(model.preprocess)
    times = []
    for _ in range(rounds):
        start = thread_time()
        for path in paths:
            prepare(open_image(path))
        times.append(thread_time() - start)
    return statistics.median(times)
