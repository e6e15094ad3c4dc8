"""ConViT against its DeiT twin with few training images, and what each part of the ConViT adds.

    python examples/sample_efficiency.py --quick
    python examples/sample_efficiency.py --output runs/sample_efficiency

In the form of Tables 2 and 3 of the paper (d'Ascoli et al., 2021, arXiv 2103.10697), at a small scale: Fashion-MNIST
for ImageNet, a model of 40 thousand parameters, 4000 steps of 16 images. Every run has the same number of steps,
whatever its share of the images, as in the paper. Twins of a seed see the same images in the same order.

A run that has ended is not repeated, one that was killed goes on from its last checkpoint.
"""

import csv
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import data as datasets
import matplotlib as mpl
import torch
import train
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option, Typer

from convit_kernels import models
from convit_kernels.bench.style import PRINT, style

CONVIT, DEIT = "a", "e"  # rows of Table 3
ABLATION_RATIO = 0.1
NAMES = {
    "a": "ConViT",
    "b": "gates frozen",
    "c": "random initialisation",
    "d": "gates frozen, random initialisation",
    "e": "DeiT: plain attention",
    "f": "GPSA frozen, convolutional",
    "g": "GPSA frozen, random",
}
COLOURS = {CONVIT: "#009E73", DEIT: "#0072B2"}
# Top-1 in percent on ImageNet: Table 2 (DeiT-S, ConViT-S) by share, and Table 3 (ConViT-S+) at 10 % by row
PAPER_TABLE_2 = {0.05: (34.8, 47.8), 0.1: (48.0, 59.6), 0.3: (66.1, 73.7), 0.5: (74.6, 78.2), 1.0: (79.9, 81.4)}
PAPER_TABLE_3 = {"a": 59.7, "b": 57.4, "c": 56.9, "d": 54.6, "e": 47.8, "f": 54.3, "g": 44.8}

RESULT = "result.json"
RESULTS, TABLES = "results.csv", "tables.md"
MEASURED = ("test_accuracy", "test_loss", "seconds")  # of a run, in RESULTS
console = Console(stderr=True)


@dataclass(frozen=True)
class Study:
    """What is run: a ConViT and its twin at each ratio, every row of Table 3 at `ABLATION_RATIO`, with each seed."""

    ratios: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    seeds: int = 3
    steps: int = 4000


QUICK = Study(ratios=(0.01, 0.1, 1.0), seeds=1, steps=1500)


@dataclass(frozen=True)
class Run:
    """One training run: a row of Table 3, a share of the images, a seed."""

    row: str
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.ratio:g}-seed{self.seed}"


def runs(study: Study) -> list[Run]:
    """Every run of a study, all those of the first seed first."""
    kinds = [(row, ratio) for ratio in study.ratios for row in (CONVIT, DEIT)]
    kinds += [(row, ABLATION_RATIO) for row in models.ABLATIONS if (row, ABLATION_RATIO) not in kinds]
    return [Run(row, ratio, seed) for seed in range(study.seeds) for row, ratio in kinds]


def run_config(run: Run, study: Study, data: Path, output: Path) -> train.Config:
    """How a run is trained: examples/train.py's recipe with a smaller model, so that there is time for many runs."""
    return train.Config(
        data=data,
        output=output / run.name,
        resume="auto",
        ablation=run.row,  # type: ignore[arg-type]
        sampling_ratio=run.ratio,
        seed=run.seed,
        embed_dim=32,
        depth=4,
        local_up_to_layer=3,
        batch_size=16,
        lr=6.4e-2,
        steps=study.steps,
        warmup_steps=study.steps // 20,
        checkpoint_every=1000,
        evaluate_every=study.steps,
        log_every=100,
        device="cpu",
    )


def settings(config: train.Config) -> dict[str, Any]:
    """What a result depends on, fit for JSON."""
    return {name: value for name, value in vars(config).items() if name not in train.FREE_ON_RESUME}


def finished(config: train.Config) -> dict[str, Any] | None:
    """The result of a run that has ended; raises ValueError where it was run with other settings."""
    path = config.output / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result["settings"] != settings(config):
        raise ValueError(f"{path} is of another study: choose another --output, or remove {config.output.parent}")
    return result


def execute(config: train.Config) -> dict[str, Any]:
    """Trains, and keeps the result, logs and weights; in a process of its own."""
    start = time.perf_counter()
    found = train.train(config, progress=False)
    result = found | {"seconds": time.perf_counter() - start, "settings": settings(config)}
    text = json.dumps(result, indent=2)
    train.write_atomically(config.output / RESULT, lambda temporary: temporary.write_text(text))
    (config.output / train.CHECKPOINT).unlink()
    return result


def run_all(configs: Mapping[Run, train.Config], jobs: int) -> dict[Run, dict[str, Any]]:
    """Every run's result; those that are missing are trained, `jobs` at a time."""
    results = {run: result for run, config in configs.items() if (result := finished(config)) is not None}
    missing = [run for run in configs if run not in results]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs; {task.description}"), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("", total=len(configs), completed=len(results))
        waiting = {pool.submit(execute, configs[run]): run for run in missing}
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                result = results[run] = future.result()
                description = f"{run.name}: {result['test_accuracy']:.1%} in {result['seconds']:.0f} s"
                progress.update(task, advance=1, description=description)
        finally:
            pool.shutdown(cancel_futures=True)
    return {run: results[run] for run in configs}


# What is found

Accuracies = Mapping[tuple[str, float], Sequence[float]]  # percent, by row and ratio, in order of the seeds


def accuracies(results: Mapping[Run, Mapping[str, Any]]) -> Accuracies:
    found: dict[tuple[str, float], list[float]] = {}
    for run, result in results.items():
        found.setdefault((run.row, run.ratio), []).append(100 * result["test_accuracy"])
    return found


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds; of one seed its value alone."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def relative_gap(deit: float, convit: float) -> str:
    return f"{100 * (convit / deit - 1):+.1f} %"


def efficiency_table(found: Accuracies) -> str:
    """In the form of the paper's Table 2."""
    lines = [
        "| images used | DeiT twin | ConViT | gap, of pairs | relative gap | the paper's, ImageNet |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ratio in sorted({ratio for row, ratio in found if row == CONVIT}):
        deit, convit = found[DEIT, ratio], found[CONVIT, ratio]
        gaps = [ours - theirs for ours, theirs in zip(convit, deit, strict=True)]
        relative = relative_gap(statistics.mean(deit), statistics.mean(convit))
        paper = relative_gap(*PAPER_TABLE_2[ratio]) if ratio in PAPER_TABLE_2 else ""
        cells = (f"{ratio:.0%}", spread(deit), spread(convit), spread(gaps, "+"), relative, paper)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(found: Accuracies) -> str:
    """In the form of the paper's Table 3, the column of 10 %."""
    lines = ["| | | accuracy | the paper's, ImageNet |", "| --- | --- | ---: | ---: |"]
    for row, name in NAMES.items():
        lines.append(f"| {row} | {name} | {spread(found[row, ABLATION_RATIO])} | {PAPER_TABLE_3[row]} |")
    return "\n".join(lines)


def report(study: Study, results: Mapping[Run, Mapping[str, Any]], config: train.Config) -> str:
    """Both tables in Markdown, with what they rest on."""
    found = accuracies(results)
    config = train.resolve(config)
    seconds = statistics.median(result["seconds"] for result in results.values())
    over = f"mean ± standard deviation over {study.seeds} seeds" if study.seeds > 1 else "one seed, so no spread"
    return f"""\
A small-scale study. Test accuracy in percent on Fashion-MNIST; {over}. Every run has {study.steps} steps of
{config.batch_size} images: {config.depth} blocks, {config.local_up_to_layer} of them GPSA, {config.num_heads} heads,
{config.embed_dim} channels, patches of {config.patch_size} x {config.patch_size} pixels; {seconds:.0f} s a run. Of two
models with the same seed the images and their order are the same. The paper's figures are of ImageNet, models of 22 to
48 million parameters and 300 epochs: compare the signs, not the sizes. Top-5 of ten classes would say little.

**Sample efficiency** (Table 2)

{efficiency_table(found)}

**Ablation with {ABLATION_RATIO:.0%} of the images** (Table 3)

{ablation_table(found)}
"""


def figure(found: Accuracies) -> Figure:
    """Accuracy by share of the images, and by row of the ablation: means, spread, and every seed as a dot."""
    drawing = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    ratios = sorted({ratio for row, ratio in found if row == CONVIT})
    for row, name, marker in ((CONVIT, "ConViT", "o"), (DEIT, "DeiT twin", "s")):
        samples = [found[row, ratio] for ratio in ratios]
        left.errorbar(
            [100 * ratio for ratio in ratios],
            [statistics.mean(values) for values in samples],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in samples],
            marker=marker,
            capsize=3,
            label=name,
            color=COLOURS[row],
        )
    left.set_xscale("log")
    left.set_xticks([100 * ratio for ratio in ratios], minor=False)
    left.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    left.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    left.set(title="Sample efficiency", xlabel="training images used", ylabel="test accuracy, %")
    left.legend()

    rows = list(NAMES)[::-1]
    for height, row in enumerate(rows):
        values = found[row, ABLATION_RATIO]
        colour = COLOURS.get(row, "#555555")
        right.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, markeredgewidth=0)
        right.plot([statistics.mean(values)], [height], "|", color=colour, markersize=18, markeredgewidth=2)
    right.set_yticks(range(len(rows)), [f"{row}  {NAMES[row]}" for row in rows])
    right.set(title=f"Ablation, {ABLATION_RATIO:.0%} of the images", xlabel="test accuracy, %")
    return drawing


def write_results(study: Study, results: Mapping[Run, Mapping[str, Any]], config: train.Config, output: Path) -> str:
    """results.csv, tables.md, figure.svg and figure.png; returns the tables."""
    lines = [[*dataclasses.astuple(run), *(result[name] for name in MEASURED)] for run, result in results.items()]

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([[*(field.name for field in dataclasses.fields(Run)), *MEASURED], *lines])

    train.write_atomically(output / RESULTS, write_csv)
    text = report(study, results, config)
    train.write_atomically(output / TABLES, lambda temporary: temporary.write_text(text))
    with mpl.rc_context(style(PRINT)):
        drawing = figure(accuracies(results))
        drawing.savefig(output / "figure.svg", metadata={"Date": None})
        drawing.savefig(output / "figure.png", dpi=150)
    return text


def read_results(path: Path) -> dict[Run, dict[str, float]]:
    """What `write_results` wrote into results.csv."""
    with path.open(newline="") as file:
        return {
            Run(line["row"], float(line["ratio"]), int(line["seed"])): {name: float(line[name]) for name in MEASURED}
            for line in csv.DictReader(file)
        }


app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="ConViT against its DeiT twin with few images, and the ablation of the paper's Table 3.")
def main(
    data: Annotated[Path, Option(help="Folder of Fashion-MNIST's IDX files.")] = datasets.FASHION_MNIST,
    output: Annotated[
        Path | None, Option(help="Folder for results; runs/sample_efficiency, or -quick beside it.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="One seed, three shares, fewer steps: ten minutes.")] = False,
    seeds: Annotated[int | None, Option(min=1, help="Runs of each kind.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Steps of every run.")] = None,
    jobs: Annotated[int, Option(min=1, help="Runs side by side; each has its share of the processor's cores.")] = 2,
) -> None:
    study = QUICK if quick else Study()
    study = dataclasses.replace(study, seeds=seeds or study.seeds, steps=steps or study.steps)
    output = output or Path("runs") / ("sample_efficiency-quick" if quick else "sample_efficiency")
    configs = {run: run_config(run, study, data, output) for run in runs(study)}
    try:
        for config in configs.values():
            train.resolve(config)
            finished(config)
    except (FileNotFoundError, ValueError) as error:
        raise train.refusal(error) from error
    results = run_all(configs, jobs)
    text = write_results(study, results, next(iter(configs.values())), output)
    console.print(Markdown(text))
    console.print(f"{RESULTS}, {TABLES} and figure.svg in {output}", highlight=False)


if __name__ == "__main__":
    app()
