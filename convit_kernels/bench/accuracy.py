"""The correctness check before a time: a contender's results against the same work in float64, by `equivalence`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..equivalence import Expected, expected
from .contenders import EAGER, FLOOR, Contender, Task, build, label

DRAWS = 2  # a layer's or a model's results have many elements


class Accuracy(NamedTuple):
    """The largest error against float64, relative to the largest value of the result it occurs in, and its limit.

    Of all results, the one that comes closest to its limit or goes furthest beyond.
    """

    result: str
    error: float
    eager_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.result}: error {self.error:.1e} against float64, allowed {self.allowed:.1e}"


class WrongResultsError(Exception):
    """Some contender is wrong, so that no time of the group means anything; the text says which and how far."""


def _results(task: Task, contender: Contender) -> dict[str, Tensor | None]:
    results = contender.results() if task.backward else [contender.call(backward=False)()]
    names = ["out", *(f"d {name}" for name in contender.leaves)]
    return {name: None if value is None else value.detach() for name, value in zip(names, results, strict=False)}


def judge(task: Task, contenders: Mapping[str, Contender]) -> dict[str, Accuracy]:
    """The accuracy of each contender but the floor, which computes something else; eager's own against itself."""
    results = {name: _results(task, contender) for name, contender in contenders.items() if name != FLOOR}
    eager = results[EAGER] if EAGER in results else _results(task, build(task, EAGER))
    rule = expected(
        lambda dtype: eager if dtype == task.dtype else _results(task, build(task, EAGER, exact=True)),
        task.dtype,
        draws=DRAWS,
    )
    return {name: closest(rule, found) for name, found in results.items()}


def closest(rule: Mapping[str, Expected], results: Mapping[str, Tensor | None]) -> Accuracy:
    """Of all results the one that comes closest to what the rule allows, or goes furthest beyond."""
    found = []
    for name, one in rule.items():
        result = results[name]
        share, error = (math.inf, math.inf) if result is None else (one.share(result), one.error(result))
        # what is zero in exact arithmetic, as the gradient of the position's bias, is all rounding: no relative figure
        largest = one.exact.abs().max().item()
        scale = largest if largest > one.allowed else 1.0
        found.append((share, Accuracy(name, *(size / scale for size in (error, one.eager_error, one.allowed)))))
    return max(found, key=lambda entry: entry[0])[1]


def require_right(judged: Mapping[str, Accuracy]) -> None:
    """Raises WrongResultsError unless every contender has passed."""
    wrong = [f"{label(name)}: {found}" for name, found in judged.items() if not found.passed]
    if wrong:
        raise WrongResultsError("wrong results, so nothing is timed here. " + "; ".join(wrong))
