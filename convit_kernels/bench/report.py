"""Results of the benchmarks: read, printed, plotted, and held against older ones."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from ..attention import backends
from .contenders import COMPILED, EAGER, FLOOR, label
from .measure import Spread, milliseconds, spread

# below it a change is not called one, however quiet the machine: builds and heaps differ by as much
SMALLEST_CHANGE = 1.10
# a change must exceed the noise that many times: of a hundred rows of the same code, none should
SPREADS = 3.0
# where the noise hides a slowdown of this much, the comparison says so instead of "same"
MUST_SHOW = 1.5

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
    """How one row differs from the older one. verdict: slower, faster, same, or unclear: too much noise to say."""

    group: str
    contender: str
    change: float  # new time over old, or as much of it as shows relative to eager's in the same run too
    noise: float  # the factor up to which chance explains it
    verdict: str


def _drift_free(row: Row) -> list[float]:
    """Logarithms of the times; relative to eager's beside them, which a slower day slows alike."""
    if row.contender == EAGER or not row.eager_seconds:
        return [math.log(value) for value in row.seconds]
    return [-math.log(ratio) for ratio in row.ratios]


def _noise_of_run(rows: Sequence[Row]) -> float:
    """What a run says of itself: how far eager against itself comes out from 1, as one standard deviation of a log.

    It sees what the spread within a row does not: a neighbour's burst or a layout of memory lasts as long as a row.
    """
    controls = [abs(math.log(row.ratio)) for row in rows if row.contender == EAGER and row.ratio is not None]
    return 1.4826 * statistics.median(controls) if controls else 0.0


def compare(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """The rows that both results have, held against each other, the worst first.

    A row has changed when its median has by more than 10 % and by more than three times the noise, about one standard
    deviation: the spread of both rows, half of what lies between their 20th and 80th percentile, and what eager against
    itself says of both runs, added in squares. Our rows are compared by their ratio to eager, in pairs of neighbouring
    runs, so that a slower day is no regression, and as they are, so that a day on which eager alone was disturbed is
    none either: what counts is the smaller of the two changes.
    """
    older = {(row.group, row.contender): row for row in old}
    runs = [_noise_of_run(rows) for rows in (new, old)]
    changes = []
    for row in new:
        before = older.get((row.group, row.contender))
        if before is None:
            continue
        paired = bool(row.eager_seconds) == bool(before.eager_seconds)
        logs = [_drift_free(r) if paired else [math.log(t) for t in r.seconds] for r in (row, before)]
        now, then = (spread(values) for values in logs)
        widths = [(s.p80 - s.p20) / 2 for s in (now, then)]
        noise = max(math.log(SMALLEST_CHANGE), SPREADS * math.hypot(*widths, *runs))
        relative, plain = now.p50 - then.p50, math.log(row.time.p50 / before.time.p50)
        change = min(relative, plain, key=abs) if relative * plain > 0 else 0.0
        if abs(change) > noise:
            verdict = "slower" if change > 0 else "faster"
        else:
            verdict = "unclear" if noise > math.log(MUST_SHOW) else "same"
        changes.append(Change(row.group, row.contender, math.exp(change), math.exp(noise), verdict))
    return sorted(changes, key=lambda change: -change.change)


def comparison(new: Results, old: Results) -> list[Table | str]:
    """What became slower or faster since the older results, and how many rows say nothing."""
    changes = compare(new.rows, old.rows)
    ours = [change for change in changes if change.contender != EAGER]
    table = Table(box=SIMPLE, pad_edge=False, title="Changes since the older results", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("time", "right"),
        ("noise", "right"),
        ("contender", "left"),
        ("task", "left"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "task")  # type: ignore[arg-type]
    for change in ours:
        if change.verdict in ("slower", "faster"):
            colour = "red" if change.verdict == "slower" else "green"
            table.add_row(
                f"[{colour}]{change.verdict}[/{colour}]",
                f"{change.change:.2f}x",
                f"{change.noise:.2f}x",
                label(change.contender),
                change.group,
            )
    counts = {verdict: sum(c.verdict == verdict for c in ours) for verdict in ("slower", "faster", "same", "unclear")}
    keys = [{(row.group, row.contender) for row in results.rows} for results in (new, old)]
    summary = (
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same, {counts['unclear']} too "
        f"noisy to show a change of {MUST_SHOW:g} times. Only in the new results: {len(keys[0] - keys[1])}, only in "
        f"the old: {len(keys[1] - keys[0])}. Times count by eager's in the same run; noise is what chance explains."
    )
    here, there = describe(new.machine), describe(old.machine)
    machines = f"new: {here}\nold: {there}"
    return [table if table.row_count else "No contender became slower or faster.", summary, machines]


def write_figures(results: Results, directory: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Writes each figure that the results have data for; returns the files.

    Raises:
        ImportError: matplotlib is missing.
    """
    from . import plots

    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Any]] = {
        "speed-up": lambda: plots.speed_up(results.rows, describe(results.machine)),
        "growth-tokens": lambda: plots.growth(results.rows, results.not_measured, "tokens"),
        "growth-batch": lambda: plots.growth(results.rows, results.not_measured, "batch"),
    }
    written = []
    for name, draw in figures.items():
        figure = draw()
        if figure is None:
            continue
        for suffix in formats:
            path = directory / f"{name}.{suffix}"
            plots.save(figure, path)
            written.append(path)
    return written
