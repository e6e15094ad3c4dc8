"""Which part of GPSA an operator belongs to, found from where its inputs come from.

timm's layer computes content, position and mix in one function, and a fused kernel all of them in one operator, so
neither module hooks nor names of operators tell them apart. The data do: every tensor carries the marks of the
parameters it was made from, and an operator belongs where its inputs' marks put it. The same rules read any layer with
the reference's parameter names, ours or timm's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from .gpsa import GPSA
from .variants import is_foreign_gpsa

PHASES = {
    "projections": "queries, keys and values from the input, and copies that lay them out",
    "content": "scores of queries and keys, their softmax; in SDPA their product with the values too",
    "position": "positional scores and softmax, or the tables and their product with the values",
    "mix": "gates, mixing the two maps or outputs; of a dense map the product with the values",
    "attention": "content, position and mix in one kernel",
    "output": "the output projection",
    "rest": "all that is not GPSA: MLPs, norms, the blocks without position, embedding, head",
    "compiled": "code of torch.compile, which crosses these borders",
}
PREFIX = "convit_kernels phase: "

# what a tensor was made from: parameters, then values that are not yet scores, scores, and values
_MARKS = {
    "qk": "make query",
    "q": "make query",
    "k": "make query",
    "v": "make value",
    "proj": "make output",
    "pos_proj": "position",
    "gating_param": "gate",
}
# they move or rename nothing but strides: queries stay queries
_VIEWS = {
    "reshape",
    "view",
    "permute",
    "transpose",
    "movedim",
    "unbind",
    "chunk",
    "split",
    "__getitem__",
    "expand",
    "contiguous",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "detach",
    "to",
    "float",
    "type_as",
}


def phase_of(marks: frozenset[str], function: str = "") -> str:
    """The phase of an operator whose inputs carry these marks; `function` is its name."""
    content = bool(marks & {"query", "content"})
    if "make output" in marks:
        return "output"
    if marks & {"make query", "make value"}:
        return "projections"
    if marks and marks <= {"query", "value"} and function in _VIEWS:
        return "projections"
    if "attention" in marks or {"query", "position"} <= marks:
        return "attention"
    if content and marks & {"position", "gate"}:
        return "mix"
    if "gate" in marks and "value" not in marks:
        return "mix"
    if "position" in marks:
        return "position"
    if content:
        return "content"
    return "projections" if "value" in marks else "rest"


def _marks_after(marks: frozenset[str], function: str) -> frozenset[str]:
    """What the operator's result carries."""
    phase = phase_of(marks, function)
    if phase in ("output", "rest"):
        return frozenset()
    if phase == "attention":
        return frozenset({"attention"})
    if phase == "projections":
        made = {mark.removeprefix("make ") for mark in marks if mark.startswith("make ")}
        return frozenset(made) or marks
    if "query" in marks and function not in _VIEWS:
        return marks - {"query"} | {"content"}
    return marks


class _Follow(TorchFunctionMode):
    """Marks the results of torch functions, and names the phase of each in the profile."""

    def __init__(self, marks: dict[Tensor, str]) -> None:
        super().__init__()
        self.marks = WeakIdKeyDictionary()
        for tensor, mark in marks.items():
            self.marks[tensor] = frozenset({mark})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # a property (shape, dtype, device); or the whole backward, whose nodes have phases of their own
        if name == "__get__" or func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            return func(*args, **kwargs)
        inputs = (leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor))
        marks = frozenset[str]().union(*(self.marks.get(tensor, frozenset()) for tensor in inputs))
        with record_function(PREFIX + phase_of(marks, name)):
            result = func(*args, **kwargs)
        after = _marks_after(marks, name)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.marks[tensor] = after
        return result


@contextmanager
def follow(module: nn.Module) -> Iterator[None]:
    """Within it, the profiler records a range around each torch function, named after its phase (PREFIX + phase)."""
    marks: dict[Tensor, str] = {}
    for layer in module.modules():
        if isinstance(layer, GPSA) or is_foreign_gpsa(layer):
            for name, parameter in layer.named_parameters():
                if mark := _MARKS.get(name.partition(".")[0]):
                    marks[parameter] = mark
    with _Follow(marks):
        yield


def phase_ranges(events: Any) -> list[tuple[float, float, str]]:
    """(begin, end, phase) in microseconds, in order: of the forward's functions and of the backward's nodes.

    A node of the backward belongs where the operator does that made it; autograd numbers both alike.
    """
    ranges = []
    made_in: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith(PREFIX):
            phase = event.name.removeprefix(PREFIX)
            ranges.append((event.time_range.start, event.time_range.end, phase))
        elif event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            parent = event.cpu_parent
            while parent is not None and not parent.name.startswith(PREFIX):
                parent = parent.cpu_parent
            if parent is not None:  # of several operators before a node was made, the last made it
                made_in[event.sequence_nr] = parent.name.removeprefix(PREFIX)
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            phase = made_in.get(event.sequence_nr, "rest")
            ranges.append((event.time_range.start, event.time_range.end, phase))
    return sorted(ranges)
