"""A trained model on its test images: timm's eager layers against the fused ones.

Both get the same weights and the same batches, in turn. They must agree: the largest difference of their logits may be
twice what eager's float32 differs from float64.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from timm.models.convit import ConVit
from torch import Tensor, nn

from convit_kernels import locality
from convit_kernels.bench.compare import times_faster
from convit_kernels.bench.style import subplots
from convit_kernels.equivalence import expected
from convit_kernels.models import ConViT

from . import data as datasets
from .terminal import Show

CHECKED_BATCHES, CHECKED_IMAGES = 4, 32  # batches and images of each held to float64, which takes its time


class Evaluation(NamedTuple):
    """What both implementations did on the test images; times and rates of the whole split."""

    images: int
    accuracy: dict[str, float]  # by implementation, a share
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
    models: Mapping[str, nn.Module], test: datasets.Split, batch: int, device: torch.device, show: Show
) -> Evaluation:
    """Both models, eager first, on every test image, batch by batch in turn; calls `show` after each batch."""
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
            rule = expected(partial(_logits, of_dtype, images[:CHECKED_IMAGES]), torch.float32, draws=1)["logits"]
            of_checked = logits[fused][:CHECKED_IMAGES]
            if error <= allowed * rule.share(of_checked):
                error, allowed = rule.error(of_checked), rule.allowed
            checked += len(of_checked)
        show(number, "", False)
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


def load_fitting(path: Path, arguments: Mapping[str, Any], workers: int = 2) -> datasets.Data:
    """The data that a model with these arguments can take.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: it is damaged, or its images or classes are not the model's.
    """
    data = datasets.load(path, arguments["img_size"][0], workers, datasets.Augmentation())
    given = {"img_size": list(data.img_size), "in_chans": data.in_chans, "num_classes": len(data.classes)}
    wrong = [f"{name} {value}, not {arguments[name]}" for name, value in given.items() if value != arguments[name]]
    if wrong:
        raise ValueError(f"{path} does not fit the model: it has {', '.join(wrong)}")
    return data


def attention_figure(model: ConViT, image: Tensor, label: int) -> Figure:
    """An image and, for each layer and head, where the patch in its middle looks.

    Args:
        image: (1, C, H, W), normalised.
        label: its class.
    """
    rows, columns = (side // model.patch_size for side in image.shape[-2:])
    query = rows // 2, columns // 2
    maps = locality.attention_maps(model, image, query)
    heads = max(len(of_layer[0]) for of_layer in maps.values())
    drawing, panels = subplots(1.6 * (heads + 1), 1.7 * len(maps), len(maps), heads + 1)
    with torch.inference_mode():
        predicted = int(model(image).argmax())
    shown = image[0].mean(0).cpu().numpy()
    for panel in panels:
        panel.axis("off")
    for line, (name, of_layer) in enumerate(maps.items()):
        first, *of_heads = panels[line * (heads + 1) : (line + 1) * (heads + 1)]
        first.imshow(shown, cmap="gray", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        first.plot(query[1], query[0], "s", color="#D55E00", fillstyle="none")
        first.set_title(f"class {label}, predicted {predicted}" if line == 0 else name, fontsize=7)
        for head, (panel, map_) in enumerate(zip(of_heads, of_layer[0].cpu(), strict=False)):
            panel.imshow(map_.numpy(), cmap="viridis", vmin=0)
            panel.set_title(f"{name}, head {head + 1}", fontsize=7)
    return drawing


def evaluation_table(evaluation: Evaluation) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("accuracy", "images/s", "times faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rate in evaluation.images_per_second.items():
        table.add_row(name, f"{evaluation.accuracy[name]:.2%}", f"{rate:.0f}", f"{evaluation.times_faster[name]:.2f}")
    return table


def verdict(evaluation: Evaluation) -> str:
    """Whether both agree, for a reader."""
    return (
        f"{evaluation.images} test images, {evaluation.differing_predictions} of them predicted differently. Logits "
        f"are off by {evaluation.error:.1e} from float64, allowed are {evaluation.allowed_error:.1e}, twice what "
        f"rounding gives eager ({evaluation.checked_images} images): {'ok' if evaluation.passed else 'FAIL'}"
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
