"""A file of the benchmarks' results, and its rows."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from .implementations import MODES, PARTS
from .measure import Spread, spread


@dataclass(frozen=True)
class Row:
    """What one implementation did with one task. Times in seconds, memory in bytes."""

    group: str
    implementation: str
    seconds: list[float]
    eager_seconds: list[float]  # of eager timm, each just before one of ours; empty where it ran out of memory
    error: float | None  # largest against float64, by its result's largest value; None: computes something else
    eager_error: float | None
    allowed_error: float | None
    peak_memory: int  # the most that torch's allocator holds in one call, beyond what it held before
    peak_resident: int | None  # by which the process grows in one call; None where the system does not tell
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
    load_1_minute: float | None  # of the machine, when the row was done; None where the system does not tell

    @property
    def time(self) -> Spread:
        return spread(self.seconds)

    @property
    def key(self) -> tuple[str, str]:
        """Group and implementation: which row of a run it is."""
        return self.group, self.implementation

    @property
    def kind(self) -> str:
        """Part, mode and dtype: what the rows of a table or the bars of a panel have in common."""
        return f"{PARTS[self.part]}, {MODES[self.backward]}, {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """All fields, after the figures that readers look for first; `ratio_to_eager` is set at a run's end."""
        figures = {"ratio_to_eager": None} | {f"{key}_ms": 1e3 * t for key, t in self.time._asdict().items()}
        return figures | asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Row":
        """What `to_json` gave, of any version. KeyError: a field is missing."""
        values = _renamed(values)
        if "machine" in values:  # earlier files repeat the machine in each row
            values["load_1_minute"] = values["machine"]["load_1_minute"]
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class NotMeasured(NamedTuple):
    """An implementation that a group lacks, and why."""

    group: str
    implementation: str
    reason: str


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a file with the present names: earlier files call an implementation "contender"."""
    return {"implementation" if key == "contender" else key: value for key, value in values.items()}


class Results(NamedTuple):
    """A file of results."""

    rows: list[Row]
    not_measured: list[NotMeasured]
    machine: dict[str, Any]
    date: str

    @property
    def loads(self) -> list[float]:
        """The machine's load at each row, where it is known."""
        return [row.load_1_minute for row in self.rows if row.load_1_minute is not None]


def load(path: Path) -> Results:
    """The results that `pytest benchmarks --benchmark-json=PATH` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
        rows = [Row.from_json(entry["extra_info"]) for entry in content["benchmarks"]]
        not_measured = [NotMeasured(**_renamed(entry)) for entry in content["not_measured"]]
        return Results(rows, not_measured, content["machine_info"]["convit_kernels"], content["datetime"][:10])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of `pytest benchmarks --benchmark-json`: {error!r}") from error


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups
