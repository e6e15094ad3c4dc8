"""What "times faster than eager" is, how far it can be trusted, and what changed between two runs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .implementations import EAGER
from .measure import spread
from .results import Row, by_group

# below it a change is not called one, however quiet the machine: builds and heaps differ by as much
SMALLEST_CHANGE = 1.10
# a change must exceed so many standard deviations of the noise; more where it is one row's, whose noise has heavy
# tails: in ten pairs of runs of the same code 4 rows of 1000 were beyond 3.5
DEVIATIONS, DEVIATIONS_OF_A_ROW = 3.0, 5.0
# a ratio is marked from so many on: a mark that chance has made costs less than a verdict that it has made
DEVIATIONS_OF_A_MARK = 3.0
# where the noise hides a slowdown of this much, the comparison says so instead of "same"
MUST_SHOW = 1.5
# tasks that are judged together too
FEWEST_OF_A_KIND = 4

MARK = "\N{DAGGER}"
MEANING = (
    "times faster than eager timm, the smaller of two ratios: the median over pairs of neighbouring calls, and eager's "
    "median at the task over this median"
)


class SpeedUp(NamedTuple):
    """How many times faster than eager something is, in each of the ways to tell.

    What disturbs one call of a pair shifts the first, what disturbs the machine for longer the second. The smaller
    counts, below 1 too: an implementation is never said to be faster than both ways say.
    """

    paired: float  # the median over pairs of neighbours in time
    by_pace: float  # eager's median in the whole group over this median
    by_rows: float | None = None  # eager's row over this one, as a reader of the table would divide; None without one
    noise: float = math.inf  # the factor by which chance sets them apart, where the run can tell

    @property
    def times(self) -> float:
        return min(self.paired, self.by_pace)

    @property
    def doubtful(self) -> bool:
        """Whether the ways to tell disagree by more than the noise, so that something was disturbed."""
        ways = [way for way in (self.paired, self.by_pace, self.by_rows) if way is not None]
        return max(ways) > self.noise * min(ways)

    def __str__(self) -> str:
        return f"{self.times:.2f}{MARK if self.doubtful else ''}"


def _pairs(baseline: Sequence[float], seconds: Sequence[float]) -> list[float]:
    return [before / after for before, after in zip(baseline, seconds, strict=True)]


def times_faster(baseline: Sequence[float], seconds: Sequence[float], pace: float | None = None) -> SpeedUp:
    """Of one implementation, from its seconds and eager's, or another baseline's, that were measured in turn with them.

    `pace` is the baseline's median where more is known of it than these.
    """
    pace = spread(baseline).p50 if pace is None else pace
    return SpeedUp(spread(_pairs(baseline, seconds)).p50, pace / spread(seconds).p50)


def speed_ups(rows: Sequence[Row]) -> dict[tuple[str, str], SpeedUp]:
    """Of all rows of a run by `Row.key`, eager's own too, which shows the noise; none where eager had no memory.

    Eager's median in a group is that of its medians beside each row and, where it has a row, of its own.
    """
    medians = _eager_medians(rows)
    deviation = noise_of_run(rows)
    noise = math.inf if deviation is None else math.exp(DEVIATIONS_OF_A_MARK * deviation)
    ratios: dict[tuple[str, str], SpeedUp] = {}
    for group, members in by_group(rows).items():
        own = [row.time.p50 for row in members if row.implementation == EAGER]
        for row in members:
            if row.eager_seconds:
                pace = statistics.median([*medians[group], *own])
                by_rows = own[0] / row.time.p50 if own else None
                ratios[row.key] = times_faster(row.eager_seconds, row.seconds, pace)._replace(
                    by_rows=by_rows, noise=noise
                )
    return ratios


def footnote(ratios: Iterable[SpeedUp | None]) -> str:
    """What the mark means, where one of these bears it; "" where none does."""
    marked = [ratio for ratio in ratios if ratio is not None and ratio.doubtful]
    if not marked:
        return ""
    return (
        f"{MARK}: unreliable: two ways of computing this ratio disagree by more than {marked[0].noise:.2f} times, "
        f"{DEVIATIONS_OF_A_MARK:g} standard deviations of this run's noise."
    )


def _eager_medians(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Eager's medians by group, one of each row that it was measured beside."""
    return {
        group: [spread(row.eager_seconds).p50 for row in members if row.eager_seconds]
        for group, members in by_group(rows).items()
    }


def noise_of_run(rows: Iterable[Row]) -> float | None:
    """What a run's eager medians say of it: one standard deviation of the logarithm of a row's median time.

    Eager is measured again beside every row of a group, minutes apart, and on a machine of its own its medians would be
    equal. They show what the spread within a row does not: a neighbour's burst, a clock or a layout of memory that last
    as long as a row. None where no group has two.
    """
    groups = _eager_medians(rows).values()
    differences = [abs(math.log(after / before)) for medians in groups for before, after in pairwise(medians)]
    return 1.4826 * statistics.median(differences) / math.sqrt(2) if differences else None


class Change(NamedTuple):
    """How an implementation's time at a task, or at all tasks of a kind, differs from the older one."""

    task: str
    implementation: str
    change: float  # new time over old, as much of it as shows relative to eager's in the same run
    noise: float  # the factor up to which chance explains it
    verdict: str  # slower, faster, same, or unclear: too much noise to say

    @classmethod
    def judged(cls, task: str, implementation: str, change: float, noise: float) -> "Change":
        """Of the logarithms of a change and of what chance explains."""
        noise = max(math.log(SMALLEST_CHANGE), noise)
        if abs(change) > noise:
            verdict = "slower" if change > 0 else "faster"
        else:
            verdict = "unclear" if noise > math.log(MUST_SHOW) else "same"
        return cls(task, implementation, math.exp(change), math.exp(noise), verdict)


def _standard_error(values: Sequence[float]) -> float:
    """Of the median, as if the values were normal about it."""
    deviation = (spread(values).p80 - spread(values).p20) / 1.683
    return math.sqrt(math.pi / 2 / len(values)) * deviation


def _change_of_row(row: Row, before: Row, now: SpeedUp | None, then: SpeedUp | None) -> tuple[float, float]:
    """The logarithm of a row's change, and the error of its two medians; `now` and `then`: what eager says of both."""
    if now is None or then is None:
        logs = [[math.log(value) for value in each.seconds] for each in (row, before)]
        return math.log(row.time.p50 / before.time.p50), math.hypot(*map(_standard_error, logs))
    logs = [[math.log(pair) for pair in _pairs(each.eager_seconds, each.seconds)] for each in (row, before)]
    paired, by_pace = math.log(then.paired / now.paired), math.log(then.by_pace / now.by_pace)
    change = min(paired, by_pace, key=abs) if paired * by_pace > 0 else 0.0
    return change, math.hypot(*map(_standard_error, logs))


def changes(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """The rows that both results have, held against each other, and all rows of a kind together; the worst first.

    Times count relative to eager's in the same run, so that a slower day is no regression: by pairs of neighbouring
    runs, and by eager's median in the whole group, for eager itself may have been disturbed beside a row. What counts
    is the smaller of the two.

    A row has changed when it has by more than 10 % and by more than five standard deviations of the noise: the errors
    of both medians and what eager's repeated measurements say of both runs, added in squares. Several tasks of a kind,
    the sizes of a model, show smaller changes than one: the median of theirs counts, and how far they differ; three
    standard deviations are enough.
    """
    older = {row.key: row for row in old}
    now, then = speed_ups(new), speed_ups(old)
    runs = math.hypot(*(noise_of_run(rows) or 0.0 for rows in (new, old)))
    judged: list[Change] = []
    kinds: dict[tuple[str, str], list[float]] = {}
    for row in new:
        before = older.get(row.key)
        if before is None or row.implementation == EAGER:
            continue
        change, error = _change_of_row(row, before, now.get(row.key), then.get(row.key))
        noise = DEVIATIONS_OF_A_ROW * math.hypot(error, runs)
        judged.append(Change.judged(row.group, row.implementation, change, noise))
        kinds.setdefault((row.kind, row.implementation), []).append(change)
    for (kind, implementation), values in kinds.items():
        if len(values) >= FEWEST_OF_A_KIND:
            error = math.sqrt(math.pi / 2 / len(values)) * statistics.stdev(values)
            noise = DEVIATIONS * math.hypot(error, runs / math.sqrt(len(values)))
            task = f"{kind}: all {len(values)} tasks"
            judged.append(Change.judged(task, implementation, statistics.median(values), noise))
    return sorted(judged, key=lambda change: -change.change)
