"""Settings of the training, read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clipfast.scenes.training.network import NetworkConfig


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    samples    images in total
    batch      images per step
    lr         the highest learning rate
    floor      the final learning rate, as a share of the highest
    rise       steps of the linear warmup
    fall       share of the samples, at the end, over which the rate falls linearly to the floor
    whole, dense, contrastive, prompts    weights of the losses (0: the loss is not computed)
    specialisation, bypass    weights of the losses on the roles of heads, in stages with texts
    """

    name: str
    samples: int
    batch: int
    lr: float
    floor: float = 0.05
    rise: int = 40
    fall: float = 0.5
    whole: float = 1.0
    dense: float = 1.0
    contrastive: float = 0.0
    prompts: float = 0.0
    specialisation: float = 0.0
    bypass: float = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps in the stage."""
        return -(-self.samples // self.batch)

    @property
    def reads_text(self) -> bool:
        """Whether the stage trains the text tower."""
        return self.contrastive > 0 or self.prompts > 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warmup, plateau, linear decay."""
        left = (self.steps - step) / max(1.0, self.fall * self.steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.rise)) * (self.floor + (1 - self.floor) * min(1.0, left))


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    seed              seed of the scenes, the weights and the order of the samples
    pool              number of training scenes
    texts             captions per image and step
    late              number of last layers whose heads should determine the embedding
    shards            parts of a batch; each is computed by one thread
    held_out          scenes for the accuracies in the log
    evaluate_every    samples between two lines of the log
    checkpoint_every  seconds between two checkpoints
    """

    seed: int = 0
    pool: int = 160_000
    texts: int = 2
    late: int = 4
    shards: int = 2
    held_out: int = 400
    evaluate_every: int = 10_000
    checkpoint_every: float = 180.0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    stages: tuple[Stage, ...] = ()


def read_config(path: Path) -> Config:
    """Read a TOML file; raises ValueError for unknown keys and for a file without stages."""
    with path.open("rb") as file:
        data = tomllib.load(file)
    stages = tuple(_fill(Stage, entry, path) for entry in data.pop("stage", []))
    if not stages:
        raise ValueError(f"{path}: no [[stage]] section")
    network = _fill(NetworkConfig, data.pop("network", {}), path)
    return _fill(Config, {**data, "network": network, "stages": stages}, path)  # type: ignore[no-any-return]


def _fill(kind: Any, entry: dict[str, Any], path: Path) -> Any:
    unknown = set(entry) - {item.name for item in fields(kind)}
    if unknown:
        raise ValueError(f"{path}: unknown keys for {kind.__name__}: {', '.join(sorted(unknown))}")
    return kind(**entry)
