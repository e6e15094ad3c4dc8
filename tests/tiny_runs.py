"""Runs of examples/train.py that take a second or two."""

import csv
from pathlib import Path
from typing import Any

import torch
from training import files
from training.config import Options, resolve
from training.data import kind_of
from training.distributed import Processes
from training.trainer import Trainer

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = {"embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "mlp_ratio": 2.0, "patch_size": 4}


def tiny_options(data: Path, output: Path, **change: Any) -> Options:
    """Three epochs of twelve steps with a tiny model, for the images of `tiny_images`."""
    values: dict[str, Any] = {
        "data": data,
        "output": output,
        "batch_size": 8,
        "lr": 0.2,
        "crop_padding": 1,
        "epochs": 3,
        "warmup_epochs": 0.2,
        "log_every": 1,
        "locality_images": 4,
        "device": "cpu",
        **MODEL,
    }
    return Options(**(values | change))


def trainer(options: Options) -> Trainer:
    config = resolve(options, kind_of(options.data))
    return Trainer(config, Processes(0, 1, torch.device(config.device)))


def rows(output: Path, name: str = files.STEPS_LOG) -> list[dict[str, str]]:
    """A log without the only column that depends on time."""
    with (output / name).open(newline="") as file:
        return [{key: text for key, text in row.items() if key != "images_per_second"} for row in csv.DictReader(file)]
