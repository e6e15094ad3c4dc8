"""A trained ConViT on its test images: timm's eager layers against the fused ones, and how local it has stayed.

    python examples/evaluate.py                                         the model that comes with the project
    python examples/evaluate.py --weights runs/first/weights.safetensors

Both get the same weights and the same batches, in turn. They must agree: the largest difference of their logits may be
twice what eager's float32 differs from float64.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import data as datasets
import torch
import train
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timm.models.convit import ConVit
from torch import Tensor, nn
from typer import Exit, Option, Typer

from convit_kernels import locality
from convit_kernels.bench.compare import times_faster
from convit_kernels.bench.machine import machine
from convit_kernels.equivalence import expected

IN_THE_BOX = Path(__file__).parent / "fashion_mnist" / "weights.safetensors"
CHECKED_BATCHES = 4  # held to float64, which takes its time
LOCALITY_IMAGES = 256

console = Console()


class Evaluation(NamedTuple):
    """What was found on the test images; times and rates of the whole split."""

    images: int
    accuracy: dict[str, float]  # by contender, a share
    images_per_second: dict[str, float]
    times_faster: dict[str, float]  # than eager, by the same rule as the benchmarks'
    differing_predictions: int
    checked_images: int
    error: float  # of the fused logits against float64, in the checked batch where it is nearest to what is allowed
    allowed_error: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed_error


def timm_twin(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """timm's ConViT with the weights of ours.

    Raises:
        ValueError: timm has no such model.
    """
    if arguments["stem"] != "patch":
        raise ValueError("timm's ConViT has no convolutional stem, so there is nothing to compare this model with")
    names = ("patch_size", "in_chans", "num_classes", "depth", "num_heads", "mlp_ratio", "local_up_to_layer")
    model: nn.Module = ConVit(
        img_size=tuple(arguments["img_size"]),  # type: ignore[arg-type]  # a pair is as good
        embed_dim=arguments["embed_dim"] // arguments["num_heads"],  # timm's class multiplies it by the heads
        use_pos_embed=arguments["use_pos_embed"],
        **{name: arguments[name] for name in names},
    )
    model.load_state_dict(state)
    return model.eval()


def _logits(models: Mapping[torch.dtype, nn.Module], images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"logits": models[dtype](images.to(dtype)).cpu()}


@torch.inference_mode()
def compare(
    models: Mapping[str, nn.Module], test: datasets.Split, batch: int, device: str, step: Callable[[], None]
) -> Evaluation:
    """Both models, eager first, on every test image, batch by batch in turn; calls `step` after each batch."""
    eager, fused = models
    of_dtype = {torch.float32: models[eager], torch.float64: copy.deepcopy(models[eager]).double()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    correct = dict.fromkeys(models, 0)
    differing = checked = 0
    error, allowed = 0.0, 0.0
    plan = datasets.evaluation_plan(len(test.labels), batch)
    for number, (images, labels) in enumerate(test.batches([plan[0], *plan])):
        images = images.to(device)
        logits: dict[str, Tensor] = {}
        for name, model in models.items():
            begin = time.perf_counter()
            logits[name] = model(images).cpu()
            if number:  # the first batch only warms up
                seconds[name].append(time.perf_counter() - begin)
        if number == 0:
            continue
        predicted = {name: values.argmax(1) for name, values in logits.items()}
        for name in models:
            correct[name] += int((predicted[name] == labels).sum())
        differing += int((predicted[eager] != predicted[fused]).sum())
        if number <= CHECKED_BATCHES:
            rule = expected(partial(_logits, of_dtype, images), torch.float32, draws=1)["logits"]
            if error <= allowed * rule.share(logits[fused]):
                error, allowed = rule.error(logits[fused]), rule.allowed
            checked += len(images)
        step()
    count = len(test.labels)
    return Evaluation(
        images=count,
        accuracy={name: value / count for name, value in correct.items()},
        images_per_second={name: count / sum(values) for name, values in seconds.items()},
        times_faster={name: times_faster(seconds[eager], values).times for name, values in seconds.items()},
        differing_predictions=differing,
        checked_images=checked,
        error=error,
        allowed_error=allowed,
    )


def test_images(data: Path, arguments: Mapping[str, Any], device: str) -> datasets.Split:
    """The test split that a model with these arguments can take.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: it is damaged, or its images or classes are not the model's.
    """
    size = arguments["img_size"][0] if datasets.kind_of(data) == "folder" else None
    loaded = train.load_data(train.resolve(train.Config(data=data, device=device, img_size=size)))
    given = {"img_size": list(loaded.img_size), "in_chans": loaded.in_chans, "num_classes": len(loaded.classes)}
    wrong = [f"{name} {value}, not {arguments[name]}" for name, value in given.items() if value != arguments[name]]
    if wrong:
        raise ValueError(f"{data} does not fit the model: it has {', '.join(wrong)}")
    return loaded.test


def evaluation_table(found: Evaluation) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("accuracy", "images/s", "times faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rate in found.images_per_second.items():
        table.add_row(name, f"{found.accuracy[name]:.2%}", f"{rate:.0f}", f"{found.times_faster[name]:.2f}")
    return table


def verdict(found: Evaluation) -> str:
    """Whether both agree, for a reader."""
    return (
        f"{found.images} test images, {found.differing_predictions} of them predicted differently. Logits are off by "
        f"{found.error:.1e} from float64, allowed are {found.allowed_error:.1e}, twice what rounding gives eager "
        f"({found.checked_images} images): {'ok' if found.passed else 'FAIL'}"
    )


def locality_table(layers: Sequence[locality.LayerLocality]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for heading in ("non-locality", "of content", "of position"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("share of position, by head")
    for layer in layers:
        parts = (layer.nonlocality, layer.content, layer.position)
        cells = ["" if part is None else f"{part.mean():.2f}" for part in parts]
        gates = "plain attention" if layer.gate is None else " ".join(f"{gate:.2f}" for gate in layer.gate.tolist())
        table.add_row(layer.name, *cells, gates)
    return table


app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Accuracy and speed of a trained model, with timm's eager layers and with the fused ones.")
def main(
    weights: Annotated[Path, Option(help="weights.safetensors of examples/train.py.")] = IN_THE_BOX,
    data: Annotated[Path, Option(help="The data it was trained on: IDX files, or a folder with train/ and val/.")] = (
        datasets.FASHION_MNIST
    ),
    batch: Annotated[int, Option(min=1, help="Images in a batch.")] = 250,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    skip_without_data: Annotated[
        bool, Option("--skip-without-data", help="Where there are no images, say so and end well.")
    ] = False,
    json_file: Annotated[Path | None, Option("--json", help="Write what was found here as JSON.")] = None,
) -> None:
    try:
        fused, metadata = train.load_weights(weights)
        twin = timm_twin(metadata["model"], fused.state_dict())
    except (FileNotFoundError, ValueError) as error:
        raise train.refusal(error, console) from error
    try:
        test = test_images(data, metadata["model"], device)
    except FileNotFoundError as error:
        if not skip_without_data:
            raise train.refusal(error, console) from error
        console.print(f"The trained model was not tried: {error}", style="yellow", markup=False, soft_wrap=True)
        return
    except ValueError as error:
        raise train.refusal(error, console) from error
    models = {"timm, eager": twin.to(device), "fused": fused.to(device)}
    columns = (TextColumn("testing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        plan = len(datasets.evaluation_plan(len(test.labels), batch))
        task = progress.add_task("", total=plan)
        found = compare(models, test, batch, device, lambda: progress.advance(task))
    ((images, _),) = test.batches(datasets.evaluation_plan(min(LOCALITY_IMAGES, len(test.labels)), LOCALITY_IMAGES))
    layers = locality.nonlocality(fused, images.to(device))

    parameters = sum(parameter.numel() for parameter in fused.parameters())
    size = weights.stat().st_size / 1e6
    console.print(
        f"{weights}: {parameters} parameters, {size:.2f} MB, float32, {device}, batch {batch}", soft_wrap=True
    )
    console.print(evaluation_table(found), verdict(found), "", locality_table(layers), sep="\n")
    console.print(
        f"Non-locality: patches between query and key, mean over heads and {len(images)} images (equation 8)."
    )
    if json_file is not None:
        content = {"machine": machine(), "weights": str(weights), "batch": batch} | found._asdict()
        json_file.write_text(json.dumps(content, indent=2) + "\n")
    if not found.passed:
        raise Exit(1)


if __name__ == "__main__":
    app()
