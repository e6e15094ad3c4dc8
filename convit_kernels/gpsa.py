"""The GPSA layer: projections around `gpsa_attention`, with the reference layer's signature and state_dict."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import foreign, trial
from .attention import NO_SCRIPT, check_backend, gpsa_attention
from .backends import reference
from .grid import GridSize, parse_grid, resolve_grid
from .inputs import checked_mask
from .linear import project, why_not_plain
from .ops import exporting
from .variants import Variant, regular_grid, window_side

_REFERENCE = Variant()


def _grid_of_call(given: GridSize, own: GridSize, expected: tuple[int, ...] | None, axes: int, tokens: int) -> GridSize:
    """The grid of one call: what is given, else the layer's own, else the expected one if it has as many tokens."""
    if given is not None or own is not None:
        return own if given is None else given
    if expected is not None and math.prod(expected) == tokens:
        return expected
    if axes == 2:
        return None  # the square one
    if (grid := regular_grid(tokens, axes)) is None:
        raise ValueError(f"{tokens} tokens form no cube: pass grid_size=(depth, height, width) of as many")
    return grid


# torch.fx keeps them as one call: they ask for shapes and for None, which a symbolic trace does not know
torch.fx.wrap("gpsa_attention")
torch.fx.wrap("_grid_of_call")


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


def _check_whole(name: str, layer: nn.Module, out: Tensor) -> None:
    """Raises RuntimeError where a layer for queries and keys was sharded by rows, and so not by heads."""
    weight: Any = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
    if _is_distributed(weight) and out.shape[-1] != weight.shape[0]:
        raise RuntimeError(
            f"{name} gave {out.shape[-1]} of its {weight.shape[0]} channels, which are all queries and then all keys: "
            "not those of the same heads; shard the layer by convit_kernels.parallel.ShardHeads"
        )


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
            (length,) is a line and (depth, height, width) in space: `pos_proj` then has two or four inputs, and the
            number of sides stays. May be assigned at any time.
        spacing: the distance between neighbours, one number or one for each side of the grid. Positional weights,
            distances and `local_init`'s locality are in its unit.
        backend: a name from `convit_kernels.backends()`; None chooses the fastest that can run.
        device, dtype: of the parameters.

    The fast backends read `pos_proj`'s weight and `attn_drop`'s probability and call neither. Where calling them would
    be more (hooks, pruning, a LoRA adapter, another class), the layer builds the map as the reference does and calls
    them.

    Shapes:
        forward: (B, N, dim) -> (B, N, dim), N tokens of the grid in row-major order, without a class token. With
            key_mask, (B, N) or (N,), bool or floating-point, the mixed map is multiplied by it and its rows are divided
            by their sums.

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
    scale: Any  # a number, or a tensor that broadcasts to (B, H, N, 1) where another project learns it
    variant: Variant = _REFERENCE
    spacing: float | Sequence[float] = 1.0
    # the grid where neither the layer nor the call has one and the tokens are as many: from the model around the layer
    expected_grid: tuple[int, ...] | None = None
    _last_call: tuple[GridSize, int] | None = None  # the grid and the number of tokens

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
        spacing: float | Sequence[float] = 1.0,
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
        axes = 2 if self.grid_size is None else len(self.grid_size)
        if isinstance(spacing, Sequence) and len(spacing) != axes:
            raise ValueError(
                f"spacing must be one number, or one for each of the grid's {axes} sides, but is {spacing}"
            )
        self.spacing = spacing
        self.backend = backend
        if axes != 2:
            self.variant = Variant(axes=axes)

        # Children and draws in the reference's order: the same seed gives the same parameters.
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(axes + 1, num_heads, device=device, dtype=dtype)
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
            variant = variant_of(module)
        except TypeError as error:
            raise TypeError(f"{name} cannot be replaced exactly: {error}") from error
        return adopt(module, variant, backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The reference's initial values: truncated normal projections, open gates, then `local_init`.

        Raises:
            RuntimeError: a parameter is computed, not the layer's own to set. Nothing has been set then.
        """
        names = [name for name in self._modules if name in (*self.variant.projections, "proj", "pos_proj")]
        weights = {name: _settable(getattr(self, name), "weight", name) for name in names}
        gate = _settable(self, self.variant.gate, "the layer")
        for name, weight in weights.items():
            _normal_(weight, std=0.02)
            if (bias := getattr(self, name).bias) is not None:
                bias.zero_()
        gate.fill_(-1 if self.variant.inverted else 1)
        if self.use_local_init:
            self.local_init()

    @torch.no_grad()
    def local_init(self, locality_strength: float | None = None) -> None:
        """Makes head h attend to one pixel of a k x k window and pass its value on, as a convolution does (equation 5).

        As in the reference k = int(sqrt(num_heads)): only the first k * k heads are placed; the weights of all heads
        are multiplied by locality_strength (default: the layer's own). On a line k = num_heads, in space its cube root.

        Raises:
            RuntimeError: the weight for values or of `pos_proj` is computed, not its own to set. Nothing has been set
                then.
        """
        strength = self.locality_strength if locality_strength is None else locality_strength
        last = self.variant.projections[-1]
        values, position = (_settable(getattr(self, name), "weight", name) for name in (last, "pos_proj"))
        values[-self.dim :].copy_(torch.eye(self.dim))
        axes = self.variant.axes
        window = window_side(self.num_heads, axes)
        own = self.expected_grid if self.grid_size is None else parse_grid(self.grid_size)
        # where it is divided by sides that are not known yet, as in the reference, which knows no spacing
        known = self.variant.divided is None or own is not None
        steps = self.variant.steps(self.spacing, own or (1,) * axes)[::-1] if known else (1.0,) * axes
        for head in range(window**axes):
            places = [head // window**axis % window - (window - 1) / 2 for axis in reversed(range(axes))]
            weights = [2 * place * step for place, step in zip(places, steps, strict=True)]
            position[head] = self.variant.spread(torch.tensor([*weights, -1.0]))
        position.mul_(strength)

    def _project(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """(B, N, dim) -> what the children of these names give, (B, H, N, head_dim) each, views of their outputs."""
        heads, head_dim = self.num_heads, self.dim // self.num_heads
        found: list[Tensor] = []
        for name in names:
            layer = self._child(name)
            out = project(layer, x)
            if len(name) == 1:
                found.append(out.reshape(x.shape[0], x.shape[1], heads, head_dim))
            else:
                _check_whole(name, layer, out)
                # unbind's gradient is one copy; that of indices would be tensors of zeros, copies and sums
                parts = out.reshape(x.shape[0], x.shape[1], len(name), heads, head_dim).unbind(2)
                found += [parts[index] for index in range(len(name))]  # torch.fx cannot count them
        return [each.transpose(1, 2) for each in found]

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, dim) -> two (B, H, N, head_dim) views of the projections' outputs."""
        q, k, *_ = self._project(x, [name for name in self.variant.projections if name != "v"])
        return q, k

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
        """(H, axes + 1) weights of (dx, dy, dx^2 + dy^2), in the unit of the layer's spacing.

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
        return self.variant.weights(weight)

    def gate(self) -> Tensor:
        """(H,) gating parameters, before the sigmoid that gives the share of position."""
        gate: Tensor = getattr(self, self.variant.gate)
        if self.variant.shaped_gate:
            gate = gate.flatten()
        return -gate if self.variant.inverted else gate

    def forward(self, x: Tensor, grid_size: GridSize = None, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim). A grid_size given here is that of this call, before the layer's own."""
        return self._attend(x, grid_size, key_mask)[0]

    def _attend(
        self, x: Tensor, grid_size: GridSize = None, key_mask: Tensor | None = None, return_attention: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output, (B, N, dim), the map where it is asked for, (B, H, N, N), and the values, (B, H, N, head_dim)."""
        q, k, v = self._project(x, self.variant.projections)
        tokens = x.shape[1]
        grid = self._grid(grid_size, tokens)
        if type(tokens) is int and not torch.compiler.is_compiling():
            object.__setattr__(self, "_last_call", (grid, tokens))  # nn.Module's own takes ten times as long
        drop = self._child("attn_drop")
        dropout_p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
        attention = None
        if (why := self.why_dense()) and self.backend not in (None, "reference"):
            raise RuntimeError(
                f"backend {self.backend!r} cannot run: {why}, so it must be called on the way, as the reference "
                "layer does, and no fast backend can; set the layer's backend to None"
            )
        if why or return_attention or (self.variant.masks_last and dropout_p > 0):
            attention = self._attention_map(q, k, grid, x.dtype, key_mask)
            out = attention.to(v.dtype) @ v
        else:
            out = gpsa_attention(
                q,
                k,
                v,
                self._position_weight(),
                self.gate(),
                grid_size=grid,
                spacing=self.spacing if self.variant.divided is None else self._steps(grid, tokens),
                key_mask=key_mask,
                scale=self.scale,
                dropout_p=dropout_p,
                backend=self.backend,
            )
        out = self.proj_drop(project(self._child("proj"), out.transpose(1, 2).flatten(2)))
        return out, attention, v

    def _grid(self, given: GridSize, tokens: int) -> GridSize:
        return _grid_of_call(given, self.grid_size, self.expected_grid, self.variant.axes, tokens)

    def _steps(self, grid: GridSize, tokens: int) -> tuple[float, ...]:
        """The spacing along each side of the grid of a call."""
        return self.variant.steps(self.spacing, resolve_grid(grid, tokens))

    def _attention_map(
        self, q: Tensor, k: Tensor, grid_size: GridSize, dtype: torch.dtype, key_mask: Tensor | None = None
    ) -> Tensor:
        """(B, H, N, N) in dtype: the mixed map after `attn_drop`, computed in at least float32."""
        grid = resolve_grid(grid_size, q.shape[2])
        steps = self.variant.steps(self.spacing, grid)
        if self._why_call_position():
            features = reference.relative_features(grid, q.new_empty(0, dtype=torch.float32), steps)
            given = self.variant.given(features).to(dtype).expand(q.shape[0], -1, -1, -1)
            position = self.pos_proj(given).permute(0, 3, 1, 2) / self.variant.divisor
            wide = torch.promote_types(torch.promote_types(q.dtype, position.dtype), torch.float32)
            content = ((q.to(wide) @ k.to(wide).transpose(-2, -1)) * self.scale).softmax(dim=-1)
            g = torch.sigmoid(self.gate().to(wide))[:, None, None]
            attention = (1 - g) * content + g * position.to(wide).softmax(dim=-1)
        else:
            attention = reference.attention_map(q, k, self._position_weight(), self.gate(), grid, self.scale, steps)
        if key_mask is None:
            return self.attn_drop(attention.to(dtype))  # type: ignore[no-any-return]
        mask = checked_mask(key_mask, q)
        if self.variant.masks_last:
            return reference.masked(self.attn_drop(attention.to(dtype)), mask).to(dtype)
        return self.attn_drop(reference.masked(attention, mask).to(dtype))  # type: ignore[no-any-return]

    def get_attention(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """The mixed attention map of x, (B, H, N, N), after dropout when training: dense, for study, O(N^2) memory."""
        return self._attention_map(*self.query_key(x), self._grid(None, x.shape[1]), x.dtype, key_mask)

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Any:
        """Non-locality of each head (paper, equation 8): the mean distance a query looks, (H,), in patches.

        With return_map also the attention map, averaged over the batch: a pair ((H,), (H, N, N)).
        """
        attention = self.get_attention(x).mean(0)
        squared = self._features(x.shape[1], attention)[..., -1]
        by_head = (attention * squared.sqrt()).sum(dim=(1, 2)) / x.shape[1]
        distance = by_head.mean().item() if self.variant.mean_distance else by_head
        return (distance, attention) if return_map else distance

    def _features(self, tokens: int, like: Tensor, grid_size: GridSize = None) -> Tensor:
        """(N, N, axes + 1) in like's dtype, the offsets and squared distances, in the unit of the spacing."""
        grid = resolve_grid(self._grid(grid_size, tokens), tokens)
        wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        return reference.relative_features(grid, wide, self.variant.steps(self.spacing, grid)).to(like.dtype)

    def get_rel_indices(self, num_patches: int | None = None) -> Tensor:
        """The positional features of so many tokens (default: of the last call), (1, N, N, 3), as the reference's."""
        own = (1,) if self.grid_size is None else parse_grid(self.grid_size)
        grid, tokens = self._last_call or (None, math.prod(own))
        if num_patches not in (None, tokens):
            grid, tokens = None, num_patches
        return self.variant.given(self._features(tokens, self.gate().detach(), grid))[None]

    @property
    def rel_indices(self) -> Tensor:
        """The positional features of the last call, (1, N, N, 3), made when they are read: nothing here needs them."""
        kept = self._buffers.get("rel_indices")
        if kept is not None and (self._last_call is None or self._last_call[1] == kept.shape[1]):
            return kept
        return self.get_rel_indices()

    @property
    def current_grid_size(self) -> GridSize:
        """`grid_size`, by the name under which the blocks of other projects set it before each call."""
        return self.grid_size

    @current_grid_size.setter
    def current_grid_size(self, grid_size: tuple[int, ...] | None) -> None:
        self.grid_size = grid_size

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first."""
        raise RuntimeError(NO_SCRIPT)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}, backend={self.backend}"


class AdoptedGPSA(GPSA):
    """A layer of another project whose forward takes or gives more than tokens, as its `variant` says.

    An output that is the attention map is None, since the fast backends never build it. `return_attention = True`, or
    the layer's own way to ask for it, builds the map as the reference does, at its cost, and gives it exactly.
    """

    return_attention = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the other project's layer is called; grid_size and key_mask by keyword, as in `GPSA`."""
        variant = self.variant
        given: dict[Any, Any] = dict(zip(variant.arguments[: len(args)], args, strict=True), **kwargs)
        if variant.mask in given:
            given["key_mask"] = given.pop(variant.mask)
        requested = given.pop(variant.request, False) or getattr(self, variant.request_attribute)
        if (mask := given.get("key_mask")) is not None and mask.dim() > 2:
            given["key_mask"] = mask.flatten(1)  # (B, 1, 1, N) or (B, 1, height, width)
        grid = x.shape[2:]
        if variant.images:
            x = x.flatten(2).transpose(1, 2)
            given.setdefault("grid_size", tuple(grid))
        outputs = (variant.requested if requested else variant.outputs) or ("x",)
        out, attention, v = self._attend(x, return_attention=requested and "attention" in outputs, **given)
        if variant.images:
            out = out.transpose(1, 2).unflatten(2, grid)
        if outputs == ("x",):
            return out
        return tuple({"x": out, "attention": attention if requested else None, "v": v}[name] for name in outputs)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module calls itself a gated positional self-attention, convertible or not, and is not ours already."""
    return foreign.looks_like_gpsa(module) and not isinstance(module, GPSA)


def variant_of(module: nn.Module) -> Variant:
    """What a foreign layer does, found by running a copy of it beside ours on random tokens.

    Raises:
        TypeError: ours does not do it; the text says in what the layer differs.
    """
    if reason := foreign.why_not(module):
        raise TypeError(reason)
    return trial.find(module, lambda copied, variant: adopt(copied, variant, "reference"))


def adopt(module: nn.Module, variant: Variant, backend: str | None) -> GPSA:
    """Our layer around a foreign one's children, parameters, buffers of the state_dict, hooks and settings.

    They are the very objects: an optimizer made before goes on working, a state_dict keeps its keys. Only hooks before
    load_state_dict that ask for the module are bound to the new one, in a dictionary of its own.
    """
    original: Any = module
    cls = AdoptedGPSA if variant.is_called_otherwise else GPSA
    new: Any = cls.__new__(cls)
    nn.Module.__init__(new)
    new.dim, new.num_heads, new.variant = original.dim, original.num_heads, variant
    if "scale" not in module._parameters:
        new.scale = original.scale
    new.locality_strength = getattr(original, "locality_strength", 1.0)
    # DyTox's reset_parameters leaves the convolution out
    new.use_local_init = not hasattr(module, "reset_parameters")
    new.grid_size = getattr(original, "current_grid_size", None)
    new.expected_grid = variant.grid
    new.spacing = variant.spacing
    new.backend = backend
    if hasattr(module, variant.request_attribute):
        setattr(new, variant.request_attribute, getattr(module, variant.request_attribute))
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)  # not registered: rel_indices is a property, too
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    if "rel_indices" in module._non_persistent_buffers_set:  # kept for the next call; ours makes it when it is read
        kept = new._buffers.pop("rel_indices")
        new._non_persistent_buffers_set.discard("rel_indices")
        if kept is not None and kept.dim() == 4:
            new._last_call = None, kept.shape[1]
    new._modules.update(module._modules)
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
