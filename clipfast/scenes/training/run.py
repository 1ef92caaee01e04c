"""The training loop: stages, log, checkpoints and resumption."""

from __future__ import annotations

import csv
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from clipfast.files import atomic_write
from clipfast.scenes.tokenizer import MERGES_FILE, load_tokenizer, write_merges
from clipfast.scenes.training.batches import Batch, Batches, dense_truth, normalise
from clipfast.scenes.training.config import Config, Stage
from clipfast.scenes.training.contrastive import (
    MAX_SCALE,
    image_features,
    pair_loss,
    prompt_loss,
    text_features,
)
from clipfast.scenes.training.heads import Heads
from clipfast.scenes.training.network import build
from clipfast.scenes.training.optim import HybridOptimiser, make_optimiser
from clipfast.scenes.training.pool import Pool, draw, open_pool
from clipfast.scenes.training.reading import read
from clipfast.scenes.training.roles import Roles
from clipfast.scenes.vocabulary import ATTRIBUTES

log = logging.getLogger(__name__)

CHECKPOINT: Final = "checkpoint.pt"
LOG: Final = "log.csv"
_CLIP_NORM: Final = 1.0
_LOSSES: Final = ("loss", "whole", "dense", "pairs", "prompts", "specialisation", "bypass")
COLUMNS: Final = (
    *("stage", "step", "samples", "seconds", "lr"),
    *_LOSSES,
    "dense_shape",
    *ATTRIBUTES,
    *("lookalike_average", "lookalike_worst"),
)
"""Columns of the log. Losses are means since the previous line. Accuracies are on held-out scenes: by
the supervised heads in stages without texts, and by zero-shot prompts in stages with texts."""


class Run:
    """A training run in a folder: `train()` starts it or continues from its checkpoint."""

    def __init__(self, config: Config, out: Path, device: str = "cpu", workers: int = 2) -> None:
        self.config = config
        self.out = out
        self.device = torch.device(device)
        self._workers = workers
        self._threads = ThreadPoolExecutor(config.shards, initializer=torch.set_num_threads, initargs=(1,))
        out.mkdir(parents=True, exist_ok=True)
        write_merges(out / MERGES_FILE)
        self.tokenizer = load_tokenizer(out)
        torch.manual_seed(config.seed)
        self.model = build(config.network, self.tokenizer.vocab_size).to(self.device)
        self.heads = Heads(config.network.vision_width).to(self.device)
        self.stage = 0
        self.step = 0
        self.samples = 0
        self.seconds = 0.0
        self._optimiser_state: dict[str, Any] | None = None
        if (out / CHECKPOINT).exists():
            self._resume()

    def train(self, stop_after: int | None = None) -> bool:
        """Train to the end of the last stage; returns whether it was reached.

        Args:
            stop_after: stop with a checkpoint after this many steps of this call, for tests.
        """
        config = self.config
        pool = open_pool(self.out, config.seed, config.pool, self._workers)
        batches = Batches(config, pool, self.tokenizer)
        held_out = _HeldOut(config, self.device)
        steps_left = math.inf if stop_after is None else stop_after
        for number in range(self.stage, len(config.stages)):
            stage = config.stages[number]
            optimiser = self._optimiser(stage)
            log.info("stage %s: steps %d to %d", stage.name, self.step, stage.steps)
            means = _Means()
            saved = started = time.monotonic()
            for step, batch in batches.run(number, stage, self.step):
                means.add(self._learn(optimiser, stage, step, batch.to(self.device)))
                before = self.samples // config.evaluate_every
                self.step, self.samples = step + 1, self.samples + stage.batch
                now = time.monotonic()
                self.seconds, started = self.seconds + now - started, now
                last = self.step == stage.steps
                if last or self.samples // config.evaluate_every > before:
                    self._write_line(stage, step, means, held_out)
                    means = _Means()
                steps_left -= 1
                if last or steps_left <= 0 or now - saved > config.checkpoint_every:
                    self._save(optimiser, number + 1 if last else number)
                    saved = now
                if steps_left <= 0:
                    return last and number + 1 == len(config.stages)
            self.stage, self.step, self._optimiser_state = number + 1, 0, None
        return True

    def _optimiser(self, stage: Stage) -> HybridOptimiser:
        trained = [self.model, self.heads] if stage.reads_text else [self.model.visual, self.heads]
        optimiser = make_optimiser(trained, stage.lr)
        if self._optimiser_state is not None:
            optimiser.load_state_dict(self._optimiser_state)
            self._optimiser_state = None
        return optimiser

    def _learn(self, optimiser: HybridOptimiser, stage: Stage, step: int, batch: Batch) -> dict[str, float]:
        """Take one step and return the losses of the batch."""
        for group in optimiser.param_groups:
            group["lr"] = stage.rate(step)
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        shards = batch.split(self.config.shards)
        # threads that synchronise once per step lose less time to other programs than threads that
        # synchronise in every matrix product; summing in the order of the shards is reproducible
        results = list(self._threads.map(lambda shard: self._gradients(stage, shard, weights), shards))
        for index, weight in enumerate(weights):
            parts = [gradients[index] for _, gradients in results if gradients[index] is not None]
            weight.grad = torch.stack(parts).sum(dim=0) / len(shards) if parts else None
        torch.nn.utils.clip_grad_norm_(weights, _CLIP_NORM)
        optimiser.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(MAX_SCALE))
        names = results[0][0]
        return {name: sum(losses[name] for losses, _ in results) / len(shards) for name in names}

    def _gradients(self, stage: Stage, shard: Batch, weights: list[Tensor]) -> tuple[dict[str, float], tuple[Any, ...]]:
        losses = self._losses(stage, shard)
        gradients = torch.autograd.grad(losses["loss"], weights, allow_unused=True)
        return {name: float(value.detach()) for name, value in losses.items()}, gradients

    def _losses(self, stage: Stage, batch: Batch) -> dict[str, Tensor]:
        reading = read(self.model.visual, batch.images)
        tokens = reading.tokens
        losses: dict[str, Tensor] = {}
        if stage.whole > 0:
            losses["whole"] = self.heads.whole_loss(tokens[:, 0], batch.dense.codes)[0]
        if stage.dense > 0:
            losses["dense"] = self.heads.dense_loss(tokens[:, 1:], batch.dense)[0]
        if batch.captions is not None and batch.truth is not None and batch.prompts is not None:
            scale = self.model.logit_scale.exp()
            images = image_features(self.model, tokens[:, 0])
            captions = text_features(self.model, batch.captions)
            losses["pairs"] = pair_loss(images, captions, batch.truth, scale)
            prompts = text_features(self.model, batch.prompts)
            losses["prompts"] = prompt_loss(images, prompts, batch.dense.codes, scale)[0]
            if stage.specialisation > 0 or stage.bypass > 0:
                roles = Roles(self.model.visual, reading, prompts, self.config.late)
                losses["specialisation"], losses["bypass"] = roles.specialisation(), roles.bypass()
        weights = {
            "whole": stage.whole,
            "dense": stage.dense,
            "pairs": stage.contrastive,
            "prompts": stage.prompts,
            "specialisation": stage.specialisation,
            "bypass": stage.bypass,
        }
        losses["loss"] = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return losses

    def _write_line(self, stage: Stage, step: int, means: _Means, held_out: _HeldOut) -> None:
        line: dict[str, Any] = {
            "stage": stage.name,
            "step": step + 1,
            "samples": self.samples,
            "seconds": round(self.seconds, 1),
            "lr": f"{stage.rate(step):.3g}",
            **{name: f"{value:.4f}" for name, value in means.values().items()},
            **{name: f"{value:.4f}" for name, value in held_out(self, stage).items()},
        }
        path = self.out / LOG
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(line)
        log.info(" ".join(f"{name}={value}" for name, value in line.items()))

    def _save(self, optimiser: HybridOptimiser, stage: int) -> None:
        stage_ended = stage > self.stage
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": None if stage_ended else optimiser.state_dict(),
            "stage": stage,
            "step": 0 if stage_ended else self.step,
            "samples": self.samples,
            "seconds": self.seconds,
        }
        with atomic_write(self.out / CHECKPOINT) as partial:
            torch.save(state, partial)
        if stage_ended:
            with atomic_write(self.out / f"after-{self.config.stages[self.stage].name}.pt") as partial:
                torch.save(state["model"], partial)

    def _resume(self) -> None:
        state = torch.load(self.out / CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self._optimiser_state = state["optimiser"]
        self.stage, self.step = state["stage"], state["step"]
        self.samples, self.seconds = state["samples"], state["seconds"]
        _cut_log(self.out / LOG, self.samples)
        log.info("resumed at stage %d, step %d, %d samples", self.stage, self.step, self.samples)


def _cut_log(path: Path, samples: int) -> None:
    """Remove lines of the log written after the checkpoint; they will be written again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["samples"]) <= samples)


class _Means:
    """Means of the losses over several steps."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0

    def add(self, losses: dict[str, float]) -> None:
        self._steps += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        return {name: total / max(1, self._steps) for name, total in self._sums.items()}


class _HeldOut:
    """Accuracies on held-out scenes, for the log."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._device = device
        seed = config.seed + 1  # not the seed of the final evaluation, so that tuning cannot leak into it
        self._plain = draw(seed, "test-unbiased", range(config.held_out))
        self._alike = draw(seed, "lookalike", range(config.held_out // 4 * 4 // 2))

    @torch.no_grad()
    def __call__(self, run: Run, stage: Stage) -> dict[str, float]:
        tokens, truth = self._tokens(run, self._plain)
        accuracies = run.heads.whole_loss(tokens[:, 0], truth.codes)[1]
        dense = run.heads.dense_loss(tokens[:, 1:], truth)[1]
        alike, codes = self._tokens(run, self._alike)[0][:, 0], self._alike.codes
        scores = run.heads.whole["shape"](alike)
        if stage.reads_text:
            texts = Batches(run.config, self._plain, run.tokenizer).class_prompts().to(self._device)
            prompts = text_features(run.model, texts)
            images = image_features(run.model, tokens[:, 0])
            accuracies = prompt_loss(images, prompts, truth.codes, run.model.logit_scale.exp())[1]
            scores = image_features(run.model, alike) @ prompts[: len(ATTRIBUTES["shape"])].T
        # the last two shapes are the look-alikes
        predicted_gear = (scores[:, -1] > scores[:, -2]).cpu().numpy()
        correct = predicted_gear == (codes[:, 0] == len(ATTRIBUTES["shape"]) - 1)
        groups = [correct[number::4].mean() for number in range(4)]
        return {
            **accuracies,
            "dense_shape": dense,
            "lookalike_average": float(np.mean(groups)),
            "lookalike_worst": float(np.min(groups)),
        }

    def _tokens(self, run: Run, pool: Pool) -> tuple[Tensor, Any]:
        rows = np.arange(len(pool))
        images = normalise(pool.images).to(self._device)
        tokens = torch.cat([read(run.model.visual, part).tokens for part in torch.split(images, 100)])
        return tokens, Batch(images, dense_truth(pool, rows)).to(self._device).dense
