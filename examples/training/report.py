"""What the study of sample efficiency found: its tables and its figures, from results and curves alone."""

import statistics
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from scipy.stats import t as student  # type: ignore[import-untyped]

from convit_kernels.bench.markdown import table
from convit_kernels.bench.style import PRINT, save, style, subplots

from .config import resolve
from .files import write_atomically
from .study import (
    ABLATION,
    ABLATION_RATIO,
    BFLOAT16,
    CLUTTERED,
    CNN,
    CONVIT,
    DEIT,
    FAMILIES,
    LONGER,
    PLAIN,
    REFERENCE,
    TIMES_LONGER,
    VALIDATION,
    Curve,
    Results,
    Run,
    Study,
)

FIGURE, CURVES_FIGURE, LOCALITY_FIGURE = "figure.svg", "curves.svg", "locality.svg"
BEGIN, END = "<!-- tables: begin, written by examples/sample_efficiency.py -->", "<!-- tables: end -->"
NAMES = {
    CONVIT: "ConViT",
    DEIT: "DeiT twin",
    CNN: "CNN",
    "b": "gates frozen",
    "c": "random initialisation",
    "d": "gates frozen, random initialisation",
}
STYLES = {CONVIT: ("#009E73", "o"), DEIT: ("#0072B2", "s"), CNN: ("#D55E00", "^")}  # colour and marker
# Top-1 in percent on ImageNet: Table 2 (DeiT-S, ConViT-S) by share, and Table 3 (ConViT-S+) at 10 % by row
PAPER_TABLE_2 = {0.05: (34.8, 47.8), 0.1: (48.0, 59.6), 0.3: (66.1, 73.7), 0.5: (74.6, 78.2), 1.0: (79.9, 81.4)}
PAPER_TABLE_3 = {"a": 59.7, "b": 57.4, "c": 56.9, "d": 54.6, "e": 47.8}
CONFIDENCE = 0.95

Scores = Mapping[tuple[str, str, float], Sequence[float]]  # percent, by task, row and ratio, in order of the seeds


def scores(results: Results, measure: str = "test_accuracy") -> Scores:
    """A measure that is a share, in percent, without the runs that choose."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for run, result in sorted(results.items(), key=lambda item: item[0].seed):
        if run.task != VALIDATION:
            found.setdefault((run.task, run.row, run.ratio), []).append(100 * result[measure])
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds; of one seed its value alone."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean of the pairs' differences, with the confidence interval that Student's t gives it; none of one seed."""
    gaps = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean = f"{statistics.mean(gaps):+.1f}"
    if len(gaps) == 1:
        return mean
    half = student.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1) * statistics.stdev(gaps) / sqrt(len(gaps))
    return f"{mean} ± {half:.1f}"


def _ratios(of: Scores, task: str) -> list[float]:
    """The shares of the images that a task was learnt from."""
    return sorted({ratio for name, _, ratio in of if name == task})


def efficiency_table(of: Scores, task: str) -> str:
    """In the form of the paper's Table 2."""
    rows = []
    for ratio in _ratios(of, task):
        deit, convit, cnn = (of[task, row, ratio] for row in (DEIT, CONVIT, CNN))
        paper = PAPER_TABLE_2.get(ratio)
        gap = f"{paper[1] - paper[0]:+.1f}" if paper else ""
        cells = [spread(deit), spread(convit), difference(convit, deit), gap, spread(cnn), difference(convit, cnn)]
        rows.append([f"{ratio:.0%}", *cells])
    headings = ["images used", "DeiT twin", "ConViT", "ConViT - DeiT", "the paper's", "CNN", "ConViT - CNN"]
    return "\n".join(table(headings, rows, named=0))


def ablation_table(of: Scores) -> str:
    """In the form of the paper's Table 3, the column of 10 %."""
    whole = of[CLUTTERED, CONVIT, ABLATION_RATIO]
    rows = [
        [
            row,
            NAMES[row],
            spread(of[CLUTTERED, row, ABLATION_RATIO]),
            "" if row == CONVIT else difference(of[CLUTTERED, row, ABLATION_RATIO], whole),
            f"{PAPER_TABLE_3[row]:.1f}",
            "" if row == CONVIT else f"{PAPER_TABLE_3[row] - PAPER_TABLE_3[CONVIT]:+.1f}",
        ]
        for row in ABLATION
    ]
    return "\n".join(table(["", "", "accuracy", "against a", "the paper's", "against a"], rows, named=2))


def fit_table(results: Results, curves: Mapping[Run, Curve]) -> str:
    """Whether training was long enough: what the last steps still gained, how much of the training set is learnt."""
    of_train = scores(results, "train_accuracy")
    rows = []
    for task in (CLUTTERED, PLAIN, LONGER):
        for ratio in _ratios(of_train, task):
            cells = []
            for row in FAMILIES:
                kind = [run for run in curves if (run.task, run.row, run.ratio) == (task, row, ratio)]
                gains = [100 * last_gain(curves[run]) for run in kind]
                cells += [f"{statistics.mean(gains):+.1f}", f"{statistics.mean(of_train[task, row, ratio]):.0f}"]
            rows.append([task, f"{ratio:.0%}", *cells])
    headings = ["task", "images used", *(f"{NAMES[row]}: {what}" for row in FAMILIES for what in ("gain", "fit"))]
    return "\n".join(table(headings, rows))


def last_gain(curve: Curve) -> float:
    """What the last two evaluations differ by, as a share."""
    accuracy = [point["test_accuracy"] for point in curve if "test_accuracy" in point]
    return accuracy[-1] - accuracy[-2] if len(accuracy) > 1 else float("nan")


def locality_table(curves: Mapping[Run, Curve]) -> str:
    """Non-locality and gates of ConViT's layers before and after training, means over the seeds."""
    columns = _trainings(curves)
    rows = []
    for layer in _layers(curves):
        cells = [str(layer + 1)]
        for name in (f"nonlocality_{layer}", f"gate_{layer}"):
            means = [_means(curves, task, CONVIT, ratio, name)[1] for task, ratio, _ in columns]
            values = [means[0][0], *(of_column[-1] for of_column in means)] if means[0] else []
            cells += [f"{value:.2f}" for value in values] or [""] * (1 + len(columns))
        rows.append(cells)
    times = ["untrained", *(title for *_, title in columns)]
    return "\n".join(
        table(["layer", *(f"{what}, {time}" for what in ("non-locality", "gate") for time in times)], rows, named=0)
    )


def against_twin(results: Results, row: str) -> tuple[str, str]:
    """Speed and accuracy of the ConViT that was trained otherwise, and of the same with the fused layers in float32."""
    (other,) = (run for run in results if run.row == row)
    twin = next(run for run in results if vars(run) == vars(other) | {"row": CONVIT})
    rates = [results[run]["images_per_second"] for run in (other, twin)]
    accuracy = [100 * results[run]["test_accuracy"] for run in (other, twin)]
    return (
        f"{rates[0]:.0f} images a second, the same with the fused layers in float32 {rates[1]:.0f}, "
        f"{rates[1] / rates[0]:.2f} times as many",
        f"{accuracy[0]:.1f} and {accuracy[1]:.1f} %",
    )


def lrs_text(study: Study, results: Results) -> str:
    """Which learning rates the families have, and how they were chosen."""
    lrs = {run.row: run.lr for run in results if run.task != VALIDATION and run.row in FAMILIES}
    used = ", ".join(f"{NAMES[row]} {lrs[row]:g}" for row in FAMILIES)
    if len(study.lrs) == 1:
        return f"Learning rate, for 512 images a step: {used}; not chosen, but given."
    among = ", ".join(f"{lr:g}" for lr in study.lrs)
    return (
        f"Learning rates, for 512 images a step: {used}; each the best of {among} on the validation part, after half "
        f"the steps with {ABLATION_RATIO:.0%} of the cluttered images and one seed: the same for each family. The rows "
        "of the ablation have ConViT's."
    )


def report(study: Study, results: Results, curves: Mapping[Run, Curve]) -> str:
    """The tables in Markdown, with what they rest on."""
    of = scores(results)
    config = resolve(study.options, "idx")
    steps = next(int(curve[-1]["step"]) for run, curve in curves.items() if run.task == CLUTTERED)
    seeds = max(run.seed for run in results) + 1
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread"
    interval = f", differences of pairs with a {CONFIDENCE:.0%} confidence interval (Student's t)" if seeds > 1 else ""
    hours = sum(result["seconds"] for result in results.values()) / 3600
    reference, bfloat16 = (against_twin(results, row) for row in (REFERENCE, BFLOAT16))
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results.values()))
    return f"""\
Test accuracy in percent, {over}{interval}. Each run has {steps} steps of {config.batch_size} images,
whatever its share of the training images: {config.depth} blocks, {config.local_up_to_layer} of them GPSA, \
{config.num_heads} heads, {config.embed_dim} channels, patches of {config.patch_size} x {config.patch_size} pixels. \
{lrs_text(study, results)}

**Sample efficiency, cluttered Fashion-MNIST** (Table 2; the paper's: DeiT-S and ConViT-S, ImageNet)

{efficiency_table(of, CLUTTERED)}

**The same pictures as they are**

{efficiency_table(of, PLAIN)}

**{TIMES_LONGER} times the steps**, {TIMES_LONGER * steps}, on the cluttered images, one seed

{efficiency_table(of, LONGER)}

**Ablation with {ABLATION_RATIO:.0%} of the cluttered images** (Table 3)

{ablation_table(of)}

**Was it long enough?** Points that the last {1 / study.evaluations:.0%} of the steps gained in the test, and accuracy \
on the training images

{fit_table(results, curves)}

**How locality is escaped.** Of ConViT's layers with the smallest and the largest share: non-locality in patches
(equation 8) and gates, the share of position in the attention, means over the heads

{locality_table(curves)}

**What the kernels saved.** Over a whole run with {ABLATION_RATIO:.0%} of the cluttered images a ConViT with the \
reference's layers trained {reference[0]}; \
they came to {reference[1]}. Under bfloat16's autocast it trained {bfloat16[0]}; they came to {bfloat16[1]}.

{len(results)} runs, {hours:.1f} hours of them all together, on {machines}.
"""


# Figures


def _against_share(panel: Axes, of: Scores, task: str, title: str) -> None:
    ratios = _ratios(of, task)
    for row in FAMILIES:
        colour, marker = STYLES[row]
        samples = [of[task, row, ratio] for ratio in ratios]
        panel.errorbar(
            [100 * ratio for ratio in ratios],
            [statistics.mean(values) for values in samples],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in samples],
            marker=marker,
            capsize=3,
            label=NAMES[row],
            color=colour,
        )
    panel.set_xscale("log")
    panel.set_xticks([100 * ratio for ratio in ratios], minor=False)
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(title=title, xlabel="training images used", ylabel="test accuracy, %")


def figure(of: Scores) -> Figure:
    """Accuracy by share of the images on both tasks, and by row of the ablation: means, spread, every seed a dot."""
    drawing, panels = subplots(13, 4, columns=3)
    _against_share(panels[0], of, CLUTTERED, "Cluttered Fashion-MNIST")
    _against_share(panels[1], of, PLAIN, "The same pictures as they are")
    panels[0].legend()
    rows = ABLATION[::-1]
    for height, row in enumerate(rows):
        values = of[CLUTTERED, row, ABLATION_RATIO]
        colour = STYLES.get(row, ("#555555", ""))[0]
        panels[2].plot(values, [height] * len(values), "o", color=colour, alpha=0.5, markeredgewidth=0)
        panels[2].plot([statistics.mean(values)], [height], "|", color=colour, markersize=18, markeredgewidth=2)
    panels[2].set_yticks(range(len(rows)), [f"{row}  {NAMES[row]}" for row in rows])
    panels[2].set(title=f"Ablation, {ABLATION_RATIO:.0%} of the images", xlabel="test accuracy, %")
    return drawing


def _means(
    curves: Mapping[Run, Curve], task: str, row: str, ratio: float, name: str
) -> tuple[list[float], list[float]]:
    """Steps, and the means over the seeds of what was measured there."""
    by_step: dict[float, list[float]] = {}
    for run, curve in curves.items():
        if (run.task, run.row, run.ratio) == (task, row, ratio):
            for point in curve:
                if name in point:
                    by_step.setdefault(point["step"], []).append(point[name])
    return list(by_step), [statistics.mean(values) for values in by_step.values()]


def _trainings(curves: Mapping[Run, Curve]) -> list[tuple[str, float, str]]:
    """Task, ratio and title of what is drawn over the training: the smallest share, the largest, that for longer."""
    ratios = {run.ratio for run in curves if run.task == CLUTTERED and run.row == CONVIT}
    ends = dict.fromkeys((min(ratios), max(ratios)))
    longer = (LONGER, max(ratios), f"{max(ratios):.0%}, {TIMES_LONGER} times the steps")
    return [*((CLUTTERED, ratio, f"{ratio:.0%}") for ratio in ends), longer]


def _layers(curves: Mapping[Run, Curve]) -> list[int]:
    """Whose locality was measured, from 0."""
    names = {name for curve in curves.values() for point in curve for name in point}
    return sorted(int(name.rpartition("_")[2]) for name in names if name.startswith("nonlocality_"))


def curves_figure(curves: Mapping[Run, Curve]) -> Figure:
    """Accuracy over the training on the cluttered images."""
    trainings = _trainings(curves)
    drawing, panels = subplots(4.5 * len(trainings), 4, columns=len(trainings))
    for panel, (task, ratio, title) in zip(panels, trainings, strict=True):
        for row in FAMILIES:
            steps, values = _means(curves, task, row, ratio, "test_accuracy")
            colour, marker = STYLES[row]
            panel.plot(steps, [100 * value for value in values], marker, ls="-", color=colour, label=NAMES[row])
        panel.set(title=f"Images used: {title}", xlabel="step", ylabel="test accuracy, %")
    panels[0].legend()
    return drawing


def locality_figure(curves: Mapping[Run, Curve]) -> Figure:
    """Non-locality and gates of ConViT's layers over the training: the paper's figures of how locality is escaped."""
    trainings = _trainings(curves)
    drawing, panels = subplots(4.5 * len(trainings), 7, 2, len(trainings))
    layers, colours = _layers(curves), mpl.colormaps["viridis"]
    for column, (task, ratio, title) in enumerate(trainings):
        for line, (name, label) in enumerate((("nonlocality", "non-locality, patches"), ("gate", "gate"))):
            panel = panels[line * len(trainings) + column]
            for layer in layers:
                steps, values = _means(curves, task, CONVIT, ratio, f"{name}_{layer}")
                if steps:
                    panel.plot(
                        steps, values, "o-", ms=3, color=colours(layer / len(layers)), label=f"layer {layer + 1}"
                    )
            panel.set(title=f"Images used: {title}", xlabel="step", ylabel=label)
            panel.set_ylim(bottom=0, top=1 if name == "gate" else None)
    panels[0].legend(loc="center right")
    return drawing


def write_figures(results: Results, curves: Mapping[Run, Curve], output: Path) -> None:
    """Writes figure.svg, curves.svg and locality.svg."""
    with mpl.rc_context(style(PRINT)):
        drawings = {
            FIGURE: figure(scores(results)),
            CURVES_FIGURE: curves_figure(curves),
            LOCALITY_FIGURE: locality_figure(curves),
        }
        for name, drawing in drawings.items():
            save(drawing, output / name)


# The page


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
