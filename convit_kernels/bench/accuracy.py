"""The check before a time: an implementation's results against the same work in float64, by `equivalence`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..equivalence import Expected, expected
from .implementations import EAGER, SDPA, Implementation, Task, build, label

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
    """Some implementation is wrong, so that no time of the group means anything; the text says which and how far."""


def _results(task: Task, implementation: Implementation) -> dict[str, Tensor | None]:
    results = implementation.results() if task.backward else [implementation.call(backward=False)()]
    names = ["out", *(f"d {name}" for name in implementation.leaves)]
    return {name: None if value is None else value.detach() for name, value in zip(names, results, strict=False)}


def judge(task: Task, implementations: Mapping[str, Implementation]) -> dict[str, Accuracy]:
    """The accuracy of each implementation, eager's too, but SDPA's: it computes something else."""
    results = {name: _results(task, implementation) for name, implementation in implementations.items() if name != SDPA}
    eager = results[EAGER] if EAGER in results else _results(task, build(task, EAGER))
    rule = expected(
        lambda dtype: eager if dtype == task.dtype else _results(task, build(task, EAGER, exact=True)),
        task.dtype,
        draws=DRAWS,
    )
    return {name: closest(rule, values) for name, values in results.items()}


def closest(rule: Mapping[str, Expected], results: Mapping[str, Tensor | None]) -> Accuracy:
    """Of all results the one that comes closest to what the rule allows, or goes furthest beyond."""
    candidates = []
    for name, wanted in rule.items():
        result = results[name]
        share, error = (math.inf, math.inf) if result is None else (wanted.share(result), wanted.error(result))
        # what is zero in exact arithmetic, as the gradient of the position's bias, is all rounding: no relative figure
        largest = wanted.exact.abs().max().item()
        scale = largest if largest > wanted.allowed else 1.0
        sizes = (size / scale for size in (error, wanted.eager_error, wanted.allowed))
        candidates.append((share, Accuracy(name, *sizes)))
    return max(candidates, key=lambda entry: entry[0])[1]


def require_right(judged: Mapping[str, Accuracy]) -> None:
    """Raises WrongResultsError unless every implementation has passed."""
    wrong = [f"{label(name)}: {accuracy}" for name, accuracy in judged.items() if not accuracy.passed]
    if wrong:
        raise WrongResultsError("wrong results, so nothing is timed here. " + "; ".join(wrong))
