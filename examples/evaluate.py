"""A trained ConViT on its test images: timm's eager layers against the fused ones, and how local it has stayed.

python examples/evaluate.py                                         the model and the pictures in the box
python examples/evaluate.py --weights runs/first/weights.safetensors
"""

import json
import os
from pathlib import Path
from typing import Annotated

from rich.console import Console
from training.data import FASHION_MNIST, evaluation_plan
from training.distributed import DEFAULT_DEVICE, usable_device
from training.evaluation import (
    attention_figure,
    compare,
    evaluation_table,
    load_fitting,
    locality_table,
    timm_twin,
    verdict,
)
from training.files import load_weights, write_atomically
from training.terminal import failures, progress, wrong_input
from typer import Exit, Option, Typer

from convit_kernels import locality
from convit_kernels.bench.machine import machine
from convit_kernels.bench.style import save

BOX = Path(__file__).parent / "cluttered"
IN_THE_BOX = BOX / "weights.safetensors"
LOCALITY_IMAGES = 256

console = Console()
app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Accuracy and speed of a trained model, with timm's eager layers and with the fused ones.")
def main(
    weights: Annotated[Path, Option(help="weights.safetensors of examples/train.py.")] = IN_THE_BOX,
    data: Annotated[
        Path | None,
        Option(
            help="The data it was trained on: IDX files, or a folder with train/ and val/.",
            show_default=f"the pictures in the box, of other weights {FASHION_MNIST}",
        ),
    ] = None,
    batch: Annotated[int, Option(min=1, help="Images in a batch.")] = 250,
    device: Annotated[str, Option(help="cpu or cuda.")] = DEFAULT_DEVICE,
    picture: Annotated[Path | None, Option(help="Draw where the attention of one patch goes: .png or .svg.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the results as JSON.")] = None,
) -> None:
    with wrong_input():
        for option, file in (("--json", json_file), ("--picture", picture)):
            if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
                raise ValueError(f"{option} {file} cannot be written: give a file in a folder that exists and is yours")
        if picture is not None and picture.suffix not in (".png", ".svg"):
            raise ValueError(f"--picture {picture} must end in .png or .svg")
        where = usable_device(device)
        fused, metadata = load_weights(weights)
        twin = timm_twin(metadata["model"], fused.state_dict())
        folder = data or (BOX if weights == IN_THE_BOX else FASHION_MNIST)
        test = load_fitting(folder, metadata["model"]).test
    models = {"timm, eager": twin.to(where), "fused": fused.to(where)}
    with failures():
        with progress(len(evaluation_plan(len(test.labels), batch)), unit="batch") as show:
            evaluation = compare(models, test, batch, where, show)
        ((images, _),) = test.batches(evaluation_plan(min(LOCALITY_IMAGES, len(test.labels)), LOCALITY_IMAGES))
    layers = locality.nonlocality(fused, images.to(where))

    parameters = sum(parameter.numel() for parameter in fused.parameters())
    size = weights.stat().st_size / 1e6
    console.print(f"{weights}: {parameters} parameters, {size:.2f} MB, float32, {where}, batch {batch}", soft_wrap=True)
    console.print(evaluation_table(evaluation), verdict(evaluation), "", locality_table(layers), sep="\n")
    console.print(
        f"Non-locality: patches between query and key, mean over heads and {len(images)} images (equation 8)."
    )
    if picture is not None:
        with failures():
            save(attention_figure(fused, images[:1].to(where), int(test.labels[0])), picture)
        console.print(f"Where the attention of one patch goes: {picture}", soft_wrap=True)
    if json_file is not None:
        content = {"machine": machine(), "weights": str(weights), "batch": batch} | evaluation._asdict()
        text = json.dumps(content, indent=2) + "\n"
        with failures():
            write_atomically(json_file, lambda temporary: temporary.write_text(text))
    if not evaluation.passed:
        raise Exit(1)


if __name__ == "__main__":
    app()
