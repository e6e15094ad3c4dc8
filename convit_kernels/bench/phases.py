"""Which part of GPSA an operator belongs to, found from where its inputs come from.

timm's layer computes content, position and mix in one function, and a fused kernel all of them in one operator, so
neither module hooks nor names of operators tell them apart. The data do: every tensor carries the marks of the
parameters it was made from, and an operator belongs where its inputs' marks put it. The same rules read any layer with
the reference's parameter names, ours or timm's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from ..gpsa import GPSA, is_foreign

PHASES = {
    "projections": "queries, keys and values from the input",
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
# they change layout or dtype, not what a tensor is: queries stay queries
_LAYOUT = {
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


def phase_of(marks: frozenset[str]) -> str:
    """The phase of an operator whose inputs carry these marks."""
    content = bool(marks & {"query", "content"})
    if "make output" in marks:
        return "output"
    if marks & {"make query", "make value"}:
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
    phase = phase_of(marks)
    if phase in ("output", "rest"):
        return frozenset()
    if phase == "attention":
        return frozenset({"attention"})
    if phase == "projections":
        made = {mark.removeprefix("make ") for mark in marks if mark.startswith("make ")}
        return frozenset(made) or marks
    if "query" in marks and function not in _LAYOUT:
        return marks - {"query"} | {"content"}
    return marks


class _Follow(TorchFunctionMode):
    """Marks the results of torch functions, and names the phase of each in the profile.

    Copying queries or values into another layout belongs to what reads the copy: `layouts` has the phase of such ranges
    by their names, `waiting` the ranges whose results have not been read yet.
    """

    def __init__(self, marks: dict[Tensor, str]) -> None:
        super().__init__()
        self.marks = WeakIdKeyDictionary()
        for tensor, mark in marks.items():
            self.marks[tensor] = frozenset({mark})
        self.layouts: dict[str, str] = {}
        self.waiting = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # a property (shape, dtype, device); or the whole backward, whose nodes have phases of their own
        if name == "__get__" or func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            return func(*args, **kwargs)
        nothing = frozenset[str]()
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = nothing.union(*(self.marks.get(tensor, nothing) for tensor in inputs))
        waiting = nothing.union(*(self.waiting.get(tensor, nothing) for tensor in inputs))
        place = PREFIX + phase_of(marks)
        lays_out = bool(marks) and marks <= {"query", "value"} and name in _LAYOUT
        if lays_out:  # whose layout it is, its first use tells
            place = f"{PREFIX}layout {len(self.layouts)}"
            self.layouts[place] = "projections"
            waiting |= {place}
        with record_function(place):
            result = func(*args, **kwargs)
        results = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
        if results and not lays_out:  # asking for a shape is no use
            self.layouts.update({each: phase_of(marks) for each in waiting if self.layouts[each] == "projections"})
        after = _marks_after(marks, name)
        for tensor in results:
            self.marks[tensor] = after
            self.waiting[tensor] = waiting if lays_out else nothing
        return result


@contextmanager
def follow(module: nn.Module) -> Iterator[dict[str, str]]:
    """Within it, the profiler records a range around each torch function, named after its phase (PREFIX + phase).

    Gives the phases of those ranges whose names do not tell.
    """
    marks: dict[Tensor, str] = {}
    for layer in module.modules():
        if isinstance(layer, GPSA) or is_foreign(layer):
            for name, parameter in layer.named_parameters():
                if mark := _MARKS.get(name.partition(".")[0]):
                    marks[parameter] = mark
    with _Follow(marks) as following:
        yield following.layouts


def phase_ranges(events: Any, layouts: Mapping[str, str]) -> list[tuple[float, float, str]]:
    """(begin, end, phase) in microseconds, in order: of the forward's functions and of the backward's nodes.

    `layouts` is what `follow` gave. A node of the backward belongs where the operator does that made it; autograd
    numbers both alike.
    """

    def phase(name: str) -> str:
        return layouts.get(name, name.removeprefix(PREFIX))

    ranges = []
    made_in: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith(PREFIX):
            ranges.append((event.time_range.start, event.time_range.end, phase(event.name)))
        elif event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            parent = event.cpu_parent
            while parent is not None and not parent.name.startswith(PREFIX):
                parent = parent.cpu_parent
            if parent is not None:  # of several operators before a node was made, the last made it
                made_in[event.sequence_nr] = phase(parent.name)
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            made = made_in.get(event.sequence_nr, "rest")
            ranges.append((event.time_range.start, event.time_range.end, made))
    return sorted(ranges)
