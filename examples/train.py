"""Trains a ConViT, or its DeiT twin, on Fashion-MNIST or on a folder of images.

    python examples/train.py --output runs/first
    python examples/train.py --output runs/first --resume auto
    torchrun --nproc-per-node 2 examples/train.py --data imagenet --model convit_small --amp --output runs/small

Without options Fashion-MNIST gets a small model and a short recipe, a folder of images the recipe of the paper
(d'Ascoli et al., 2021, arXiv 2103.10697). `python examples/train.py --help` lists every option.
"""

import inspect
from typing import Any

from training.config import Options, resolve
from training.data import kind_of
from training.distributed import processes, usable_device
from training.files import WEIGHTS
from training.terminal import console, failures, wrong_input
from training.trainer import Trainer
from typer import Typer

app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Trains a ConViT, or its DeiT twin, on Fashion-MNIST or on a folder of images.")
def main(**given: Any) -> None:
    options = Options(**given)
    with failures():
        with wrong_input():
            config = resolve(options, kind_of(options.data))
            device = usable_device(config.device)
        with processes(device) as group:
            with wrong_input():
                trainer = Trainer(config, group)
            evaluation = trainer.train()
            if group.first:
                accuracy = f"test accuracy {evaluation['test_accuracy']:.2%}"
                console.print(f"{accuracy}, weights in {config.output / WEIGHTS}", highlight=False, soft_wrap=True)


main.__signature__ = inspect.signature(Options)  # type: ignore[attr-defined]  # typer reads the options there

if __name__ == "__main__":
    app()
