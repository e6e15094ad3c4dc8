"""The study of sample efficiency: what is run, how its settings are chosen, what is kept of it.

In the form of Tables 2 and 3 of the paper (d'Ascoli et al., 2021, arXiv 2103.10697), at a small scale: cluttered
Fashion-MNIST (`cluttered`) for ImageNet, and as a second task the same pictures as they are. A ConViT, its DeiT twin
and a plain CNN of the same width and depth learn from shares of the training images; each run has the same number of
steps, whatever its share, as in the paper. Models of a seed see the same images in the same order.

The learning rate of each of the three families is chosen among the same few on a validation part of the training
split, with a tenth of the images; the rows of the ablation have ConViT's.

A run that has ended is not repeated; one that was killed goes on from its last checkpoint.
"""

import csv
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from convit_kernels.bench.machine import describe, machine

from . import cluttered
from .config import Options, identity, resolve
from .data import kind_of
from .distributed import Processes
from .files import CHECKPOINT, EVALUATIONS_LOG, STEPS_LOG, write_atomically
from .terminal import progress
from .trainer import Trainer

CONVIT, DEIT, CNN = "a", "e", "cnn"  # ConViT and DeiT are rows of the paper's Table 3
ABLATION = ("a", "b", "c", "d", "e")
REFERENCE, BFLOAT16 = "reference", "bfloat16"  # ConViT again: with the reference's layers, and under autocast
FAMILIES = (CONVIT, DEIT, CNN)
CLUTTERED, PLAIN = "cluttered", cluttered.PLAIN  # tasks
VALIDATION, LONGER = cluttered.VALIDATION, "longer"  # cluttered as well: for choosing, and with more steps
ABLATION_RATIO = 0.1
TIMES_LONGER = 4

DATA, RESULT = "data", "result.json"
RESULTS, CURVES = "results.csv", "curves.csv"
# of a run, in RESULTS; in shares, images of training, and seconds with all evaluations
MEASURED = ("test_accuracy", "test_loss", "train_accuracy", "images_per_second", "seconds")

SMALL = Options(
    embed_dim=48,
    depth=4,
    local_up_to_layer=3,
    batch_size=16,
    crop_padding=0,
    checkpoint_every=300,
    log_every=50,
    locality_images=64,
)


@dataclass(frozen=True)
class Study:
    """What is run: the three families at each ratio on both tasks, each row of `ABLATION` at `ABLATION_RATIO`.

    And of one seed, with the largest share, each family in `TIMES_LONGER` as many steps: what is left unlearnt.

    Attributes:
        seeds: of each run but those that choose.
        steps: of each run; half of them of those that choose.
        lrs: learning rates to choose among, of 512 images a step; of one nothing is chosen.
        evaluations: of a run, evenly over its steps; of those that choose one, at the end.
        options: how each run is trained.
    """

    ratios: tuple[float, ...] = (0.05, 0.1, 1.0)
    seeds: int = 3
    steps: int = 1200
    lrs: tuple[float, ...] = (1.6e-2, 3.2e-2, 6.4e-2)
    evaluations: int = 10
    options: Options = SMALL


QUICK = Study(ratios=(0.1, 1.0), seeds=1, steps=150, lrs=(3.2e-2,), evaluations=2)


@dataclass(frozen=True)
class Run:
    """One training run: on a task, of a family or a row of Table 3, with a share of the images, a seed, a rate."""

    task: str
    row: str
    ratio: float
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.row}-{self.ratio:g}-lr{self.lr:g}-seed{self.seed}"


Results = Mapping[Run, Mapping[str, Any]]


def family(row: str) -> str:
    """Whose learning rate a row has."""
    return row if row in FAMILIES else CONVIT


def choosing(study: Study) -> list[Run]:
    """The runs that choose each family's learning rate."""
    if len(study.lrs) == 1:
        return []
    return [Run(VALIDATION, row, ABLATION_RATIO, 0, lr) for lr in study.lrs for row in FAMILIES]


def chosen(study: Study, results: Results) -> dict[str, float]:
    """Each family's learning rate: that of the best validation accuracy, of equal ones the smallest."""
    if len(study.lrs) == 1:
        return dict.fromkeys(FAMILIES, study.lrs[0])
    accuracy = {(run.row, run.lr): results[run]["test_accuracy"] for run in choosing(study)}
    return {row: max(sorted(study.lrs), key=lambda lr: accuracy[row, lr]) for row in FAMILIES}


def runs(study: Study, lrs: Mapping[str, float]) -> list[Run]:
    """Every other run of a study, all those of the first seed first."""
    kinds = [(task, row, ratio) for task in (CLUTTERED, PLAIN) for ratio in study.ratios for row in FAMILIES]
    kinds += [(CLUTTERED, row, ABLATION_RATIO) for row in ABLATION]
    found = [
        Run(task, row, ratio, seed, lrs[family(row)])
        for seed in range(study.seeds)
        for task, row, ratio in dict.fromkeys(kinds)
    ]
    found += [Run(CLUTTERED, row, ABLATION_RATIO, 0, lrs[CONVIT]) for row in (REFERENCE, BFLOAT16)]
    return found + [Run(LONGER, row, max(study.ratios), 0, lrs[row]) for row in FAMILIES]


def run_options(run: Run, study: Study, output: Path) -> Options:
    """How a run is trained, on what was made of Fashion-MNIST in `output`."""
    data = output / DATA
    steps = {VALIDATION: study.steps // 2, LONGER: study.steps * TIMES_LONGER}.get(run.task, study.steps)
    return dataclasses.replace(
        study.options,
        data=data / run.task if run.task in (PLAIN, VALIDATION) else data,
        output=output / run.name,
        resume="auto",
        ablation=run.row if run.row in ABLATION else "a",  # type: ignore[arg-type]
        cnn=run.row == CNN,
        reference=run.row == REFERENCE,
        amp=run.row == BFLOAT16,
        sampling_ratio=run.ratio,
        seed=run.seed,
        lr=run.lr,
        steps=steps,
        warmup_steps=steps // 20,
        evaluate_every=steps if run.task == VALIDATION else max(1, steps // study.evaluations),
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


def trainer(options: Options) -> Trainer:
    config = resolve(options, kind_of(options.data))
    return Trainer(config, Processes(0, 1, torch.device(config.device)))


def execute(options: Options) -> dict[str, Any]:
    """Trains, and keeps the result, logs and weights; in a process of its own."""
    start = time.perf_counter()
    run = trainer(options)
    result: dict[str, Any] = dict(run.train(show_progress=False))
    result["train_accuracy"] = run.evaluate(run.data.train)["test_accuracy"]
    with (options.output / STEPS_LOG).open(newline="") as file:
        result["images_per_second"] = statistics.median(float(row["images_per_second"]) for row in csv.DictReader(file))
    result |= {"seconds": time.perf_counter() - start, "machine": describe(machine()), "settings": identity(options)}
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


def prepare(study: Study, data: Path, output: Path) -> None:
    """Makes the data of a study.

    Raises:
        FileNotFoundError, ValueError: there are no such data, or `output` holds another study.
    """
    cluttered.make(data, output / DATA)
    first = choosing(study) or runs(study, chosen(study, {}))
    all_options = {run: run_options(run, study, output) for run in first}
    for options in all_options.values():
        finished(options)
    trainer(all_options[min(first, key=lambda run: run.ratio)])


def carry_out(study: Study, output: Path, jobs: int) -> dict[Run, dict[str, Any]]:
    """All runs of a study that is prepared: those that choose, then all others."""
    results = run_all({run: run_options(run, study, output) for run in choosing(study)}, jobs)
    rest = {run: run_options(run, study, output) for run in runs(study, chosen(study, results))}
    return results | run_all(rest, jobs)


# Files

Curve = list[dict[str, float]]  # a row for each evaluation


def curve(output: Path) -> Curve:
    """What a run's log of evaluations says: step, test_accuracy and, where a model has them, the means over the heads
    of non-locality and gate of each layer, `nonlocality_0` and `gate_0`."""
    found = []
    with (output / EVALUATIONS_LOG).open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if value}
            point = {name: values[name] for name in ("step", "test_accuracy") if name in values}
            point |= {name: value for name, value in values.items() if name.startswith("nonlocality_")}
            gates: dict[str, list[float]] = {}
            for name, value in values.items():
                if name.startswith("gate_"):
                    gates.setdefault(name.rpartition("_")[0], []).append(value)
            found.append(point | {layer: statistics.mean(of_heads) for layer, of_heads in gates.items()})
    return found


def curves_of(results: Results, output: Path) -> dict[Run, Curve]:
    """Those of a study's runs in `output`, without the runs that choose."""
    return {run: curve(output / run.name) for run in results if run.task != VALIDATION}


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


FIELDS = tuple(field.name for field in dataclasses.fields(Run))


def write_results(results: Results, curves: Mapping[Run, Curve], output: Path) -> None:
    """Writes results.csv, a row for each run, and curves.csv, one for each evaluation of those that did not choose."""
    rows = [vars(run) | {name: result[name] for name in (*MEASURED, "machine")} for run, result in results.items()]
    _write(output / RESULTS, (*FIELDS, *MEASURED, "machine"), rows)
    points = [vars(run) | point for run, of_run in curves.items() for point in of_run]
    measured = dict.fromkeys(name for point in points for name in point)
    _write(output / CURVES, tuple(measured), points)


def _run(line: dict[str, str]) -> Run:
    task, row, ratio, seed, lr = (line.pop(name) for name in FIELDS)
    return Run(task, row, float(ratio), int(seed), float(lr))


def read_results(folder: Path) -> tuple[dict[Run, dict[str, Any]], dict[Run, Curve]]:
    """What `write_results` wrote; raises FileNotFoundError where it is not there."""
    results: dict[Run, dict[str, Any]] = {}
    curves: dict[Run, Curve] = {}
    with (folder / RESULTS).open(newline="") as file:
        for line in csv.DictReader(file):
            run, name = _run(line), line.pop("machine")
            results[run] = {"machine": name} | {name: float(value) for name, value in line.items()}
    with (folder / CURVES).open(newline="") as file:
        for line in csv.DictReader(file):
            run = _run(line)
            curves.setdefault(run, []).append({name: float(value) for name, value in line.items() if value})
    return results, curves
