"""A file of the benchmarks' results, and its rows."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from .measure import Spread, spread


@dataclass(frozen=True)
class Row:
    """What one contender did with one task. Times in seconds, memory in bytes."""

    group: str
    contender: str
    seconds: list[float]
    eager_seconds: list[float]  # of eager timm, each just before one of ours; empty where it ran out of memory
    error: float | None  # largest against float64, by its result's largest value; None: computes something else
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
    def key(self) -> tuple[str, str]:
        """Group and contender: which row of a run it is."""
        return self.group, self.contender

    def to_json(self) -> dict[str, Any]:
        """All fields, after the figures that readers look for first; `ratio_to_eager` is set at a run's end."""
        figures = {"ratio_to_eager": None} | {f"{key}_ms": 1e3 * t for key, t in self.time._asdict().items()}
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
    date: str


def load(path: Path) -> Results:
    """The results that `pytest benchmarks --benchmark-json=PATH` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
        rows = [Row.from_json(entry["extra_info"]) for entry in content["benchmarks"]]
        not_measured = [NotMeasured(**entry) for entry in content["not_measured"]]
        return Results(rows, not_measured, content["machine_info"]["convit_kernels"], content["datetime"][:10])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of `pytest benchmarks --benchmark-json`: {error!r}") from error


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups
