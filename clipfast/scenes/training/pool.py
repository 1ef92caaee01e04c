"""A pool of rendered training scenes: drawn once, stored on disk and loaded into memory."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clipfast.files import atomic_write
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.encoding import encode_scene
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import IMAGE_SIZE

PATCH: Final = 8
PATCHES: Final = (IMAGE_SIZE // PATCH) ** 2
_CHUNK: Final = 2000


@dataclass(frozen=True)
class Pool:
    """Scenes 0 to n-1 of the training split.

    images    uint8 [n, 64, 64, 3]
    codes     int8 [n, 14]: rows of `encode_scene`
    coverage  uint8 [n, 64]: the share of each patch that objects cover, 0 to 255
    owner     uint8 [n, 64]: the kind of object (0 or 1) that covers most of the patch
    outline   uint8 [n, 64, 8]: bit mask of the pixels of each patch that objects cover, row by row
    offset    int8 [n, 64, 2]: pixels (x, y) from the centre of the nearest object to that of the patch
    """

    images: NDArray[np.uint8]
    codes: NDArray[np.int8]
    coverage: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    outline: NDArray[np.uint8]
    offset: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.images)


def open_pool(folder: Path, seed: int, size: int, workers: int = 2) -> Pool:
    """Read the pool in `folder`, and draw its missing parts first.

    The pool is drawn in chunks that are renamed into place when complete, so that an interrupted run
    continues where it stopped.
    """
    home = folder / f"pool-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    jobs = [(home, seed, start, min(_CHUNK, size - start)) for start in range(0, size, _CHUNK)]
    missing = [job for job in jobs if not _chunk_path(*job).exists()]
    if len(missing) > 1 and workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as processes:
            processes.map(_draw_chunk, missing, chunksize=1)
    else:
        for job in missing:
            _draw_chunk(job)
    parts = [np.load(_chunk_path(*job)) for job in jobs]
    return Pool(*(np.concatenate([part[name] for part in parts]) for name in _FIELDS))


_FIELDS: Final = ("images", "codes", "coverage", "owner", "outline", "offset")
_Job = tuple[Path, int, int, int]


def _chunk_path(home: Path, seed: int, start: int, count: int) -> Path:
    return home / f"{start:07d}-{count}.npz"


def _draw_chunk(job: _Job) -> None:
    _, seed, start, count = job
    chunk = draw(seed, "train", range(start, start + count))
    path = _chunk_path(*job)
    with atomic_write(path, durable=False) as partial, partial.open("wb") as file:
        np.savez(file, **{name: getattr(chunk, name) for name in _FIELDS})


def draw(seed: int, split: str, indices: range) -> Pool:
    """Render scenes of a split into arrays."""
    images = np.empty((len(indices), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    columns: tuple[list[NDArray[Any]], ...] = ([], [], [], [], [])
    codes, coverage, owner, outline, offset = columns
    for row, index in enumerate(indices):
        scene = sample_scene(seed, split, index)
        images[row], masks = render_with_masks(scene)
        codes.append(encode_scene(scene))
        first = scene.objects[0]
        second = np.array([item.shape != first.shape for item in scene.objects])
        shares = _patch_means(masks)
        other = shares[second].sum(axis=0)
        total = shares.sum(axis=0)
        coverage.append(np.rint(total * 255).astype(np.uint8))
        owner.append((other > total - other).astype(np.uint8))
        outline.append(_patch_bits(np.logical_or.reduce(masks)))
        offset.append(_offsets(scene))
    return Pool(images, *(np.stack(column) for column in columns))


_CENTRES: Final = np.stack(
    np.meshgrid(*(np.arange(IMAGE_SIZE // PATCH) * PATCH + (PATCH - 1) / 2,) * 2), axis=-1
).reshape(PATCHES, 2)


def _offsets(scene: Scene) -> NDArray[np.int8]:
    """Pixels from the nearest object's centre to each patch's centre: [64, 2] (x, y)."""
    differences = _CENTRES[None] - np.array([(item.x, item.y) for item in scene.objects])[:, None]
    nearest = (differences**2).sum(axis=2).argmin(axis=0)
    offsets: NDArray[np.int8] = np.rint(differences[nearest, np.arange(PATCHES)]).astype(np.int8)
    return offsets


def _patch_bits(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A mask's pixels by patch, packed into bits: [64, 64] to [64, 8]."""
    side = IMAGE_SIZE // PATCH
    blocks = mask.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3)
    return np.packbits(blocks.reshape(PATCHES, PATCH * PATCH), axis=1)


def _patch_means(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Share of every patch that each mask covers: [n, 64, 64] to [n, 64], patches in row-major order."""
    side = IMAGE_SIZE // PATCH
    blocks = masks.reshape(len(masks), side, PATCH, side, PATCH)
    shares: NDArray[np.float32] = blocks.mean(axis=(2, 4), dtype=np.float32).reshape(len(masks), PATCHES)
    return shares
