"""The same piece of work done by timm, by PyTorch alone and by each backend: what is timed, profiled and compared."""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.convit import GPSA as ReferenceGPSA  # noqa: N811
from timm.models.convit import ConVit
from torch import Tensor, nn

from ..attention import backends, check_backend, gpsa_attention
from ..attention import why_not as why_not_backend
from ..equivalence import eager_attention
from ..gpsa import GPSA
from ..models import SIZES
from ..replace import replace_gpsa


class Architecture(NamedTuple):
    """A ConViT of the paper's table 1: 12 blocks, 10 of them GPSA, 16 x 16 pixels a patch."""

    title: str
    dim: int
    heads: int


TITLES = {
    "convit_tiny": "ConViT-Ti",
    "convit_tiny_plus": "ConViT-Ti+",
    "convit_small": "ConViT-S",
    "convit_small_plus": "ConViT-S+",
    "convit_base": "ConViT-B",
    "convit_base_plus": "ConViT-B+",
}
ARCHITECTURES = {
    name: Architecture(title, SIZES[name]["embed_dim"], SIZES[name]["num_heads"]) for name, title in TITLES.items()
}
DEPTH, GPSA_BLOCKS, PATCH, CLASSES = 12, 10, 16, 1000
PARTS = {"attention": "attention", "layer": "GPSA layer", "model": "whole model"}
MODES = {False: "forward", True: "forward + backward"}  # by Task.backward

EAGER, COMPILED, SDPA = "eager", "compile", "sdpa"  # what is not ours
GRAPH = "graph"  # ours, automatic, recorded once as a CUDA graph and replayed: without the host's time
LABELS = {
    EAGER: "timm, eager",
    COMPILED: "timm, torch.compile",
    SDPA: "SDPA, content only",
    "auto": "ours, automatic",
    GRAPH: "ours, CUDA graph",
}


def architecture(model: str) -> Architecture:
    """Of a ConViT by its name, or, for the attention alone, of so many heads of so many channels: "6x64".

    Raises:
        ValueError: it is neither; the text says what is allowed.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", model)
    if sizes is None:
        raise ValueError(f"unknown model {model!r}: allowed are {list(ARCHITECTURES)} and HEADSxHEAD_DIM, as '6x64'")
    heads, head_dim = map(int, sizes.groups())
    return Architecture(f"{heads} heads of {head_dim}", heads * head_dim, heads)


class CannotRunError(Exception):
    """An implementation cannot do a task here; the text says why."""


class Task(NamedTuple):
    """A piece of work: the attention without projections, a GPSA layer, or a whole model on square images."""

    part: str
    model: str  # of `architecture`
    batch: int
    side: int = 14  # of the grid of patches
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.side * self.side

    def __str__(self) -> str:
        mode = MODES[self.backward]
        grid = f"{self.side}x{self.side} patches"
        title = architecture(self.model).title
        return f"{PARTS[self.part]}, {title}, {mode}, batch {self.batch}, {grid}, {str(self.dtype)[6:]}, {self.device}"

    def flops(self) -> float:
        """The arithmetic that any implementation must do: matrix products only, multiply and add as two.

        Softmax and the O(N^1.5) of position are left out, and so is what a backward recomputes; it counts twice the
        forward.
        """
        dim, n = architecture(self.model).dim, self.tokens
        attention, projections = 4 * n * n * dim, 8 * n * dim * dim
        forward: float
        if self.part == "attention":
            forward = attention
        elif self.part == "layer":
            forward = attention + projections
        else:
            mlp = 16 * n * dim * dim
            gpsa = GPSA_BLOCKS * (attention + projections + mlp)
            last = (n + 1) / n  # the class token joins for the last blocks
            plain = (DEPTH - GPSA_BLOCKS) * (attention * last * last + (projections + mlp) * last)
            forward = gpsa + plain + 2 * n * dim * 3 * PATCH * PATCH + 2 * dim * CLASSES
        return float(self.batch * forward * (3 if self.backward else 1))

    def bytes(self) -> float:
        """What must cross the memory bus at least: inputs, outputs, weights and their gradients, once a pass."""
        dim = architecture(self.model).dim
        rows = self.batch * self.tokens * dim
        if self.part == "attention":  # q, k, v, out; then also out and its gradient in, three gradients out
            values = rows * (12 if self.backward else 4)
        elif self.part == "layer":
            values = rows * (5 if self.backward else 2) + 4 * dim * dim * (3 if self.backward else 1)
        else:
            images = self.batch * 3 * (self.side * PATCH) ** 2
            values = images + 12 * DEPTH * dim * dim * (3 if self.backward else 1)
        return float(values * self.dtype.itemsize)


class Implementation(NamedTuple):
    """One way to do a task.

    `forward` gives the output; `leaves` are what its gradients are taken of, `d_out` the gradient that comes in.
    """

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    d_out: Tensor
    module: nn.Module | None = None

    def call(self, backward: bool) -> Callable[[], Any]:
        """What is timed: the output in inference mode, or the output and all gradients."""
        return self.results if backward else torch.inference_mode()(self.forward)

    def results(self) -> list[Tensor | None]:
        """The output and the gradients of the leaves, in order; None for a leaf that the output does not depend on."""
        out = self.forward()
        return [out, *torch.autograd.grad(out, list(self.leaves.values()), self.d_out, allow_unused=True)]


def perturb(model: nn.Module) -> None:
    """Makes every branch of timm's GPSA layers matter, from torch's generator.

    Fresh weights have equal gates and nearly uniform content attention, which would hide errors: gates and positions
    are perturbed, and the content logits made larger.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ReferenceGPSA):
                module.gating_param.add_(1.5 * torch.randn_like(module.gating_param))
                module.pos_proj.weight.mul_(1 + 0.3 * torch.randn_like(module.pos_proj.weight))
                module.qk.weight.mul_(3)


def convit(model: str, image_size: int = 224) -> nn.Module:
    """timm's ConViT of a named size with seeded, perturbed weights."""
    _, dim, heads = ARCHITECTURES[model]
    network = ConVit(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=dim // heads,  # timm's class multiplies it by the heads
        num_heads=heads,
        depth=DEPTH,
        local_up_to_layer=GPSA_BLOCKS,
        num_classes=CLASSES,
    )
    perturb(network)
    return network.eval()


def implementation_names(task: Task) -> list[str]:
    """The implementations of a task, eager first, our available backends last, on a GPU a CUDA graph after them."""
    ours = [backend.name for backend in backends() if backend.available]
    graph = [GRAPH] if task.device.startswith("cuda") else []
    return [EAGER, COMPILED, *([SDPA] if task.part == "attention" else []), *ours, *graph]


def is_ours(name: str) -> bool:
    return name not in (EAGER, COMPILED, SDPA)


def label(name: str) -> str:
    """An implementation's name for a reader."""
    return LABELS.get(name, f"ours: {name}")


def place(name: str) -> int:
    """Where an implementation stands in tables and figures: eager first, what has no fixed place after the rest."""
    order = [EAGER, COMPILED, SDPA, GRAPH, "auto", *(backend.name for backend in backends())]
    return order.index(name) if name in order else len(order)


def why_not(task: Task, name: str) -> str:
    """Why an implementation cannot do a task here; "" when it can. Builds nothing of the task.

    Raises:
        ValueError: there is no such implementation.
    """
    on_gpu = task.device.startswith("cuda")
    if name == EAGER:
        return ""
    if name == COMPILED:
        return _why_not_compiled(task.device)
    if name == SDPA:
        return "" if task.part == "attention" else "SDPA alone is a part of a layer, without position"
    if name == GRAPH:
        return "" if on_gpu else "CUDA graphs are of GPUs"
    try:
        check_backend(None if name == "auto" else name)
    except RuntimeError:
        return why_not_backend(name)
    # a layer would leave the task to another backend
    if name == "triton" and not on_gpu:
        return "the Triton kernels run on GPUs"
    if name == "cpu" and on_gpu:
        return "the C++ kernels run on CPUs"
    return ""


def build(task: Task, name: str, exact: bool = False) -> Implementation:
    """An implementation, on the same seeded inputs and weights as every other; `exact`: those values in float64.

    Compiled implementations compile at their first call.

    Raises:
        CannotRunError: this implementation cannot do this task here; the text says why.
        ValueError: there is no such implementation.
    """
    if reason := why_not(task, name):
        raise CannotRunError(reason)
    backend = None if name in ("auto", GRAPH) else name
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        builder = _attention if task.part == "attention" else _module
        return builder(task, name, backend, exact)
    finally:
        torch.random.set_rng_state(generator_state)


def _rounded(tensor: Tensor, task: Task, exact: bool) -> Tensor:
    """The tensor's values in the task's dtype, held in float64 when exact."""
    rounded = tensor.detach().to(task.device, task.dtype)
    return rounded.double() if exact else rounded


def _attention(task: Task, name: str, backend: str | None, exact: bool) -> Implementation:
    _, dim, heads = architecture(task.model)
    layer = ReferenceGPSA(dim, heads)
    layer.local_init()
    perturb(layer)
    shape = (task.batch, task.tokens, heads, dim // heads)
    # strided as the projections leave them: q and k in one tensor
    q, k = _rounded(torch.randn(2, *shape), task, exact).movedim(0, 2).contiguous().unbind(2)
    v = _rounded(torch.randn(shape), task, exact)
    d_out = _rounded(torch.randn(shape), task, exact).transpose(1, 2)
    leaves = {
        "q": q.transpose(1, 2),
        "k": k.transpose(1, 2),
        "v": v.transpose(1, 2),
        "pos_weight": _rounded(layer.pos_proj.weight, task, exact),
        "gate": _rounded(layer.gating_param, task, exact),
    }
    leaves = {key: leaf.detach().requires_grad_(task.backward) for key, leaf in leaves.items()}
    q, k, v, pos_weight, gate = leaves.values()
    scale = layer.scale

    if name in (EAGER, COMPILED):
        # exact indices are not those rounded first: bfloat16 has no odd number above 256, and so no 313 = 12^2 + 13^2
        rel_indices = layer.get_rel_indices(task.tokens).to(task.device, torch.float64 if exact else task.dtype)
        function = _compiled(eager_attention) if name == COMPILED else eager_attention
        return Implementation(lambda: function(q, k, v, pos_weight, gate, rel_indices, scale), leaves, d_out)
    if name == SDPA:
        return Implementation(lambda: F.scaled_dot_product_attention(q, k, v, scale=scale), leaves, d_out)

    def ours(*tensors: Tensor) -> Tensor:
        return gpsa_attention(*tensors, grid_size=task.side, scale=scale, backend=backend)

    inputs = q, k, v, pos_weight, gate
    function = _graphed(ours, inputs) if name == GRAPH else ours
    return Implementation(lambda: function(*inputs), leaves, d_out)


def _module(task: Task, name: str, backend: str | None, exact: bool) -> Implementation:
    _, dim, heads = architecture(task.model)
    module: Any
    if task.part == "layer":
        module = ReferenceGPSA(dim, heads)
        module.local_init()
        perturb(module)
        x, d_out = torch.randn(2, task.batch, task.tokens, dim)
    else:
        module = convit(task.model, task.side * PATCH)
        x, d_out = torch.randn(task.batch, 3, *[task.side * PATCH] * 2), torch.randn(task.batch, CLASSES)
    module = module.to(task.device, task.dtype)
    module = module.double() if exact else module
    x, d_out = _rounded(x, task, exact), _rounded(d_out, task, exact)
    leaves = dict(module.named_parameters())
    if task.part == "layer":  # an image needs no gradient
        leaves["x"] = x.requires_grad_(task.backward)

    for child in module.modules():
        if isinstance(child, ReferenceGPSA):
            # otherwise its first call makes them, and the compiler compiles twice
            child.rel_indices = child.get_rel_indices(task.tokens)
    if name == COMPILED:
        # The parts that repeat are compiled, not the model around them: once for all blocks of a kind.
        for part in module.blocks if task.part == "model" else [module]:
            part.compile(dynamic=False)
    elif name != EAGER and task.part == "model":
        replace_gpsa(module, backend=backend)  # the parameters stay the same objects
    elif name != EAGER:
        module = GPSA.from_module(module, backend=backend)
    if name == GRAPH:
        module = _graphed(module, (x,))
    return Implementation(lambda: module(x), leaves, d_out, module)


@lru_cache
def _why_not_compiled(device: str) -> str:
    """Why torch.compile cannot make code for the device; "" when it can."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return ""


def _graphed(function: Any, inputs: tuple[Tensor, ...]) -> Any:
    """A function or module as CUDA graphs of its forward pass and, where something needs a gradient, its backward."""
    return torch.cuda.make_graphed_callables(function, inputs)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return compiled
