"""Other projects' GPSA classes: telling them apart without importing them, and why one cannot be taken over."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

_GATES = ("gating_param", "alpha", "gate", "gates")
_NAMES = ("GPSA", "GatedPositional")


def looks_like_gpsa(module: nn.Module) -> bool:
    """Whether a module calls itself a gated positional self-attention, ours among them."""
    gated = any(isinstance(getattr(module, name, None), Tensor) for name in _GATES)
    named = any(name in type(module).__name__ for name in _NAMES)
    return gated and (named or (hasattr(module, "pos_proj") and hasattr(module, "gating_param")))


def _features(module: nn.Module, side: int) -> Tensor:
    """The positional features a layer builds for a side x side grid, (N, N, F), asked of a copy."""
    probe: Any = copy.copy(module)  # its own attributes and buffers: building the features must leave no trace
    probe.__dict__["_buffers"] = dict(module._buffers)
    probe.__dict__["current_grid_size"] = (side, side)
    builder = getattr(probe, "get_rel_indices", None) or probe.set_rel_indices
    built = builder(side * side) if inspect.signature(builder).parameters else builder()
    table = probe.rel_indices if built is None else built
    if not isinstance(table, Tensor):
        raise TypeError(f"its positional features are a {type(table).__name__}")
    return table.squeeze(0)


def _expected_features(side: int, repeats: int) -> Tensor:
    token = torch.arange(side * side, dtype=torch.float32)
    x, y = token % side, token.div(side, rounding_mode="floor")
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    return torch.stack((dx, dy, dx.square() + dy.square()), dim=-1).repeat_interleave(repeats, dim=-1)


def why_not(module: nn.Module) -> str | None:
    """The reason why a foreign GPSA cannot be converted exactly; None when it can."""
    missing = [name for name in ("v", "proj", "pos_proj", "attn_drop", "proj_drop") if not hasattr(module, name)]
    if not hasattr(module, "qk") and not (hasattr(module, "q") and hasattr(module, "k")):
        missing.append("qk (or q and k)")
    if not hasattr(module, "gating_param") and not hasattr(module, "alpha"):
        missing.append("gating_param (or alpha)")
    missing += [name for name in ("dim", "num_heads", "scale") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}: it is not laid out like the reference layer"
    attributes: Any = module
    weight = attributes.pos_proj.weight
    if weight.is_meta:
        return "it is on the meta device, where its positional features cannot be read: materialise the model first"
    heads, repeats = attributes.num_heads, getattr(attributes, "locality_dim", 1)
    if weight.shape != (heads, 3 * repeats):
        return (
            f"its pos_proj.weight has shape {tuple(weight.shape)}, not ({heads}, {3 * repeats}): "
            "only positions on a two-dimensional grid, (dx, dy, dx^2 + dy^2), are the same mathematics"
        )
    side = 3
    try:
        features = _features(module, side)
    except Exception as error:  # another project's code, which may fail in any way
        return f"its positional features cannot be read ({type(error).__name__}: {error})"
    expected = _expected_features(side, repeats).to(features)
    if features.shape != expected.shape or not torch.equal(features, expected):
        return "its positional features are not (dx, dy, dx^2 + dy^2) of a two-dimensional grid, key minus query"
    return None
