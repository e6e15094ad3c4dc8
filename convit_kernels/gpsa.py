"""The GPSA layer: projections around `gpsa_attention`, with the reference layer's signature and state_dict."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import foreign
from .attention import NO_SCRIPT, check_backend, gpsa_attention
from .backends import reference
from .grid import GridSize, parse_grid, resolve_grid
from .linear import project, why_not_plain
from .ops import exporting

# torch.fx keeps it as one call: its checks read shapes, which a symbolic trace does not have
torch.fx.wrap("gpsa_attention")

_PROJECTIONS = ("qk", "q", "k", "v", "proj", "pos_proj")


@torch.no_grad()
def _normal_(weight: Tensor, std: float) -> None:
    """Normal values by inverse CDF, one uniform draw each, clamped to [-2, 2], as the reference initialises.

    torch's own trunc_normal_ has changed its method, and with it what a seed gives.
    """
    weight.uniform_(-1, 1).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2)


def _settable(module: nn.Module, name: str, owner: str) -> nn.Parameter:
    """A parameter that is to get a value, which would be lost where something else computes it."""
    parameter = module._parameters.get(name)
    if parameter is None:
        raise RuntimeError(
            f"{owner}, a {type(module).__name__}, has no parameter {name} to set: it is computed, by pruning, a "
            "parametrization or a wrapper; set initial values before that"
        )
    if _is_distributed(parameter):
        raise RuntimeError(
            f"{name} of {owner} is shared by several processes, a {type(parameter).__name__}: set initial values "
            "before that, or load a state_dict"
        )
    return parameter


def _is_distributed(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, whose class takes a second to import."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "placements")


class GPSA(nn.Module):
    """Gated positional self-attention (d'Ascoli et al., 2021, arXiv 2103.10697), a drop-in for the reference layer.

    Same constructor, parameters, initial values and outputs as the class of facebookresearch/convit and timm. What
    differs: position costs next to nothing, grids need not be square, and every floating-point dtype works.

    Args:
        dim: channels of the input and the output; a multiple of num_heads.
        num_heads: attention heads.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_scale: scale of the content logits; default head_dim ** -0.5.
        attn_drop: dropout on the mixed attention map.
        proj_drop: dropout on the output.
        locality_strength: how sharply `local_init` makes heads attend to their pixel; alpha in the paper.
        use_local_init: start as a convolution (paper, equation 5).
        grid_size: (height, width) of the patch grid, one int for a square one, None: square, from the token count.
            May be assigned at any time.
        backend: a name from `convit_kernels.backends()`; None chooses the fastest that can run.
        device, dtype: of the parameters.

    The fast backends read `pos_proj`'s weight and `attn_drop`'s probability and call neither. Where calling them would
    be more (hooks, pruning, a LoRA adapter, another class), the layer builds the map as the reference does and calls
    them.

    Shapes:
        forward: (B, N, dim) -> (B, N, dim), N tokens of the grid in row-major order, without a class token.

    Raises:
        ValueError: dim is no multiple of num_heads, a dropout is outside [0, 1], or the backend's name is unknown.
        RuntimeError: the backend cannot run on this machine; in forward, a fast backend was asked for by name, and
            `pos_proj` or `attn_drop` has to be called.
    """

    qk: nn.Module
    v: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    attn_drop: nn.Module
    pos_proj: nn.Module
    gating_param: nn.Parameter
    scale: Any  # a number, or a tensor that broadcasts to (B, H, N, 1) where another project learns it
    _gate_name = "gating_param"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        *,
        grid_size: int | Sequence[int] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"dim must be a positive multiple of num_heads, but {dim=} and {num_heads=}")
        check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.locality_strength = locality_strength
        self.use_local_init = use_local_init
        self.grid_size = None if grid_size is None else parse_grid(grid_size)
        self.backend = backend

        # Children and draws in the reference's order: the same seed gives the same parameters.
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_module(cls, module: nn.Module, *, backend: str | None = None) -> "GPSA":
        """This layer with the very parameters, hooks and settings of a reference GPSA, which is left unchanged.

        Raises:
            TypeError: the module is no GPSA, or one whose mathematics differs; the text says in what.
            ValueError, RuntimeError: the backend is unknown, or cannot run on this machine.
        """
        check_backend(backend)
        name = type(module).__name__
        if not is_foreign(module):
            raise TypeError(f"{name} is not a reference GPSA: it has no gated positional attention of its own")
        try:
            kind = kind_of(module)
        except TypeError as error:
            raise TypeError(f"{name} cannot be replaced exactly: {error}") from error
        return adopt(module, kind, backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The reference's initial values: truncated normal projections, open gates, then `local_init`.

        Raises:
            RuntimeError: a parameter is computed, not the layer's own to set. Nothing has been set then.
        """
        names = [name for name, _ in self.named_children() if name in _PROJECTIONS]
        weights = {name: _settable(getattr(self, name), "weight", name) for name in names}
        gate = _settable(self, self._gate_name, "the layer")
        for name, weight in weights.items():
            _normal_(weight, std=0.02)
            if (bias := getattr(self, name).bias) is not None:
                bias.zero_()
        gate.fill_(1)
        if self.use_local_init:
            self.local_init()

    @torch.no_grad()
    def local_init(self, locality_strength: float | None = None) -> None:
        """Makes head h attend to one pixel of a k x k window and pass its value on, as a convolution does (equation 5).

        As in the reference k = int(sqrt(num_heads)): only the first k * k heads are placed; the weights of all heads
        are multiplied by locality_strength (default: the layer's own).

        Raises:
            RuntimeError: the weight of `v` or `pos_proj` is computed, not its own to set. Nothing has been set then.
        """
        strength = self.locality_strength if locality_strength is None else locality_strength
        values, position = (_settable(getattr(self, name), "weight", name) for name in ("v", "pos_proj"))
        values.copy_(torch.eye(self.dim))
        window = int(self.num_heads**0.5)
        center = (window - 1) / 2
        for head in range(window * window):
            across, down = divmod(head, window)
            position[head] = torch.tensor([2 * (across - center), 2 * (down - center), -1.0])
        position.mul_(strength)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, dim) -> two (B, H, N, head_dim) views of the projection's output."""
        batch, tokens, heads = x.shape[0], x.shape[1], self.num_heads
        both = project(self.qk, x)
        weight = self._child("qk")._parameters.get("weight")
        if _is_distributed(weight) and both.shape[-1] != weight.shape[0]:
            raise RuntimeError(
                f"qk gave {both.shape[-1]} of its {weight.shape[0]} channels, all queries first and then all keys: a "
                "rank has not the two of the same heads; shard the layer by convit_kernels.parallel.ShardHeads"
            )
        # unbind's gradient is one copy; that of two indices would be two tensors of zeros, two copies and a sum
        q, k = both.reshape(batch, tokens, 2, heads, self.dim // heads).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2)

    def value(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, H, N, head_dim), a view of the projection's output."""
        return self._by_head(project(self.v, x))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, H, N, head_dim)."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.dim // self.num_heads).transpose(1, 2)

    def _child(self, name: str) -> Any:
        """The child itself: torch.export gives attributes of a layer that stands in two places classes of their own."""
        return vars(self)["_modules"][name]

    def _why_call_position(self) -> str:
        """Why the positional logits need `pos_proj` called; "" where its weight says all."""
        layer = self._child("pos_proj")
        # what a parametrization computes is new at each access, and its class is made on the spot
        computed = type(layer) is not nn.Linear and is_parametrized(layer) and type(layer).__base__ is nn.Linear
        if why := why_not_plain(layer, type(layer) if computed else nn.Linear):
            return f"pos_proj {why}"
        kind = nn.Parameter if computed else type(layer.weight)
        if kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):  # a tensor around others, as if quantized
            return f"pos_proj has a {kind.__name__} as its weight"
        return ""

    def why_dense(self) -> str:
        """Why forward builds the attention map and calls `pos_proj` and `attn_drop`; "" where it need not."""
        why = why_not_plain(self._child("attn_drop"), nn.Dropout, nn.Identity)
        return f"attn_drop {why}" if why else self._why_call_position()

    def position_weight(self) -> Tensor:
        """(H, 3) weights of (dx, dy, dx^2 + dy^2).

        Raises:
            RuntimeError: calling `pos_proj` is more than its weight: it has hooks, is pruned, or of another class.
        """
        if why := self._why_call_position():
            raise RuntimeError(f"the positional weights cannot be read: {why}, and only what it returns is right")
        return self._position_weight()

    def _position_weight(self) -> Tensor:
        layer: Any = self.pos_proj
        weight, bias = layer.weight, layer.bias
        if bias is not None and (torch.is_grad_enabled() or exporting()):  # a program may get gradients later
            # A constant cancels in the softmax. It is added times zero so that the bias gets the zero gradient it has
            # in the reference, not None, which DistributedDataParallel would report as an unused parameter.
            weight = weight + 0 * bias[:, None]
        return weight  # type: ignore[no-any-return]

    def _position_logits(self, features: Tensor) -> Tensor:
        """(B, N, N, 3) -> (B, H, N, N), by calling `pos_proj`."""
        return self.pos_proj(features).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def gate(self) -> Tensor:
        """(H,) gating parameters, before the sigmoid."""
        return self.gating_param

    def forward(self, x: Tensor, grid_size: GridSize = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim). A grid_size given here is that of this call, before the layer's own."""
        attended, _ = self._attend(x, self.grid_size if grid_size is None else grid_size)
        return self.proj_drop(project(self.proj, attended))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, grid_size: GridSize) -> tuple[Tensor, Tensor]:
        """(B, N, dim) -> what the output projection takes, (B, N, dim), and the values, (B, H, N, head_dim)."""
        (q, k), v = self.query_key(x), self.value(x)
        if why := self.why_dense():
            if self.backend not in (None, "reference"):
                raise RuntimeError(
                    f"backend {self.backend!r} cannot run: {why}, so it must be called on the way, as the reference "
                    "layer does, and no fast backend can; set the layer's backend to None"
                )
            out = self._attention_map(q, k, grid_size, x.dtype).to(v.dtype) @ v
        else:
            drop = self._child("attn_drop")
            out = gpsa_attention(
                q,
                k,
                v,
                self._position_weight(),
                self.gate(),
                grid_size=grid_size,
                scale=self.scale,
                dropout_p=drop.p if drop.training and type(drop) is nn.Dropout else 0.0,
                backend=self.backend,
            )
        return out.transpose(1, 2).flatten(2), v

    def _attention_map(self, q: Tensor, k: Tensor, grid_size: GridSize, dtype: torch.dtype) -> Tensor:
        """(B, H, N, N) in dtype: the mixed map after `attn_drop`, computed in at least float32."""
        grid = resolve_grid(grid_size, q.shape[2])
        if self._why_call_position():
            features = reference.relative_features(grid, q.new_empty(0, dtype=torch.float32)).to(dtype)
            position = self._position_logits(features.expand(q.shape[0], -1, -1, -1))
            wide = torch.promote_types(torch.promote_types(q.dtype, position.dtype), torch.float32)
            content = ((q.to(wide) @ k.to(wide).transpose(-2, -1)) * self.scale).softmax(dim=-1)
            g = torch.sigmoid(self.gate().to(wide))[:, None, None]
            attention = (1 - g) * content + g * position.to(wide).softmax(dim=-1)
        else:
            attention = reference.attention_map(q, k, self._position_weight(), self.gate(), grid, self.scale)
        return self.attn_drop(attention.to(dtype))  # type: ignore[no-any-return]

    def get_attention(self, x: Tensor) -> Tensor:
        """The mixed attention map of x, (B, H, N, N), after dropout when training: dense, for study, O(N^2) memory."""
        return self._attention_map(*self.query_key(x), self.grid_size, x.dtype)

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Any:
        """Non-locality of each head (paper, equation 8): the mean distance a query looks, (H,), in patches.

        With return_map also the attention map, averaged over the batch: a pair ((H,), (H, N, N)).
        """
        attention = self.get_attention(x).mean(0)
        dx, dy = reference.relative_coordinates(resolve_grid(self.grid_size, x.shape[1]), attention)
        distance = (attention * torch.hypot(dx, dy)).sum(dim=(1, 2)) / x.shape[1]
        return (distance, attention) if return_map else distance

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first."""
        raise RuntimeError(NO_SCRIPT)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}, backend={self.backend}"


class _SeparateQueryKey(GPSA):
    """Two projections q and k instead of one qk; the block may set `current_grid_size` before each call."""

    q: nn.Module
    k: nn.Module

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_head(project(self.q, x)), self._by_head(project(self.k, x))

    @property
    def current_grid_size(self) -> tuple[int, ...] | None:
        return self.grid_size

    @current_grid_size.setter
    def current_grid_size(self, grid_size: tuple[int, ...] | None) -> None:
        self.grid_size = grid_size


class _TupleOutput(GPSA):
    """DyTox: forward returns (x, attention, v). The map is what the fused path never builds: None stands for it."""

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        attended, v = self._attend(x, self.grid_size)
        return self.proj_drop(project(self.proj, attended)), None, v


class _RepeatedFeatures(GPSA):
    """VISSL: each feature stands locality_dim times in pos_proj, the logits are divided by it, the gate is alpha."""

    alpha: nn.Parameter
    locality_dim: int
    _gate_name = "alpha"

    def _position_weight(self) -> Tensor:
        return super()._position_weight().reshape(self.num_heads, 3, self.locality_dim).mean(dim=2)

    def _position_logits(self, features: Tensor) -> Tensor:
        return super()._position_logits(features.repeat_interleave(self.locality_dim, dim=-1)) / self.locality_dim

    def gate(self) -> Tensor:
        return self.alpha.flatten()

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Any:
        distance, attention = super().get_attention_map(x, return_map=True)
        mean = distance.mean().item()
        return (mean, attention) if return_map else mean


def is_foreign(module: nn.Module) -> bool:
    """Whether a module calls itself a gated positional self-attention, convertible or not, and is not ours already."""
    return foreign.looks_like_gpsa(module) and not isinstance(module, GPSA)


def kind_of(module: nn.Module) -> type[GPSA]:
    """Our class that does what a foreign layer does, found by running a copy of that beside ours on random tokens.

    Raises:
        TypeError: there is none; the text says in what the layer differs.
    """
    if reason := foreign.why_not(module):
        raise TypeError(reason)
    with foreign.undisturbed():
        try:
            trial = foreign.trial_copy(module)
        except Exception as error:  # attributes that cannot be copied
            raise TypeError(f"it cannot be copied for a trial ({type(error).__name__}: {error})") from error
        if hasattr(trial, "alpha"):
            kind: type[GPSA] = _RepeatedFeatures
        elif not hasattr(trial, "qk"):
            kind = _SeparateQueryKey
        else:
            kind = _TupleOutput if foreign.returns_tuple(trial) else GPSA
        if reason := foreign.why_not_position(trial) or foreign.difference(trial, adopt(trial, kind, "reference")):
            raise TypeError(reason)
    return kind


def adopt(module: nn.Module, kind: type[GPSA], backend: str | None) -> GPSA:
    """Our layer around a foreign one's children, parameters, buffers, hooks and settings.

    They are the very objects: an optimizer made before goes on working, a state_dict keeps its keys. Only hooks before
    load_state_dict that ask for the module are bound to the new one, in a dictionary of its own.
    """
    original: Any = module
    new: Any = kind.__new__(kind)
    nn.Module.__init__(new)
    new.dim, new.num_heads = original.dim, original.num_heads
    if "scale" not in module._parameters:
        new.scale = original.scale
    new.locality_strength = getattr(original, "locality_strength", 1.0)
    new.use_local_init = kind is not _TupleOutput  # DyTox's reset_parameters leaves the convolution out
    new.grid_size = getattr(original, "current_grid_size", None)
    new.backend = backend
    if kind is _RepeatedFeatures:
        new.locality_dim = original.locality_dim
    for key, parameter in module._parameters.items():
        new.register_parameter(key, parameter)
    for key, buffer in module._buffers.items():
        new.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)
    for key, child in module._modules.items():
        new.add_module(key, child)
    for key, value in vars(module).items():
        if "hook" in key:  # the dictionaries themselves, so that the handles given out keep working
            new.__dict__[key] = value
    new._load_state_dict_pre_hooks = _bound_to(new, module._load_state_dict_pre_hooks)
    new.training = module.training
    return new  # type: ignore[no-any-return]


def _bound_to(module: nn.Module, hooks: dict[int, Any]) -> dict[int, Any]:
    """Hooks before load_state_dict, those that hold a layer given another one."""
    if not any(getattr(hook, "with_module", False) for hook in hooks.values()):
        return hooks
    return OrderedDict(
        (key, type(hook)(hook.hook, module) if getattr(hook, "with_module", False) else hook)
        for key, hook in hooks.items()
    )
