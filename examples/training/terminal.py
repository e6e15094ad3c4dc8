"""What a person sees of a command on stderr: errors in one line, progress as a bar or, without a terminal, as lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer import Exit

SECONDS_BETWEEN_LINES = 30.0
Show = Callable[[int, str, bool], None]

console = Console(stderr=True)


def _print_line(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _one_line(*kinds: type[Exception], code: int) -> Iterator[None]:
    """Ends the program on errors of these kinds.

    Each of torchrun's processes prints its own, though they may be the same: torchrun stops the others as soon as one
    has ended, so that no process can leave it to another.
    """
    try:
        yield
    except kinds as error:
        _print_line(f"error: {' '.join(str(error).splitlines())}", style="red")
        raise Exit(code) from error


@contextmanager
def wrong_input() -> Iterator[None]:
    """What the user gave cannot be used: one line, exit code 2."""
    with _one_line(OSError, ValueError, code=2):
        yield


@contextmanager
def failures() -> Iterator[None]:
    """The work cannot go on, for numbers or files that are bad, or a full disk: one line, exit code 1."""
    with _one_line(FloatingPointError, OSError, code=1):
        yield


@contextmanager
def progress(total: int, done: int = 0, unit: str = "step", shown: bool = True) -> Iterator[Show]:
    """Yields `show(done, text, always)`: how far the work is, with a text beside it.

    On a terminal it is a bar. Elsewhere it is a line every `SECONDS_BETWEEN_LINES`, and for each call with `always`.
    """
    if shown and not console.is_interactive:
        yield _lines(total, done, unit)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda done, text, always: bar.update(task, completed=done, description=text)


def _lines(total: int, first: int, unit: str) -> Show:
    begun = last = time.monotonic()

    def show(done: int, text: str, always: bool) -> None:
        nonlocal last
        now = time.monotonic()
        if not always and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - begun) / max(done - first, 1) * (total - done)
        parts = [f"{unit} {done} of {total}", text, f"{_duration(left)} left" if done < total else ""]
        _print_line(", ".join(part for part in parts if part))

    return show


def _duration(seconds: float) -> str:
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
