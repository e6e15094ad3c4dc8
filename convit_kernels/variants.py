"""Other people's GPSA classes: telling them apart without importing them, and turning them into ours.

A conversion keeps the very child modules, parameters and hooks of the original, so an optimizer made before goes on
working and a state_dict keeps its keys. What the layers of the field differ in is small: separate query and key
projections (image reconstruction), a tuple as output (DyTox), more positional features and a gate named alpha (VISSL).
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .attention import check_backend
from .gpsa import GPSA
from .linear import project

_GATES = ("gating_param", "alpha", "gate", "gates")
_NAMES = ("GPSA", "GatedPositional")


class _SeparateQueryKey(GPSA):
    """Two projections q and k instead of one qk; the block may set `current_grid_size` before each call."""

    q: nn.Module
    k: nn.Module

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*x.shape[:2], self.num_heads, self.dim // self.num_heads)
        q, k, v = (project(layer, x).reshape(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v

    @property
    def current_grid_size(self) -> tuple[int, int] | None:
        return self.grid_size

    @current_grid_size.setter
    def current_grid_size(self, grid_size: tuple[int, int] | None) -> None:
        self.grid_size = grid_size


class _TupleOutput(GPSA):
    """DyTox: forward returns (x, attention, v). The map is what the fused path never builds: None stands for it."""

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        q, k, v = self.query_key_value(x)
        return self.proj_drop(project(self.proj, self._attend(q, k, v, self.grid_size))), None, v


class _RepeatedFeatures(GPSA):
    """VISSL: each feature stands locality_dim times in pos_proj, the logits are divided by it, the gate is alpha."""

    alpha: nn.Parameter
    locality_dim: int

    def position_weight(self) -> Tensor:
        return super().position_weight().reshape(self.num_heads, 3, self.locality_dim).mean(dim=2)

    def gate(self) -> Tensor:
        return self.alpha.flatten()

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Any:
        distance, attention = super().get_attention_map(x, return_map=True)
        mean = distance.mean().item()
        return (mean, attention) if return_map else mean


def is_foreign_gpsa(module: nn.Module) -> bool:
    """Whether a module calls itself a gated positional self-attention, convertible or not, and is not ours already."""
    if isinstance(module, GPSA):
        return False
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


def _class_for(module: nn.Module) -> type[GPSA]:
    if hasattr(module, "alpha"):
        return _RepeatedFeatures
    if not hasattr(module, "qk"):
        return _SeparateQueryKey
    # DyTox's constructor is the only one that takes `fc`, and only its forward returns a tuple
    return _TupleOutput if "fc" in inspect.signature(type(module).__init__).parameters else GPSA


def convert(module: nn.Module, *, backend: str | None = None) -> GPSA:
    """Our layer in place of a reference GPSA, sharing its children, parameters and hooks.

    Raises:
        TypeError: the module is no GPSA, or one whose mathematics differs; the text says in what.
        ValueError, RuntimeError: the backend is unknown, or cannot run on this machine.
    """
    check_backend(backend)
    name = type(module).__name__
    if not is_foreign_gpsa(module):
        raise TypeError(f"{name} is not a reference GPSA: it has no gated positional attention of its own")
    if reason := why_not(module):
        raise TypeError(f"{name} cannot be replaced exactly: {reason}")
    original: Any = module
    cls = _class_for(module)
    new: Any = cls.__new__(cls)
    nn.Module.__init__(new)
    new.dim, new.num_heads, new.scale = original.dim, original.num_heads, original.scale
    new.locality_strength = getattr(original, "locality_strength", 1.0)
    new.use_local_init = cls is not _TupleOutput  # DyTox's reset_parameters leaves the convolution out
    new.grid_size = getattr(original, "current_grid_size", None)
    new.backend = backend
    if cls is _RepeatedFeatures:
        new.locality_dim = original.locality_dim
    for key, parameter in module._parameters.items():
        new.register_parameter(key, parameter)
    for key, child in module._modules.items():
        new.add_module(key, child)
    for key, value in vars(module).items():
        if "hook" in key:  # the dictionaries themselves, so that the handles given out keep working
            new.__dict__[key] = value
    new.training = module.training
    return new  # type: ignore[no-any-return]
