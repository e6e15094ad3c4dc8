"""`demo`: timm's ConViT on real photographs, before and after replace_gpsa: differences, time, memory."""

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..bench.machine import machine
from ..bench.measure import interleaved, peak_memory
from ..equivalence import expected
from ..replace import replace_gpsa
from .options import Device, JsonFile
from .output import console, write_json

MODELS = ("convit_tiny", "convit_small", "convit_base")
TOP = 5


def command(
    model: Annotated[
        list[str] | None, typer.Option(help="timm model, may be repeated.", show_default=", ".join(MODELS))
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Real weights (.safetensors or .pth) for one --model.", exists=True, dir_okay=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each implementation, in turn.")] = 7,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """timm's ConViT on real photographs, before and after replace_gpsa: same outputs, less time."""
    import timm

    names = model or list(MODELS)
    known = timm.list_models("convit*")
    for name in names:
        if name not in known:
            raise ValueError(f"timm has no ConViT named {name!r}: allowed are {', '.join(known)}")
    if checkpoint is not None and len(names) != 1:
        raise ValueError(f"--checkpoint holds the weights of one model: give one --model, not {len(names)}")
    before = machine()  # afterwards the load would be the demo's own
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names) * (2 + repeats))
        for name in names:
            progress.update(task, description=name)
            results.append(compare(name, checkpoint, batch, repeats, device, lambda: progress.advance(task)))
    console.print(_table(results, batch, device))
    console.print(_load(before), highlight=False)
    write_json(json_file, {"machine": before, "device": device, "batch": batch, "models": results})
    if not all(result["passed"] for result in results):
        raise typer.Exit(1)


def photographs(batch: int, model: nn.Module) -> Tensor:
    """(batch, 3, 224, 224): crops of scikit-learn's two sample photographs, normalised as the model expects."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from timm.data import resolve_model_data_config
    from torchvision.transforms import v2

    config = resolve_model_data_config(model)
    size = config["input_size"][-1]
    crops: list[Image.Image] = []
    scale = 1.0
    while len(crops) < batch:
        for array in load_sample_images().images:
            image = Image.fromarray(array)
            side = round(max(size, min(image.size) * scale))
            resized = v2.functional.resize(image, [side])
            crops += v2.functional.five_crop(resized, [size])
        scale *= 0.8
    normalise = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    )
    # alternate between the photographs, so that a small batch has both
    order = [crops[index // 2 + (index % 2) * 5] for index in range(10)] + crops[10:]
    return torch.stack([normalise(crop) for crop in order[:batch]])


def build(name: str, checkpoint: Path | None) -> nn.Module:
    """The model with real weights, or with seeded ones in which every branch of GPSA matters."""
    import timm

    from ..bench.implementations import perturb
    from .loading import load_weights, read_checkpoint

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False)
    if checkpoint is None:
        perturb(model)
    else:
        load_weights(model, read_checkpoint(checkpoint), f"{checkpoint} does not hold the weights of {name}")
    return model.eval()


@torch.inference_mode()
def compare(
    name: str, checkpoint: Path | None, batch: int, repeats: int, device: str, step: Callable[[], None]
) -> dict[str, Any]:
    """One model, eager and replaced, on the same photographs; calls `step` 2 + repeats times."""
    from ..bench.compare import times_faster

    eager = build(name, checkpoint)
    images = photographs(batch, eager).to(device)
    eager = eager.to(device)
    models = {dtype: copy.deepcopy(eager).to(dtype) for dtype in (torch.float32, torch.float64)}
    rule = expected(lambda dtype: {"logits": models[dtype](images.to(dtype))}, torch.float32, draws=1)["logits"]
    replaced = copy.deepcopy(eager)
    layers = replace_gpsa(replaced)
    step()

    logits, fused = eager(images), replaced(images)
    agreement = (logits.topk(TOP).indices == fused.topk(TOP).indices).float().mean().item()
    memory = peak_memory(lambda: eager(images), device), peak_memory(lambda: replaced(images), device)
    step()

    calls = {"eager": lambda: eager(images), "replaced": lambda: replaced(images)}
    times = interleaved(calls, device, repeats, step)
    median = [statistics.median(samples) for samples in times.values()]
    return {
        "model": name,
        "weights": str(checkpoint) if checkpoint else "seeded",
        "layers": layers,
        "largest_logit": rule.exact.abs().max().item(),
        "eager_error": rule.eager_error,
        "error": rule.error(fused),
        "allowed_error": rule.allowed,
        "top5_agreement": agreement,
        "eager_ms": median[0] * 1e3,
        "fused_ms": median[1] * 1e3,
        "eager_min_ms": min(times["eager"]) * 1e3,
        "fused_min_ms": min(times["replaced"]) * 1e3,
        "speedup": times_faster(times["eager"], times["replaced"]).times,
        "eager_peak_mb": memory[0] / 1e6,
        "fused_peak_mb": memory[1] / 1e6,
        "passed": layers > 0 and rule.share(fused) <= 1,
    }


def _table(results: Sequence[dict[str, Any]], batch: int, device: str) -> Table:
    """The results, with what the columns mean beneath them."""
    table = Table(
        title=f"timm's ConViT before and after replace_gpsa: batch {batch}, float32, {device}",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for heading in ("eager", "ours", "faster", "error", "allowed", "top-5", "peak MB", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row["model"].removeprefix("convit_"),
            f"{row['eager_ms']:.0f} ms",
            f"{row['fused_ms']:.0f} ms",
            f"[bold]{row['speedup']:.2f}[/bold]",
            f"{row['error']:.1e}",
            f"{row['allowed_error']:.1e}",
            f"{row['top5_agreement']:.0%}",
            f"{row['eager_peak_mb']:.0f}>{row['fused_peak_mb']:.0f}",
            "[green]ok[/green]" if row["passed"] else "[red]FAIL[/red]",
        )
    weights = results[0]["weights"]
    table.caption = (
        "Times: medians of interleaved forward passes; faster: the smaller of their ratio and of the median over pairs "
        "of neighbours. error: the logits' largest against float64; allowed: twice what rounding gives eager. Weights: "
        + ("seeded, gates and positions perturbed." if weights == "seeded" else weights)
    )
    return table


def _load(machine: dict[str, Any]) -> str:
    """How busy the machine was: others' work makes the times longer and less certain."""
    load, cores, threads = machine["load_1_minute"], machine["cores"], machine["threads"]
    load = "unknown" if load is None else f"{load:g}"
    return f"Load of the machine before the run: {load} (1-minute average) on {cores} cores; threads used: {threads}."
