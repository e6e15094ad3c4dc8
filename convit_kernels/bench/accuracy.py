"""The correctness check before a time: a contender's results against the same work in float64, by `equivalence`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..equivalence import expected
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
    rule = expected(
        lambda dtype: _results(task, build(task, EAGER, exact=dtype == torch.float64)),
        task.dtype,
        implementation=lambda: _results(task, build(task, "reference", exact=True)),
        draws=DRAWS,
    )
    judged = {}
    for name, contender in contenders.items():
        if name == FLOOR:
            continue
        results = _results(task, contender)
        each = []
        for key, one in rule.items():
            result = results[key]
            scale = one.exact.abs().max().item() or 1.0
            error = math.inf if result is None else one.error(result)
            each.append(Accuracy(key, *(size / scale for size in (error, one.eager_error, one.allowed))))
        judged[name] = max(each, key=lambda accuracy: accuracy.error / accuracy.allowed if accuracy.error else 0.0)
    return judged


def require_right(judged: Mapping[str, Accuracy]) -> None:
    """Raises WrongResultsError unless every contender has passed."""
    wrong = [f"{label(name)}: {found}" for name, found in judged.items() if not found.passed]
    if wrong:
        raise WrongResultsError("wrong results, so nothing is timed here. " + "; ".join(wrong))
