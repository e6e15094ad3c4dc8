"""Runs steps, each a process with a limit of its own, within one deadline, and keeps what they found as it comes.

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

GRACE = 10.0  # seconds from an interrupt, at which pytest and ours write what they have, to the end
FILES = ("summary.txt", "results.json", "log.txt")
OUTCOMES = ("passed", "failed", "cut", "not run")


class Step(NamedTuple):
    """A process of a run."""

    name: str  # of letters, digits and -._

    command: Sequence[str]
    limit: float  # seconds
    environment: Mapping[str, str] = {}


class Group(NamedTuple):
    """Steps that run at the same time, as many as `at_once`, begun in their order."""

    steps: Sequence[Step]
    at_once: int = 1


@dataclass
class Outcome:
    """What a step came to."""

    name: str
    outcome: str  # of OUTCOMES
    seconds: float = 0.0
    limit: float = 0.0
    code: int | None = None
    counts: str = ""  # of tests, as pytest has them
    failures: list[str] = field(default_factory=list)
    command: str = ""
    found: list[Any] = field(default_factory=list)  # what the step has written for a program to read

    def __str__(self) -> str:
        first = f"{self.outcome:8} {self.seconds:4.0f} s of {self.limit:3.0f}  {self.name:28} {self.counts}".rstrip()
        return "\n".join([first, *(f"    {failure}" for failure in self.failures)])


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    begin: float
    end: float
    interrupted: bool = False

    def signal(self, number: int) -> None:
        """To the step and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Run:
    """Steps within one deadline; after each of them the folder `out` has what all of them have come to.

    Args:
        out: a folder, which is emptied of an earlier run's files.
        seconds: until the deadline.
        highlights: lines for the summary, of what each step has found, by its name.
        say: gets a line at each step's end.

    `out / "running" / NAME.json` is for a step to write to: one JSON document, or one in each line, as they come.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        highlights: Callable[[Mapping[str, list[Any]]], Iterable[str]] = lambda found: (),
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        grace: float = GRACE,
    ) -> None:
        self.out, self.highlights, self.say, self.grace = out, highlights, say, grace
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.outcomes: list[Outcome] = []
        self._running: list[_Running] = []
        out.mkdir(parents=True, exist_ok=True)
        for old in (*(out / name for name in FILES), *out.glob("benchmarks-*.json")):
            old.unlink(missing_ok=True)
        shutil.rmtree(out / "running", ignore_errors=True)
        (out / "running").mkdir()

    @property
    def code(self) -> int:
        """0 where every step has passed."""
        return int(any(outcome.outcome != "passed" for outcome in self.outcomes))

    @property
    def found(self) -> dict[str, list[Any]]:
        """What each step has found, by its name."""
        return {outcome.name: outcome.found for outcome in self.outcomes}

    def run(self, groups: Iterable[Group]) -> None:
        """The groups one after the other.

        An exception, such as that of a signal, ends the steps under way; what they have printed is kept.
        """
        ahead = [(group, list(group.steps)) for group in groups]
        for group, waiting in ahead:
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < group.at_once:
                        self._start(waiting.pop(0))
                    time.sleep(0.05)
                    for one in list(self._running):
                        self._look_after(one)
            except BaseException:
                for one in list(self._running):
                    one.signal(signal.SIGKILL)
                    one.process.wait()
                    self._ended(one, "cut")
                for step in (step for _, steps in ahead for step in steps):
                    self._record(Outcome(step.name, "not run", limit=step.limit))
                raise

    def _start(self, step: Step) -> None:
        now = time.monotonic()
        left = self.deadline - self.grace - now
        if left <= 0:
            self._record(Outcome(step.name, "not run", limit=step.limit))
            return
        log = self.out / "running" / f"{step.name}.log"
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **step.environment},
                    start_new_session=True,  # a group of its own, to be ended with all that it starts
                )
        except OSError as error:
            self._record(Outcome(step.name, "failed", limit=step.limit, failures=[str(error)]))
            return
        self._running.append(_Running(step, process, log, now, now + min(step.limit, left)))

    def _look_after(self, one: _Running) -> None:
        if one.process.poll() is not None:
            one.signal(signal.SIGKILL)  # what it may have left behind
            self._ended(one, "cut" if one.interrupted else "passed" if one.process.returncode == 0 else "failed")
        elif time.monotonic() > one.end:
            one.signal(signal.SIGKILL if one.interrupted else signal.SIGINT)
            one.interrupted, one.end = True, one.end + self.grace

    def _ended(self, one: _Running, outcome: str) -> None:
        self._running.remove(one)
        text = one.log.read_text(errors="replace")
        command = " ".join(one.step.command)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"{'=' * 120}\n{one.step.name}: {outcome}\n$ {command}\n{text}\n")
        result = Outcome(
            one.step.name,
            outcome,
            seconds=round(time.monotonic() - one.begin, 1),
            limit=one.step.limit,
            code=one.process.returncode,
            command=command,
            found=read(one.log.with_suffix(".json")),
        )
        result.counts, result.failures = of_tests(text)
        self._record(result)
        for file in (one.log, one.log.with_suffix(".json")):
            file.unlink(missing_ok=True)

    def _record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        steps = [asdict(each) for each in self.outcomes]
        write(self.out / "results.json", json.dumps({"code": self.code, "steps": steps}, indent=1) + "\n")
        write(self.out / "summary.txt", self.summary())
        self.say(str(outcome))

    def summary(self) -> str:
        """What each step came to, the worst first, then the highlights."""
        by_outcome = [[each for each in self.outcomes if each.outcome == outcome] for outcome in OUTCOMES]
        totals = ", ".join(f"{len(each)} {name}" for name, each in zip(OUTCOMES, by_outcome, strict=True) if each)
        lines = [str(each) for same in reversed(by_outcome) for each in same]
        spent = f"{len(self.outcomes)} steps in {time.monotonic() - self.begin:.0f} s: {totals}"
        return "\n".join([*lines, "", *self.highlights(self.found), "", spent]) + "\n"


def of_tests(text: str) -> tuple[str, list[str]]:
    """How many tests passed and failed by what pytest -v has printed, whole or cut, and the lines of those that failed.

    ("", []) where it is no output of pytest's.
    """
    failures = list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)))
    if ends := re.findall(r"^=+ (.*) in [\d.]+s.*=+$", text, re.MULTILINE):
        return ends[-1], failures
    found = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    return ", ".join(f"{found.count(name)} {name.lower()}" for name in dict.fromkeys(found)), failures


def write(path: Path, text: str) -> None:
    """A file that a reader sees whole at any time."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    os.replace(draft, path)


def read(path: Path) -> list[Any]:
    """The JSON documents of a file: the whole, or its lines, of which the last may be cut. [] where there is none."""
    text = path.read_text() if path.exists() else ""
    with contextlib.suppress(ValueError):
        return [json.loads(text)]
    documents = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            documents.append(json.loads(line))
    return documents
