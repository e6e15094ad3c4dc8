"""Other projects' GPSA classes: telling them apart without importing them, and why one cannot be taken over.

A name and the right parameters do not make a layer the reference: forks add a convolution, scale the output, put noise
on the map. What can be seen without running it is looked at here; for the rest there is `trial`.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from .variants import PROJECTIONS

GATES = ("gating_param", "alpha")
DROPOUTS = ("attn_drop", "proj_drop")
_SIGNS = (*GATES, "gate", "gates")
_NAMES = ("GPSA", "GatedPositional")
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
    gated = any(isinstance(getattr(module, name, None), Tensor) for name in _SIGNS)
    return gated and (_is_named(type(module)) or (hasattr(module, "pos_proj") and hasattr(module, "gating_param")))


def why_not(module: nn.Module) -> str:
    """The reason why a foreign GPSA cannot be taken over, as far as can be seen without running it; "" for none."""
    checks = (_layout, _on_meta, _additions, _methods, _hooks)
    return next((reason for check in checks if (reason := check(module))), "")


def _layout(module: nn.Module) -> str:
    children = {name for name, child in module._modules.items() if child is not None}
    if "_orig_mod" in children:
        return "it is compiled by itself: replace the layer first and compile it then"
    missing = [name for name in ("proj", "pos_proj", *DROPOUTS) if name not in children]
    if not projections(module):
        missing.append("qk and v (or q, k and v, or qkv)")
    if not any(name in module._parameters or hasattr(module, name) for name in GATES):
        missing.append("gating_param (or alpha)")
    missing += [name for name in ("dim", "num_heads", "scale") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}: it is not laid out like the reference layer"
    return ""


def projections(module: nn.Module) -> tuple[str, ...]:
    """The children that give queries, keys and values, one of PROJECTIONS; () where there are none."""
    present = {name for name, child in module._modules.items() if child is not None}
    return next((names for names in PROJECTIONS if present.issuperset(names)), ())


def is_linear(child: str) -> bool:
    """Whether the reference or a variant of it has a linear layer of that name."""
    return child in ("proj", "pos_proj") or any(child in names for names in PROJECTIONS)


def feature_count(module: nn.Module) -> int:
    """Positional features that `pos_proj` takes, as far as it says; else the reference's."""
    layer: Any = module._modules["pos_proj"]
    weight = dict(layer.named_parameters(recurse=False)).get("weight")  # one that is computed may change when read
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[1])
    said = getattr(layer, "in_features", None)
    return said if isinstance(said, int) else 3 * int(getattr(module, "locality_dim", 1))


def requests(module: nn.Module) -> tuple[str | None, str | None]:
    """The further arguments of a layer's forward: the one that may be a key mask, the one that asks for the map."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    flags = [each.name for each in parameters if isinstance(each.default, bool)]
    masks = [each.name for each in parameters if each.name not in flags]
    return next(iter(masks), None), next(iter(flags), None)


def _on_meta(module: nn.Module) -> str:
    kept = getattr(module, "rel_indices", None)
    if isinstance(kept, Tensor) and kept.is_meta and kept.shape[1:2] != (1,):
        return "its positional features are on the meta device, where they cannot be read: replace the layer before"
    return ""


def _additions(module: nn.Module) -> str:
    """What the layer holds that the reference does not."""
    parametrized = sorted(getattr(module, "parametrizations", {}))
    if parametrized:
        return f"its {', '.join(parametrized)} is parametrized: replace the layer first and parametrize it then"
    pruned = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    if pruned:
        return f"its {', '.join(pruned)} is pruned: replace the layer first and prune it then, or prune.remove it"
    extra = [f"the child {name}" for name in module._modules if not is_linear(name) and name not in DROPOUTS]
    extra += [f"the parameter {name}" for name in module._parameters if name not in (*GATES, "scale")]
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


def is_own(module: nn.Module, name: str) -> bool:
    """Whether what stands on the instance is the class's method, which accelerate leaves there with its last hook."""
    value = vars(module)[name]
    return inspect.ismethod(value) and value.__self__ is module and value.__func__ is getattr(type(module), name, None)


def _methods(module: nn.Module) -> str:
    """What its class defines beside the reference's methods, and what stands on the instance in place of a method."""
    cls = type(module)
    patched = [name for name in vars(module) if callable(getattr(cls, name, None)) and not is_own(module, name)]
    if patched:
        return f"its {', '.join(patched)} has been set on the layer itself: undo that first"
    computed = [name for name in (*GATES, "scale") if isinstance(getattr(cls, name, None), property)]
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
    further = [each for index, each in enumerate(parameters) if index > 0 or each.kind is each.VAR_POSITIONAL]
    known = [name for name in requests(module) if name]
    open_ended = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in further)
    if open_ended or len(further) > len(known):
        return f"its forward takes {', '.join(map(str, further))}, the reference's only the tokens"
    return ""
