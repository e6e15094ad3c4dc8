"""What against_deit.py and units.py share: implementations take turns, and a command keeps what it measured."""

import argparse
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tasks import DTYPES

from convit_kernels.bench.accuracy import WrongResultsError
from convit_kernels.bench.implementations import Implementation, Task
from convit_kernels.bench.machine import machine
from convit_kernels.bench.measure import interleaved, seconds
from convit_kernels.cli.output import check_writable, write_json


def take_turns(
    task: Task,
    implementations: Mapping[str, Implementation],
    rounds_of: Callable[[float], int],
    step: Callable[[float], object],
) -> dict[str, list[float]]:
    """Seconds of each implementation, one call of each in turn, after two of each that do not count.

    `rounds_of` gives the number of rounds from the seconds of one. `step` is called after each with its part of all.
    """
    calls = {name: one.call(task.backward) for name, one in implementations.items()}
    for call in calls.values():
        call()
    rounds = rounds_of(sum(seconds(call, task.device) for call in calls.values()))
    return interleaved(calls, task.device, rounds, lambda: step(1 / rounds))


def content(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A file of results."""
    return {"machine": machine(), "date": date.today().isoformat(), **more, "rows": rows}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of both; what cannot be is refused before any work."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    found.add_argument("--out", type=file_to_write, required=True, help="write the results here")
    found.add_argument(
        "--dtype",
        dest="dtypes",
        nargs=1,
        default=DTYPES,
        choices=(*DTYPES, "float16"),
        help=f"only this one; default: {' and '.join(DTYPES)}",
    )
    return found


def keep(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Writes what is measured; ends the command with the reason where an implementation is wrong."""
    try:
        results = measure()
    except WrongResultsError as reason:
        raise SystemExit(str(reason)) from None
    write_json(path, results)


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """The type of an option for numbers above zero."""

    def read(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number above 0")
        return number

    return read


def file_to_write(text: str) -> Path:
    try:
        check_writable("the results", Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)
