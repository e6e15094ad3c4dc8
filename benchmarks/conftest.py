"""Options of the benchmarks, what they run by default, and the tables at the end."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tasks import DTYPES, default_tasks, sweep_tasks, why_left_out

from convit_kernels.bench.compare import speed_ups
from convit_kernels.bench.implementations import Task, implementation_names
from convit_kernels.bench.machine import machine
from convit_kernels.bench.results import NotMeasured, Results, Row


@dataclass
class Log:
    """What a session has measured, what not and why, and when it begins no more groups."""

    deadline: float
    file: Path | None = None  # gets each row as it is measured
    rows: list[Row] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row.to_json()) + "\n")

    def leave_out(self, task: Task, names: Iterable[str], reason: str) -> NoReturn:
        self.not_measured += [NotMeasured(str(task), name, reason) for name in names]
        pytest.skip(reason)


LOG = pytest.StashKey[Log]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("convit_kernels")
    options.addoption("--sweep", action="store_true", help="also grids of 14x14 to 64x64, batches of 1 to 64, and more")
    options.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    options.addoption("--dtype", choices=(*DTYPES, "float16"), help=f"only this one; default: {' and '.join(DTYPES)}")
    options.addoption("--implementations", default="", help="only these, comma-separated; eager is always run beside")
    options.addoption("--row-seconds", type=float, default=0.5, help="about how long one row is timed")
    options.addoption(
        "--minutes", type=float, help="begin no more groups after that (default: 9, or none with --sweep)"
    )
    options.addoption("--rows", type=Path, help="append each row to this file as it is measured, as a line of JSON")


def pytest_configure(config: pytest.Config) -> None:
    minutes = config.getoption("--minutes") or (1e9 if config.getoption("--sweep") else 9)
    config.stash[LOG] = Log(time.monotonic() + 60 * minutes, config.getoption("--rows"))


@pytest.fixture(scope="session")
def log(request: pytest.FixtureRequest) -> Log:
    return request.config.stash[LOG]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    dtypes = [getattr(torch, name) for name in ([option("--dtype")] if option("--dtype") else DTYPES)]
    tasks = default_tasks(option("--device"), dtypes)
    tasks += sweep_tasks(option("--device"), dtypes) if option("--sweep") else []
    chosen = set(filter(None, option("--implementations").split(",")))
    cases = []
    for task in dict.fromkeys(tasks):
        mode = "backward" if task.backward else "forward"
        task_id = f"{task.part}-{task.model}-{mode}-{task.batch}x{task.side}x{task.side}-{str(task.dtype)[6:]}"
        names = [name for name in implementation_names(task) if not chosen or name in chosen]
        left_out = {} if option("--sweep") else {name: why for name in names if (why := why_left_out(task, name))}
        included = tuple(name for name in names if name not in left_out)
        cases += [pytest.param((task, included), name, id=f"{task_id}-{name}") for name in included]
        metafunc.config.stash[LOG].not_measured += [NotMeasured(str(task), name, why) for name, why in left_out.items()]
    metafunc.parametrize(("group", "name"), cases, indirect=["group"], scope="module")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict:
    return {"convit_kernels": machine()}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    log = config.stash[LOG]
    output_json["not_measured"] = [left_out._asdict() for left_out in log.not_measured]
    ratios = speed_ups(log.rows)
    for row in (entry["extra_info"] for entry in output_json["benchmarks"]):
        ratio = ratios.get((row["group"], row["implementation"]))
        row["ratio_to_eager"] = ratio and ratio.times  # a row alone cannot tell: it takes the group's pace


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    log = config.stash[LOG]
    if log.rows and find_spec("rich"):  # which an environment for running alone may lack
        from rich.console import Console

        from convit_kernels.bench.report import tables

        # a log file has no width of its own: the table's must not be cut to 80 columns
        console = Console(width=None if terminalreporter.isatty else 110)
        results = Results(log.rows, log.not_measured, machine(), date.today().isoformat())
        console.print(*tables(results), sep="\n")
