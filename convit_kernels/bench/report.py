"""Results of the benchmarks: read, printed, plotted, and held against older ones."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from ..attention import backends
from .contenders import COMPILED, EAGER, FLOOR, MODES, PARTS, label
from .measure import Spread, milliseconds, spread

# below it a change is not called one, however quiet the machine: builds and heaps differ by as much
SMALLEST_CHANGE = 1.10
# a change must exceed so many standard deviations of the noise; more where it is one row's, whose noise has heavy
# tails: in ten pairs of runs of the same code 4 rows of 1000 were beyond 3.5
DEVIATIONS, DEVIATIONS_OF_A_ROW = 3.0, 5.0
# where the noise hides a slowdown of this much, the comparison says so instead of "same"
MUST_SHOW = 1.5
# tasks that are judged together too
FEWEST_OF_A_KIND = 4

ORDER = [EAGER, COMPILED, FLOOR, "auto", *(backend.name for backend in backends())]


@dataclass(frozen=True)
class Row:
    """What one contender did with one task. Times in seconds, memory in bytes."""

    group: str
    contender: str
    seconds: list[float]
    eager_seconds: list[float]  # of eager timm, each just before one of ours; empty where it ran out of memory
    error: (
        float | None
    )  # largest against float64, relative to its result's largest value; None: computes something else
    eager_error: float | None
    allowed_error: float | None
    peak_memory: int
    peak_memory_is: str
    peak_resident: int | None
    gflops: float
    share_of_peak: float
    bound: str
    peak: str
    part: str
    model: str
    batch: int
    tokens: int
    backward: bool
    dtype: str
    device: str
    machine: dict[str, Any]

    @property
    def time(self) -> Spread:
        return spread(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """Times faster than eager, of each pair of neighbours in time."""
        return [eager / ours for eager, ours in zip(self.eager_seconds, self.seconds, strict=False)]

    @property
    def ratio(self) -> float | None:
        """Times faster than eager: the median of the pairs."""
        return spread(self.ratios).p50 if self.eager_seconds else None

    def to_json(self) -> dict[str, Any]:
        """All fields, after the figures that readers look for first."""
        figures = {"ratio_to_eager": self.ratio} | {f"{key}_ms": 1e3 * t for key, t in self.time._asdict().items()}
        return figures | asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Row":
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class NotMeasured(NamedTuple):
    """A contender that a group lacks, and why."""

    group: str
    contender: str
    reason: str


class Results(NamedTuple):
    """A file of results."""

    rows: list[Row]
    not_measured: list[NotMeasured]
    machine: dict[str, Any]


def load(path: Path) -> Results:
    """The results that `pytest benchmarks --benchmark-json=PATH` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
        rows = [Row.from_json(entry["extra_info"]) for entry in content["benchmarks"]]
        not_measured = [NotMeasured(**entry) for entry in content["not_measured"]]
        return Results(rows, not_measured, content["machine_info"]["convit_kernels"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of `pytest benchmarks --benchmark-json`: {error!r}") from error


def describe(machine: dict[str, Any]) -> str:
    """A machine in a line."""
    parts = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}" if machine["gpu"] else None,
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads",
        f"{machine['cpu_clock_mhz']:.0f} MHz" if machine["cpu_clock_mhz"] else None,
        f"torch {machine['torch']}",
        f"commit {machine['commit']}" if machine["commit"] else None,
    ]
    return ", ".join(part for part in parts if part)


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def place(contender: str) -> int:
    """Where a contender stands in tables and figures: eager first, what has no fixed place after the rest."""
    return ORDER.index(contender) if contender in ORDER else len(ORDER)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def tables(rows: Sequence[Row], not_measured: Sequence[NotMeasured] = ()) -> list[Table | str]:
    """One table a task, contenders by name, the ratio first; then what the columns mean and what is missing."""
    parts: list[Table | str] = []
    for group, members in by_group(rows).items():
        table = Table(title=f"[bold]{group}[/bold]", title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("contender", no_wrap=True, min_width=20)
        for heading in ("faster", "ms (p20-p80)", "error / allowed", "peak MB", "GFLOP/s", "of peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in sorted(members, key=lambda row: place(row.contender)):
            p20, p50, p80 = map(milliseconds, row.time)
            table.add_row(
                label(row.contender),
                f"[bold]{_times(row.ratio)}[/bold]",
                f"{p50} ({p20}-{p80})",
                "" if row.error is None else f"{row.error:.1e} / {row.allowed_error:.1e}",
                f"{row.peak_memory / 1e6:.1f}",
                f"{row.gflops:.1f}",
                f"{row.share_of_peak:.0%}",
            )
        parts.append(table)
    parts.append(
        "faster: times faster than eager timm, the median over pairs of neighbouring runs; each row has its own runs "
        "of eager beside it, and eager's own row shows the noise. error: the largest against float64, relative to that "
        "result's largest value; allowed: twice eager's, plus a few roundings. peak MB: of torch's allocator in one "
        "call. of peak: of the rate of a large matrix product or of a large copy, whichever is nearer, measured in the "
        "same session."
    )
    if rows:
        parts.append(describe(rows[0].machine))
    # the same reason for many groups is one line
    for reason, entries in groupby(sorted(not_measured, key=lambda entry: entry.reason), lambda entry: entry.reason):
        missing = list(entries)
        names = ", ".join(sorted({label(entry.contender) for entry in missing}))
        parts.append(f"not measured: {names} ({len(missing)} rows): {reason}")
    return parts


class Change(NamedTuple):
    """How a contender's time at a task, or at all tasks of a kind, differs from the older one."""

    task: str
    contender: str
    change: float  # new time over old, as much of it as shows relative to eager's in the same run
    noise: float  # the factor up to which chance explains it
    verdict: str  # slower, faster, same, or unclear: too much noise to say

    @classmethod
    def judged(cls, task: str, contender: str, change: float, noise: float) -> "Change":
        """Of the logarithms of a change and of what chance explains."""
        noise = max(math.log(SMALLEST_CHANGE), noise)
        if abs(change) > noise:
            verdict = "slower" if change > 0 else "faster"
        else:
            verdict = "unclear" if noise > math.log(MUST_SHOW) else "same"
        return cls(task, contender, math.exp(change), math.exp(noise), verdict)


def _standard_error(values: Sequence[float]) -> float:
    """Of the median, as if the values were normal about it."""
    deviation = (spread(values).p80 - spread(values).p20) / 1.683
    return math.sqrt(math.pi / 2 / len(values)) * deviation


def _eager_medians(rows: Iterable[Row]) -> dict[str, list[float]]:
    """The logarithms of eager's medians by group, one of each row that it was measured beside."""
    return {
        group: [math.log(spread(row.eager_seconds).p50) for row in members if row.eager_seconds]
        for group, members in by_group(rows).items()
    }


def _noise_of_run(eager: Mapping[str, Sequence[float]]) -> float:
    """What a run's eager medians say of it: one standard deviation of the logarithm of a row's median time.

    Eager is measured again beside every row of a group, minutes apart, and on a machine of its own its medians would be
    equal. They show what the spread within a row does not: a neighbour's burst, a clock or a layout of memory that last
    as long as a row.
    """
    differences = [abs(after - before) for medians in eager.values() for before, after in pairwise(medians)]
    return 1.4826 * statistics.median(differences) / math.sqrt(2) if differences else 0.0


def _change_of_row(
    row: Row, before: Row, eager: Mapping[str, Sequence[float]], old_eager: Mapping[str, Sequence[float]]
) -> tuple[float, float]:
    """The logarithm of a row's change, and the error of its two medians; `eager`: both runs' medians."""
    plain = math.log(row.time.p50 / before.time.p50)
    if not (row.eager_seconds and before.eager_seconds):
        logs = [[math.log(value) for value in each.seconds] for each in (row, before)]
        return plain, math.hypot(*map(_standard_error, logs))
    logs = [[-math.log(ratio) for ratio in each.ratios] for each in (row, before)]
    pace = statistics.median(eager[row.group]) - statistics.median(old_eager[row.group])
    paired, by_pace = spread(logs[0]).p50 - spread(logs[1]).p50, plain - pace
    change = min(paired, by_pace, key=abs) if paired * by_pace > 0 else 0.0
    return change, math.hypot(*map(_standard_error, logs))


def compare(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """The rows that both results have, held against each other, and all rows of a kind together; the worst first.

    Times count relative to eager's in the same run, so that a slower day is no regression: by pairs of neighbouring
    runs, and by eager's median in the whole group, for eager itself may have been disturbed beside a row. What counts
    is the smaller of the two.

    A row has changed when it has by more than 10 % and by more than five standard deviations of the noise: the errors
    of both medians and what eager's repeated measurements say of both runs, added in squares. Several tasks of a kind,
    the sizes of a model, show smaller changes than one: the median of theirs counts, and how far they differ; three
    standard deviations are enough.
    """
    older = {(row.group, row.contender): row for row in old}
    eager, old_eager = _eager_medians(new), _eager_medians(old)
    runs = math.hypot(_noise_of_run(eager), _noise_of_run(old_eager))
    changes: list[Change] = []
    kinds: dict[tuple[str, str], list[float]] = {}
    for row in new:
        before = older.get((row.group, row.contender))
        if before is None or row.contender == EAGER:
            continue
        change, error = _change_of_row(row, before, eager, old_eager)
        noise = DEVIATIONS_OF_A_ROW * math.hypot(error, runs)
        changes.append(Change.judged(row.group, row.contender, change, noise))
        kind = f"{PARTS[row.part]}, {MODES[row.backward]}"
        kinds.setdefault((kind, row.contender), []).append(change)
    for (kind, contender), values in kinds.items():
        if len(values) >= FEWEST_OF_A_KIND:
            error = math.sqrt(math.pi / 2 / len(values)) * statistics.stdev(values)
            noise = DEVIATIONS * math.hypot(error, runs / math.sqrt(len(values)))
            task = f"{kind}: all {len(values)} tasks"
            changes.append(Change.judged(task, contender, statistics.median(values), noise))
    return sorted(changes, key=lambda change: -change.change)


def comparison(new: Results, old: Results) -> list[Table | str]:
    """What became slower or faster since the older results, and how many rows say nothing."""
    changes = compare(new.rows, old.rows)
    table = Table(box=SIMPLE, pad_edge=False, title="Changes since the older results", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("time", "right"),
        ("noise", "right"),
        ("contender", "left"),
        ("task", "left"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "task")  # type: ignore[arg-type]
    for change in changes:
        if change.verdict in ("slower", "faster"):
            colour = "red" if change.verdict == "slower" else "green"
            table.add_row(
                f"[{colour}]{change.verdict}[/{colour}]",
                f"{change.change:.2f}x",
                f"{change.noise:.2f}x",
                label(change.contender),
                change.task,
            )
    counts = Counter(change.verdict for change in changes)
    keys = [{(row.group, row.contender) for row in results.rows} for results in (new, old)]
    summary = (
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same, {counts['unclear']} too "
        f"noisy to show a change of {MUST_SHOW:g} times. Only in the new results: {len(keys[0] - keys[1])}, only in "
        f"the old: {len(keys[1] - keys[0])}. Times count by eager's in the same run; noise is what chance explains."
    )
    here, there = describe(new.machine), describe(old.machine)
    machines = f"new: {here}\nold: {there}"
    return [table if table.row_count else "No contender became slower or faster.", summary, machines]


FIGURES = ("speed-up", "growth-tokens", "growth-batch")


def write_figures(
    results: Results, directory: Path, formats: Sequence[str] = ("svg", "png"), names: Sequence[str] = FIGURES
) -> list[Path]:
    """Writes each of these figures that the results have data for; returns the files.

    Raises:
        ImportError: matplotlib is missing.
    """
    from . import plots

    directory.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[], Any]] = {
        "speed-up": lambda: plots.speed_up(results.rows, describe(results.machine)),
        "growth-tokens": lambda: plots.growth(results.rows, results.not_measured, "tokens"),
        "growth-batch": lambda: plots.growth(results.rows, results.not_measured, "batch"),
    }
    written = []
    for name in names:
        figure = draw[name]()
        if figure is None:
            continue
        for suffix in formats:
            path = directory / f"{name}.{suffix}"
            plots.save(figure, path)
            written.append(path)
    return written
