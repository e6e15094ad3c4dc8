"""The study of sample efficiency: what is run, and the tables and the figure of its results.

In the form of Tables 2 and 3 of the paper (d'Ascoli et al., 2021, arXiv 2103.10697), at a small scale: Fashion-MNIST
for ImageNet, a model of 40 thousand parameters, 4000 steps of 16 images. Every run has the same number of steps,
whatever its share of the images, as in the paper. Twins of a seed see the same images in the same order.

A run that has ended is not repeated; one that was killed goes on from its last checkpoint.
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
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from convit_kernels import models
from convit_kernels.bench.style import PRINT, style

from .config import Options, identity, resolve
from .data import kind_of
from .distributed import Processes
from .files import CHECKPOINT, write_atomically
from .terminal import progress
from .trainer import Trainer, train

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
RESULTS, TABLES, FIGURE = "results.csv", "tables.md", "figure.svg"
MEASURED = ("test_accuracy", "test_loss", "seconds")  # of a run, in RESULTS
BEGIN, END = "<!-- tables: begin, written by examples/sample_efficiency.py -->", "<!-- tables: end -->"


# the recipe with a smaller model, so that there is time for many runs
SMALL = Options(
    embed_dim=32, depth=4, local_up_to_layer=3, batch_size=16, lr=6.4e-2, checkpoint_every=1000, log_every=100
)


@dataclass(frozen=True)
class Study:
    """What is run: a ConViT and its twin at each ratio, every row of Table 3 at `ABLATION_RATIO`, with each seed.

    `options` say how each run is trained.
    """

    ratios: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    seeds: int = 3
    steps: int = 4000
    options: Options = SMALL


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


def run_options(run: Run, study: Study, data: Path, output: Path) -> Options:
    """How a run is trained."""
    return dataclasses.replace(
        study.options,
        data=data,
        output=output / run.name,
        resume="auto",
        ablation=run.row,  # type: ignore[arg-type]
        sampling_ratio=run.ratio,
        seed=run.seed,
        steps=study.steps,
        warmup_steps=study.steps // 20,
        evaluate_every=study.steps,
        device="cpu",
    )


def finished(options: Options) -> dict[str, Any] | None:
    """The result of a run that has ended; raises ValueError where it was run with other settings."""
    path = options.output / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result["settings"] != identity(options):
        raise ValueError(f"{path} is of another study: choose another --output, or remove {options.output.parent}")
    return result


def check(all_options: Mapping[Run, Options]) -> None:
    """Raises what would end a run before its first step: FileNotFoundError or ValueError."""
    for options in all_options.values():
        finished(options)
    fewest_images = all_options[min(all_options, key=lambda run: run.ratio)]
    config = resolve(fewest_images, kind_of(fewest_images.data))
    Trainer(config, Processes(0, 1, torch.device(config.device)))


def execute(options: Options) -> dict[str, Any]:
    """Trains, and keeps the result, logs and weights; in a process of its own."""
    start = time.perf_counter()
    evaluation = train(options, show_progress=False)
    result = evaluation | {"seconds": time.perf_counter() - start, "settings": identity(options)}
    text = json.dumps(result, indent=2)
    write_atomically(options.output / RESULT, lambda temporary: temporary.write_text(text))
    (options.output / CHECKPOINT).unlink()
    return result


def run_all(all_options: Mapping[Run, Options], jobs: int) -> dict[Run, dict[str, Any]]:
    """Every run's result; those that are missing are trained, `jobs` at a time."""
    results = {run: result for run, options in all_options.items() if (result := finished(options)) is not None}
    missing = [run for run in all_options if run not in results]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        progress(len(all_options), len(results), "run") as show,
    ):
        waiting = {pool.submit(execute, all_options[run]): run for run in missing}
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                result = results[run] = future.result()
                text = f"{run.name}: {result['test_accuracy']:.1%} in {result['seconds']:.0f} s"
                show(len(results), text, True)
        finally:
            pool.shutdown(cancel_futures=True)
    return {run: results[run] for run in all_options}


# Tables and figure

Accuracies = Mapping[tuple[str, float], Sequence[float]]  # percent, by row and ratio, in order of the seeds


def accuracies(results: Mapping[Run, Mapping[str, Any]]) -> Accuracies:
    by_kind: dict[tuple[str, float], list[float]] = {}
    for run, result in results.items():
        by_kind.setdefault((run.row, run.ratio), []).append(100 * result["test_accuracy"])
    return by_kind


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds; of one seed its value alone."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def relative_gap(deit: float, convit: float) -> str:
    return f"{100 * (convit / deit - 1):+.1f} %"


def efficiency_table(scores: Accuracies) -> str:
    """In the form of the paper's Table 2."""
    lines = [
        "| images used | DeiT twin | ConViT | gap, of pairs | relative gap | the paper's, ImageNet |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ratio in sorted({ratio for row, ratio in scores if row == CONVIT}):
        deit, convit = scores[DEIT, ratio], scores[CONVIT, ratio]
        gaps = [ours - theirs for ours, theirs in zip(convit, deit, strict=True)]
        relative = relative_gap(statistics.mean(deit), statistics.mean(convit))
        paper = relative_gap(*PAPER_TABLE_2[ratio]) if ratio in PAPER_TABLE_2 else ""
        cells = (f"{ratio:.0%}", spread(deit), spread(convit), spread(gaps, "+"), relative, paper)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(scores: Accuracies) -> str:
    """In the form of the paper's Table 3, the column of 10 %."""
    lines = ["| | | accuracy | the paper's, ImageNet |", "| --- | --- | ---: | ---: |"]
    for row, name in NAMES.items():
        lines.append(f"| {row} | {name} | {spread(scores[row, ABLATION_RATIO])} | {PAPER_TABLE_3[row]} |")
    return "\n".join(lines)


def report(study: Study, results: Mapping[Run, Mapping[str, Any]]) -> str:
    """Both tables in Markdown, with what they rest on."""
    scores = accuracies(results)
    config = resolve(study.options, "idx")
    over = f"mean ± standard deviation over {study.seeds} seeds" if study.seeds > 1 else "one seed, so no spread"
    return f"""\
Test accuracy in percent on Fashion-MNIST, {over}. Every run has {study.steps} steps of {config.batch_size} images:
{config.depth} blocks, {config.local_up_to_layer} of them GPSA, {config.num_heads} heads, {config.embed_dim} channels, \
patches of {config.patch_size} x {config.patch_size} pixels. Two models of the same seed see
the same images in the same order. The paper's figures are of ImageNet, models of 22 to 48 million parameters and 300
epochs: compare the signs, not the sizes. Top-5 of ten classes would say little.

**Sample efficiency** (Table 2)

{efficiency_table(scores)}

**Ablation with {ABLATION_RATIO:.0%} of the images** (Table 3)

{ablation_table(scores)}
"""


def figure(scores: Accuracies) -> Figure:
    """Accuracy by share of the images, and by row of the ablation: means, spread, and every seed as a dot."""
    drawing = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    ratios = sorted({ratio for row, ratio in scores if row == CONVIT})
    for row, name, marker in ((CONVIT, "ConViT", "o"), (DEIT, "DeiT twin", "s")):
        samples = [scores[row, ratio] for ratio in ratios]
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
        values = scores[row, ABLATION_RATIO]
        colour = COLOURS.get(row, "#555555")
        right.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, markeredgewidth=0)
        right.plot([statistics.mean(values)], [height], "|", color=colour, markersize=18, markeredgewidth=2)
    right.set_yticks(range(len(rows)), [f"{row}  {NAMES[row]}" for row in rows])
    right.set(title=f"Ablation, {ABLATION_RATIO:.0%} of the images", xlabel="test accuracy, %")
    return drawing


def write_results(results: Mapping[Run, Mapping[str, Any]], output: Path) -> None:
    """Writes results.csv and figure.svg."""
    lines = [[*dataclasses.astuple(run), *(result[name] for name in MEASURED)] for run, result in results.items()]

    def write_csv(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([[*(field.name for field in dataclasses.fields(Run)), *MEASURED], *lines])

    write_atomically(output / RESULTS, write_csv)
    with mpl.rc_context(style(PRINT)):
        drawing = figure(accuracies(results))
        write_atomically(
            output / FIGURE, lambda temporary: drawing.savefig(temporary, format="svg", metadata={"Date": None})
        )


def read_results(path: Path, study: Study) -> dict[Run, dict[str, float]]:
    """What `write_results` wrote into results.csv.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has other runs than the study.
    """
    with path.open(newline="") as file:
        results = {
            Run(line["row"], float(line["ratio"]), int(line["seed"])): {name: float(line[name]) for name in MEASURED}
            for line in csv.DictReader(file)
        }
    if set(results) != set(runs(study)):
        raise ValueError(f"{path} has other runs than this study: give the --quick and --seeds that it was made with")
    return results


def place_for_tables(page: Path) -> tuple[str, str]:
    """What a page has before and after its tables; raises ValueError where the markers are missing."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the tables: put {BEGIN} and {END} where they belong")
    return before, after


def write_page(page: Path, tables: str) -> None:
    """Puts the tables between the page's markers; raises ValueError where it has none."""
    before, after = place_for_tables(page)
    write_atomically(page, lambda file: file.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}"))
