"""Makes cluttered Fashion-MNIST: the images of the study and of the model in the box.

python examples/clutter.py --output runs/cluttered
python examples/train.py --data runs/cluttered --output runs/first
python examples/evaluate.py --data runs/cluttered
"""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from training.cluttered import PLAIN, TEST, TRAIN, VALIDATION, make
from training.data import FASHION_MNIST
from training.terminal import wrong_input
from typer import Option, Typer

console = Console()
app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Each picture of Fashion-MNIST at a random place of a larger canvas, among fragments of others.")
def main(
    data: Annotated[Path, Option(help="Folder of Fashion-MNIST's IDX files.")] = FASHION_MNIST,
    output: Annotated[Path, Option(help="Folder for the same files of cluttered images.")] = Path("runs/cluttered"),
) -> None:
    with wrong_input():
        make(data, output)
    console.print(f"{output}: {TRAIN} images for training, {TEST} for the test", soft_wrap=True, highlight=False)
    console.print(
        f"{output / VALIDATION}: {TEST} others for the test; {output / PLAIN}: the same pictures as they are",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    app()
