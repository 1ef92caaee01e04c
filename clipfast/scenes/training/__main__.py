"""Train the bundled CLIP on the scenes, or export a trained model.

To continue after an interruption, run the command again with the same folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from clipfast.scenes.training.config import read_config
from clipfast.scenes.training.export import export
from clipfast.scenes.training.run import Run

DEFAULT_CONFIG = Path(__file__).with_name("scenes.toml")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.scenes.training", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="TOML file with the settings")
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of the run")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, and processes to draw the pool")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the trained model to this folder")
    parser.add_argument("--export-now", action="store_true", help="with --export: do not train, export the checkpoint")
    options = parser.parse_args(arguments)
    if options.export_now and options.export is None:
        parser.error("--export-now needs --export")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    run = Run(read_config(options.config), options.out, options.device, options.threads)
    if not options.export_now:
        run.train()
    if options.export is not None:
        export(run, options.config, options.export)
    return 0


if __name__ == "__main__":
    sys.exit(main())
