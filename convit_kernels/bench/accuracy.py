"""The gate before a time: whether a contender's results are right, against the same work in float64.

The rule is flash-attention's: an error of at most twice that of eager timm in the same dtype, plus a few roundings.
torch.compile, which is PyTorch's and not on trial here, may have four times: a whole model's parameters need it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .contenders import COMPILED, EAGER, FLOOR, Contender, Task, build, label

# of a result's largest value: torch's own fused attention, and the products behind it, take that many more in float32
ROUNDINGS = 8
INPUTS = ("q", "k", "v", "x")


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
    names = ["out", *contender.leaves]
    return {name: None if value is None else value.detach() for name, value in zip(names, results, strict=False)}


def _errors(results: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> dict[str, float]:
    """The relative error of the output, of each input's gradient, and the largest of all parameters' together.

    Parameters are judged together because the smallest have a handful of values, in which eager's error may be tiny
    by luck. A gradient that is zero in exact arithmetic, as the position's bias has, is rounding alone: passed over.
    """
    largest = {name: truth.abs().max().item() for name, truth in exact.items() if truth is not None}
    negligible = 1e-10 * max(largest.values())
    errors: dict[str, float] = {}
    for name, scale in largest.items():
        mine, truth = results[name], exact[name]
        if scale <= negligible:
            continue
        if mine is None or truth is None or not torch.isfinite(mine).all():
            error = math.inf
        else:
            error = (mine.double() - truth).abs().max().item() / scale
        group = "out" if name == "out" else f"d {name}" if name in INPUTS else "d parameters"
        errors[group] = max(error, errors.get(group, 0.0))
    return errors


def judge(task: Task, contenders: Mapping[str, Contender]) -> dict[str, Accuracy]:
    """The accuracy of each contender but the floor, which computes something else; eager's own against itself."""
    truth = _results(task, build(task, EAGER, exact=True))
    found = {name: _errors(_results(task, one), truth) for name, one in contenders.items() if name != FLOOR}
    eager = found[EAGER] if EAGER in found else _errors(_results(task, build(task, EAGER)), truth)
    floor = ROUNDINGS * torch.finfo(task.dtype).eps
    judged = {}
    for name, errors in found.items():
        times = 4 if name == COMPILED else 2
        each = [Accuracy(key, error, eager[key], times * eager[key] + floor) for key, error in errors.items()]
        judged[name] = max(each, key=lambda accuracy: accuracy.error / accuracy.allowed)
    return judged


def require_right(judged: Mapping[str, Accuracy]) -> None:
    """Raises WrongResultsError unless every contender has passed."""
    wrong = [f"{label(name)}: {found}" for name, found in judged.items() if not found.passed]
    if wrong:
        raise WrongResultsError("wrong results, so nothing is timed here. " + "; ".join(wrong))
