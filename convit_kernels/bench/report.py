"""Results of the benchmarks as tables, and what changed since older ones."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE
from rich.table import Table

from .compare import MEANING, MUST_SHOW, Change, footnote, speed_ups
from .implementations import label, place
from .machine import describe
from .measure import milliseconds
from .results import Results, by_group


def tables(results: Results) -> list[Table | str]:
    """One table a task, implementations by name, the ratio first; then what the columns mean and what is missing."""
    parts: list[Table | str] = []
    ratios = speed_ups(results.rows)
    for group, members in by_group(results.rows).items():
        table = Table(title=f"[bold]{group}[/bold]", title_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("implementation", no_wrap=True, min_width=20)
        for heading in ("faster", "ms (p20-p80)", "error / allowed", "peak MB", "GFLOP/s", "of peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in sorted(members, key=lambda row: place(row.implementation)):
            p20, p50, p80 = map(milliseconds, row.time)
            table.add_row(
                label(row.implementation),
                f"[bold]{ratio}[/bold]" if (ratio := ratios.get(row.key)) else "",
                f"{p50} ({p20}-{p80})",
                "" if row.error is None else f"{row.error:.1e} / {row.allowed_error:.1e}",
                f"{row.peak_memory / 1e6:.1f}",
                f"{row.gflops:.1f}",
                f"{row.share_of_peak:.0%}",
            )
        parts.append(table)
    parts.append(
        f"faster: {MEANING}; each row has its own runs of eager beside it, and eager's own row shows the noise. error: "
        "the largest against float64, relative to that result's largest value; allowed: twice what rounding gives "
        "eager. peak MB: of torch's allocator in one call. of peak: of the rate of a large matrix product or of a "
        "large copy, whichever is nearer, measured in the same session."
    )
    if note := footnote(ratios.values()):
        parts.append(note)
    parts.append(describe(results.machine, results.loads))
    # the same reason for many groups is one line
    by_reason = sorted(results.not_measured, key=lambda entry: entry.reason)
    for reason, same in groupby(by_reason, lambda entry: entry.reason):
        entries = list(same)
        names = ", ".join(sorted({label(entry.implementation) for entry in entries}))
        parts.append(f"not measured: {names} ({len(entries)} rows): {reason}")
    return parts


def comparison(new: Results, old: Results, changes: Sequence[Change]) -> list[Table | str]:
    """What became slower or faster since the older results, and how many rows say nothing."""
    table = Table(box=SIMPLE, pad_edge=False, title="Changes since the older results", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("time", "right"),
        ("noise", "right"),
        ("implementation", "left"),
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
                label(change.implementation),
                change.task,
            )
    counts = Counter(change.verdict for change in changes)
    keys = [{row.key for row in results.rows} for results in (new, old)]
    summary = (
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same, {counts['unclear']} too "
        f"noisy to show a change of {MUST_SHOW:g} times. Only in the new results: {len(keys[0] - keys[1])}, only in "
        f"the old: {len(keys[1] - keys[0])}. Times count by eager's in the same run; noise is what chance explains."
    )
    here, there = describe(new.machine), describe(old.machine)
    machines = f"new: {here}\nold: {there}"
    return [table if table.row_count else "No implementation became slower or faster.", summary, machines]
