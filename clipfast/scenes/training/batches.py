"""Batches of training data.

A batch depends only on (seed, stage, step). A run can therefore be resumed at any step, and reads the
same data as a run without interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfast.scenes.captions import caption, prompts
from clipfast.scenes.encoding import encode_assertion, truth_matrix
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.training.config import Config, Stage
from clipfast.scenes.training.heads import DenseTruth
from clipfast.scenes.training.network import MEAN, STD
from clipfast.scenes.training.pool import Pool
from clipfast.scenes.vocabulary import ATTRIBUTES


@dataclass(frozen=True)
class Batch:
    """The data of one step: B images, M captions, and one prompt for each of the C classes.

    images       [B, 3, 64, 64] float, normalised
    dense        targets of the patches, and the scenes' codes
    captions     [M, context] int64 tokens, or None in a stage without texts
    truth        [B, M] bool: caption j is true of image i
    prompts      [C, context] int64 tokens: the classes of every attribute, in the vocabulary's order
    """

    images: Tensor
    dense: DenseTruth
    captions: Tensor | None = None
    truth: Tensor | None = None
    prompts: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        dense = DenseTruth(**{name: value.to(device) for name, value in self.dense.__dict__.items()})
        rest = [None if part is None else part.to(device) for part in (self.captions, self.truth, self.prompts)]
        return Batch(self.images.to(device), dense, *rest)

    def split(self, shards: int) -> list[Batch]:
        """Split into equal parts, each with the captions of its images.

        Raises ValueError if the parts cannot be equal.
        """
        total = len(self.images)
        if total % shards:
            raise ValueError(f"a batch of {total} images cannot be split into {shards} equal parts")
        parts = []
        for number in range(shards):
            rows = slice(number * total // shards, (number + 1) * total // shards)
            dense = DenseTruth(**{name: value[rows] for name, value in self.dense.__dict__.items()})
            if self.captions is None or self.truth is None:
                parts.append(Batch(self.images[rows], dense))
                continue
            texts = len(self.captions)
            own = slice(number * texts // shards, (number + 1) * texts // shards)
            truth = self.truth[rows, own]
            parts.append(Batch(self.images[rows], dense, self.captions[own], truth, self.prompts))
        return parts


def normalise(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [n, 64, 64, 3] to normalised float32 [n, 3, 64, 64]."""
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def dense_truth(pool: Pool, rows: np.ndarray[Any, np.dtype[np.int64]]) -> DenseTruth:
    """The dense targets of some of the pool's scenes."""
    return DenseTruth(
        codes=torch.from_numpy(pool.codes[rows]).long(),
        coverage=torch.from_numpy(pool.coverage[rows]).float() / 255,
        owner=torch.from_numpy(pool.owner[rows]).long(),
        outline=torch.from_numpy(np.unpackbits(pool.outline[rows], axis=2)).float(),
        offset=torch.from_numpy(pool.offset[rows]).float(),
    )


class Batches:
    """Creates the batches of a stage."""

    def __init__(self, config: Config, pool: Pool, tokenizer: Any) -> None:
        self._config = config
        self._pool = pool
        self._tokenizer = tokenizer
        self._tokens: dict[str, list[int]] = {}
        self._prompts = [list(texts.values()) for texts in map(prompts, ATTRIBUTES)]

    def make(self, number: int, stage: Stage, step: int) -> Batch:
        """The data of one step of the `number`-th stage."""
        rng = np.random.default_rng([self._config.seed, number, step])
        rows = rng.integers(0, len(self._pool), stage.batch)
        images, dense = normalise(self._pool.images[rows]), dense_truth(self._pool, rows)
        if not stage.reads_text:
            return Batch(images, dense)
        texts, assertions = [], []
        for row in rows:
            scene = sample_scene(self._config.seed, "train", int(row))
            for _ in range(self._config.texts):
                drawn = caption(scene, rng)
                texts.append(drawn.text)
                assertions.append(encode_assertion(drawn.asserted))
        truth = truth_matrix(self._pool.codes[rows], np.stack(assertions))
        prompt_texts = [options[int(rng.integers(len(options)))] for group in self._prompts for options in group]
        return Batch(images, dense, self._encode(texts), torch.from_numpy(truth), self._encode(prompt_texts))

    def run(self, number: int, stage: Stage, start: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start` to the end of the stage; a thread makes the next batch in the meantime."""
        with ThreadPoolExecutor(1) as thread:
            next_batch = thread.submit(self.make, number, stage, start)
            for step in range(start, stage.steps):
                batch = next_batch.result()
                if step + 1 < stage.steps:
                    next_batch = thread.submit(self.make, number, stage, step + 1)
                yield step, batch

    def class_prompts(self) -> Tensor:
        """Tokens of the first prompt of every class of every attribute, in order: [C, longest]."""
        return self._encode([options[0] for group in self._prompts for options in group])

    def _encode(self, texts: list[str]) -> Tensor:
        """Tokens [n, longest], padded to the longest text only; tokens after the end token have no effect."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        rows = [[start, *self._words(text), end] for text in texts]
        result = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            result[index, : len(row)] = torch.tensor(row)
        return result

    def _words(self, text: str) -> list[int]:
        """Tokens of a caption, cached by word; this skips the tokenizer's slow text cleaning."""
        ids: list[int] = []
        for word in text.replace(",", " ,").split():
            if word not in self._tokens:
                self._tokens[word] = self._tokenizer.encode(word)
            ids += self._tokens[word]
        return ids
