"""Other projects' GPSA classes: telling them apart without importing them, and why one cannot be taken over.

A name and the right parameters do not make a layer the reference: forks add a convolution, scale the output, put noise
on the map. What can be seen without running it is looked at here; for the rest there is `trial_copy`, a layer of the
same class to be run beside ours.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_GATES = ("gating_param", "alpha", "gate", "gates")
_NAMES = ("GPSA", "GatedPositional")
# each child by what it maps: from so many channels to so many
_LINEAR = {"qk": ("dim", "2 dim"), "v": ("dim", "dim"), "q": ("dim", "dim"), "k": ("dim", "dim")}
_LINEAR |= {"proj": ("dim", "dim"), "pos_proj": ("features", "heads")}
_DROPOUTS = ("attn_drop", "proj_drop")
# of nn.Module's own methods those that a layer may define without changing how PyTorch treats it
_DEFINED = {
    "__init__",
    "forward",
    "extra_repr",
    "__repr__",
    "_get_name",
    "__init_subclass__",
    "__annotate__",
    "__annotate_func__",
}


def _is_named(cls: type) -> bool:
    return any(name in cls.__name__ for name in _NAMES)


def looks_like_gpsa(module: nn.Module) -> bool:
    """Whether a module calls itself a gated positional self-attention, ours among them."""
    gated = any(isinstance(getattr(module, name, None), Tensor) for name in _GATES)
    return gated and (_is_named(type(module)) or (hasattr(module, "pos_proj") and hasattr(module, "gating_param")))


def why_not(module: nn.Module) -> str:
    """The reason why a foreign GPSA cannot be taken over, as far as can be seen without running it; "" for none."""
    checks = (_layout, _on_meta, _additions, _methods, _hooks, _position_in_use)
    return next((reason for check in checks if (reason := check(module))), "")


def _layout(module: nn.Module) -> str:
    children = {name for name, child in module._modules.items() if child is not None}
    if "_orig_mod" in children:
        return "it is compiled by itself: replace the layer first and compile it then"
    missing = [name for name in ("v", "proj", "pos_proj", *_DROPOUTS) if name not in children]
    if "qk" not in children and not {"q", "k"} <= children:
        missing.append("qk (or q and k)")
    if not hasattr(module, "gating_param") and not hasattr(module, "alpha"):
        missing.append("gating_param (or alpha)")
    missing += [name for name in ("dim", "num_heads", "scale") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}: it is not laid out like the reference layer"
    attributes: Any = module
    weight, expected = attributes.pos_proj._parameters.get("weight"), (attributes.num_heads, 3 * _repeats(module))
    if weight is not None and weight.shape != expected:
        return (
            f"its pos_proj.weight has shape {tuple(weight.shape)}, not {expected}: "
            "only positions on a two-dimensional grid, (dx, dy, dx^2 + dy^2), are the same mathematics"
        )
    return ""


def _on_meta(module: nn.Module) -> str:
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "it is on the meta device, where its positional features cannot be read: materialise the model first"
    return ""


def _repeats(module: nn.Module) -> int:
    return int(getattr(module, "locality_dim", 1))


def trial_grid(module: nn.Module) -> tuple[int, int]:
    """A small grid that the module has no positional features of yet; not square where it need not be."""
    if hasattr(module, "current_grid_size"):
        return 2, 4
    present = getattr(module, "rel_indices", None)
    return (4, 4) if isinstance(present, Tensor) and present.dim() == 4 and present.shape[1] == 9 else (3, 3)


def _expected_features(grid: tuple[int, int], repeats: int, device: torch.device | str = "cpu") -> Tensor:
    """(N, N, 3 * repeats) float32."""
    height, width = grid
    token = torch.arange(height * width, dtype=torch.float32, device=device)
    x, y = token % width, token.div(width, rounding_mode="floor")
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    return torch.stack((dx, dy, dx.square() + dy.square()), dim=-1).repeat_interleave(repeats, dim=-1)


def _position_in_use(module: nn.Module) -> str:
    """Whether the features that the layer keeps for its next call were put there by somebody else."""
    kept = getattr(module, "rel_indices", None)
    if not isinstance(kept, Tensor) or kept.dim() != 4 or kept.shape[1] == 1 or hasattr(module, "current_grid_size"):
        return ""
    side = int(kept.shape[1] ** 0.5)
    expected = _expected_features((side, side), _repeats(module), kept.device)
    # they may have been rounded to bfloat16 on the way
    if kept.shape[1:] != expected.shape or not torch.allclose(kept[0].float(), expected, rtol=2**-8):
        return (
            f"its rel_indices of {kept.shape[1]} tokens are not those of a square grid: build convit_kernels.GPSA "
            "with grid_size=(height, width) and load this layer's state_dict into it"
        )
    return ""


def _additions(module: nn.Module) -> str:
    """What the layer holds that the reference does not."""
    parametrized = sorted(getattr(module, "parametrizations", {}))
    if parametrized:
        return f"its {', '.join(parametrized)} is parametrized: replace the layer first and parametrize it then"
    pruned = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    if pruned:
        return f"its {', '.join(pruned)} is pruned: replace the layer first and prune it then, or prune.remove it"
    extra = [f"the child {name}" for name in module._modules if name not in (*_LINEAR, *_DROPOUTS)]
    extra += [f"the parameter {name}" for name in module._parameters if name not in ("gating_param", "alpha", "scale")]
    extra += [f"the buffer {name}" for name in module._buffers if name != "rel_indices"]
    if extra:
        return f"it has {', '.join(extra)}, of which the reference layer knows nothing"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}: replace the layer before what has made it so"
    return ""


def _hooks(module: nn.Module) -> str:
    for key, hooks in vars(module).items():
        if key.endswith("_hooks"):
            for hook in hooks.values():
                if getattr(getattr(hook, "hook", hook), "__self__", None) is module:
                    return f"one of its {key[1:]} is a method of the layer itself: remove it first"
    return ""


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether what stands on the instance is the class's method, which accelerate leaves there with its last hook."""
    value = vars(module)[name]
    return inspect.ismethod(value) and value.__self__ is module and value.__func__ is getattr(type(module), name, None)


def _methods(module: nn.Module) -> str:
    """What its class defines beside the reference's methods, and what stands on the instance in place of a method."""
    cls = type(module)
    patched = [name for name in vars(module) if callable(getattr(cls, name, None)) and not _is_own(module, name)]
    if patched:
        return f"its {', '.join(patched)} has been set on the layer itself: undo that first"
    computed = [name for name in ("gating_param", "alpha", "scale") if isinstance(getattr(cls, name, None), property)]
    if computed:
        return f"its {', '.join(computed)} is computed by a property, which our layer would read only once"
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    for index, base in enumerate(bases):
        own = [name for name in vars(base) if inspect.isroutine(getattr(nn.Module, name, None))]
        if strange := sorted(set(own) - _DEFINED):
            return f"its class {base.__name__} has its own {', '.join(strange)}, on which PyTorch relies"
        if index > 0 and _is_named(base) and "forward" in vars(base):
            derived = {
                name
                for each in bases[:index]
                for name, value in vars(each).items()
                if inspect.isroutine(value) or isinstance(value, property)
            }
            if overridden := sorted((derived & set(dir(base))) - (_DEFINED - {"forward"})):
                return (
                    f"it overrides {', '.join(overridden)} of {base.__module__}.{base.__qualname__}, which may change "
                    "the results at any time: replace a layer of that class and do the rest outside of it, or subclass "
                    "convit_kernels.GPSA"
                )
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    further = [str(each) for index, each in enumerate(parameters) if index > 0 or each.kind is each.VAR_POSITIONAL]
    if further:
        return f"its forward takes {', '.join(further)}, the reference's only the tokens"
    return ""


def trial_copy(module: nn.Module) -> nn.Module:
    """A layer of the same class on the CPU in float32, made without its constructor, sharing nothing with the module.

    To be called within `undisturbed`. Its parameters are random, so that content, position and gate all matter; its
    children are plain linear layers and dropouts with p=0: what the module's own are makes no difference to what its
    class does with them.
    """
    attributes: Any = module
    dim, heads = int(attributes.dim), int(attributes.num_heads)
    sizes = {"dim": dim, "2 dim": 2 * dim, "heads": heads, "features": 3 * _repeats(module)}
    # logits of a standard deviation of about 2, whatever the scale is
    scale = attributes.scale if isinstance(attributes.scale, (int, float)) else (dim // heads) ** -0.5
    gains = {"qk": (2 / max(abs(scale), 1e-6)) ** 0.5 * (dim // heads) ** -0.25, "pos_proj": 0.4 * dim**0.5}
    gains |= {"q": gains["qk"], "k": gains["qk"]}
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, least: float, most: float) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape).uniform_(least, most, generator=generator))

    new: Any = object.__new__(type(module))
    nn.Module.__init__(new)
    for name, value in vars(module).items():
        if name not in vars(new):
            vars(new)[name] = _on_cpu(value) if isinstance(value, Tensor) else copy.deepcopy(value)
    for name, parameter in module._parameters.items():
        value = None if parameter is None else uniform(*parameter.shape, least=0.5, most=2)  # also where it is a scale
        new.register_parameter(name, value)
    for name, buffer in module._buffers.items():
        new.register_buffer(name, None if buffer is None else _on_cpu(buffer))
    for name in module._modules:
        if name in _LINEAR:
            inputs, outputs = (sizes[size] for size in _LINEAR[name])
            layer = nn.Linear(inputs, outputs, device="meta")  # no values of its own
            most = gains.get(name, 1) * (3 / dim) ** 0.5
            layer.weight = uniform(outputs, inputs, least=-most, most=most)
            layer.bias = uniform(outputs, least=-0.5, most=0.5)
            new.add_module(name, layer)
        elif name in _DROPOUTS:
            new.add_module(name, nn.Dropout(0.0))
    if hasattr(module, "current_grid_size"):
        new.current_grid_size = trial_grid(module)
    return new  # type: ignore[no-any-return]


def why_not_position(trial: nn.Module) -> str:
    """Why the positional features that a trial copy builds are not the reference's; "" when they are."""
    probe: Any = copy.copy(trial)
    for own in ("_buffers", "_non_persistent_buffers_set"):  # building them must leave no trace in the copy
        probe.__dict__[own] = copy.copy(probe.__dict__[own])
    grid = trial_grid(trial)
    try:
        builder = getattr(probe, "get_rel_indices", None) or probe.set_rel_indices
        built = builder(grid[0] * grid[1]) if inspect.signature(builder).parameters else builder()
        features = (probe.rel_indices if built is None else built).squeeze(0).float()
    except Exception as error:  # another project's code, which may fail in any way
        return f"its positional features cannot be read ({type(error).__name__}: {error})"
    expected = _expected_features(grid, _repeats(trial))
    if features.shape != expected.shape or not torch.equal(features, expected):
        return "its positional features are not (dx, dy, dx^2 + dy^2) of a two-dimensional grid, key minus query"
    return ""


def _tokens(trial: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, math.prod(trial_grid(trial)), trial.dim, generator=generator)


def _run(layer: nn.Module, x: Tensor, method: str = "forward") -> Any:
    """What the method gives, in place of None in a tuple the map that it stands for."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
    result = getattr(layer, method)(x)
    if isinstance(result, tuple):
        return tuple(_run(layer, x, "get_attention") if each is None else each for each in result)
    return result


def _run_and_differentiate(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """The outputs, and the gradients of x and of every parameter, for a loss to which each output's place matters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.enable_grad():
        result = _run(layer, x)
        out = result[0] if isinstance(result, tuple) else result
        if not isinstance(out, Tensor):
            return (result,)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return result, x.grad, *(parameter.grad for parameter in layer.parameters())


def returns_tuple(trial: nn.Module) -> bool:
    try:
        return isinstance(_run(trial, _tokens(trial)), tuple)
    except Exception:  # another project's code, which may fail in any way: `difference` says in which
        return False


def difference(trial: Any, ours: Any) -> str:
    """What a trial copy does otherwise than our layer with its parameters and children; "" where they agree.

    Compared are outputs in both modes and with dropout, gradients, and what the layers say of their maps.
    """
    x = _tokens(trial)

    def compare(what: Callable[..., Any], name: str) -> str:
        try:
            theirs = what(trial, x)
        except Exception as error:  # another project's code, which may fail in any way
            return f"on random tokens it fails to give {name} ({type(error).__name__}: {error})"
        try:
            mine = what(ours, x)
        except (ValueError, RuntimeError) as error:
            return f"its parameters do not fit the reference's: {error}"
        return "" if _agree(mine, theirs) else f"for the same tokens it gives other {name} than the reference"

    for training, dropout_p, what in (
        (True, 0.0, _run_and_differentiate),
        (True, 0.5, _run),
        (False, 0.0, _run),
    ):
        trial.training = ours.training = training
        for drop in (trial.attn_drop, trial.proj_drop):
            drop.training, drop.p = training, dropout_p
        outputs = "outputs or gradients" if what is _run_and_differentiate else "outputs"
        case = f"{outputs} in {'training' if training else 'evaluation'} mode{' with dropout' if dropout_p else ''}"
        if reason := compare(what, case):
            return reason
    for name in ("get_attention", "get_attention_map"):
        try:
            theirs = _run(trial, x, name)
        except Exception:  # missing, or with other arguments: then ours gives no result in its place
            continue
        if not _agree(_run(ours, x, name), theirs):
            return f"for the same tokens its {name} gives something else than the reference's"
    return ""


def _agree(mine: Any, theirs: Any) -> bool:
    """Whether two results are the same up to the rounding of float32."""
    ours, others = tree_leaves(mine), tree_leaves(theirs)
    if type(mine) is not type(theirs) or len(ours) != len(others):
        return False
    largest = max((leaf.abs().max().item() for leaf in others if isinstance(leaf, Tensor)), default=0.0)
    return all(map(partial(_equal, floor=1e-6 * largest), ours, others))


def _equal(mine: Any, theirs: Any, floor: float) -> bool:
    """`floor` is for what cancels to zero, as the gradient of pos_proj.bias, and leaves rounding."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=1e-4)
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
        return mine is theirs is None
    return bool((mine - theirs).abs().max() <= 1e-4 * theirs.abs().max() + floor)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, in float32 if it is of floating point."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs trials so that nobody notices: float32, no autocast, no hooks on every module, RNG as it was."""
    state = vars(nn.modules.module)
    hooks = [state[name] for name in state if name.startswith("_global_") and isinstance(state[name], dict)]
    saved, dtype = [dict(each) for each in hooks], torch.get_default_dtype()
    for each in hooks:
        each.clear()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for each, values in zip(hooks, saved, strict=True):
            each.update(values)
