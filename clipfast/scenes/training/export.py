"""Write a trained model as a folder that open_clip can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from clipfast.files import atomic_write, write_text
from clipfast.scenes.tokenizer import MERGES_FILE, write_merges
from clipfast.scenes.training.curve import write_curve
from clipfast.scenes.training.network import MEAN, STD, model_config
from clipfast.scenes.training.run import LOG, Run

CONFIG_FILE: Final = "open_clip_config.json"
WEIGHTS_FILE: Final = "open_clip_model.safetensors"


def export(run: Run, config: Path, folder: Path) -> None:
    """Write weights (float16), configuration, merges, settings, log and loss curve into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu() for name, value in run.model.state_dict().items()}
    rounded = {
        name: value.to(torch.float16).contiguous() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    with atomic_write(folder / WEIGHTS_FILE) as partial:
        save_file(rounded, str(partial))
    settings = {
        "model_cfg": model_config(run.config.network, run.tokenizer.vocab_size),
        "preprocess_cfg": {
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    write_text(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    write_merges(folder / MERGES_FILE)
    shutil.copyfile(config, folder / "training.toml")
    if (run.out / LOG).exists():
        shutil.copyfile(run.out / LOG, folder / "training_log.csv")
        write_curve(run.out / LOG, folder / "training_curve.svg")
