"""How local attention is: non-locality (d'Ascoli et al., 2021, equation 8), gates, and where one query looks.

Works on the models of `convit_kernels.models`, on timm's and the official ConViT, on models after `replace_gpsa`, and
on plain attention with a `qkv` projection (timm's ViT and DeiT, ConViT's MHSA). Hooks take the layers' inputs in an
ordinary forward pass, in evaluation mode and without gradients; the model is left as it was.

GPSA sees patches only. Plain attention may also have a class token, or several tokens before the patches: they are left
out as queries and as keys, and what a patch pays to the other patches is taken as a whole, as if the softmax had run
over the patches alone. So distances compare between layers with and without a class token.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .gpsa import GPSA, is_foreign
from .grid import GridSize, parse_plane, resolve_grid
from .linear import why_not_plain
from .relpos import relative_position_tables

# entries of attention maps in memory at a time: 16 MB in float32
_ENTRIES = 1 << 22
_PLAIN_NAMES = ("MHSA", "Attention")
_PLAIN_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


@dataclass(frozen=True)
class LayerLocality:
    """One attention layer: mean distances between a query and what it attends to, in patches, (heads,) float64 each."""

    name: str  # of the layer in the model
    nonlocality: Tensor  # of the attention as it is, equation 8
    content: Tensor  # of its content part alone
    position: Tensor | None  # of its positional part alone; None in plain attention
    gate: Tensor | None  # sigmoid of the gating parameters, the share of position; None in plain attention


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers that can be studied, by name, in the model's order: `GPSA`, or plain attention as it is.

    A GPSA layer of another project is given as our layer with the same parameters.

    Raises:
        TypeError: a GPSA layer whose mathematics differs; the text says in what.
        ValueError: the model has no such layers.
    """
    layers = {
        name: GPSA.from_module(module) if is_foreign(module) else module
        for name, module in model.named_modules()
        if isinstance(module, GPSA) or is_foreign(module) or _is_plain(module)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has neither a GPSA layer nor plain attention with a qkv projection "
            f"(a class named {' or '.join(_PLAIN_NAMES)})"
        )
    return layers


def gates(model: nn.Module) -> dict[str, Tensor]:
    """The share of position in each head, sigmoid(gating_param), (heads,) float64, by GPSA layer; no images needed."""
    return {name: _gate(layer) for name, layer in attention_layers(model).items() if isinstance(layer, GPSA)}


def nonlocality(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, grid_size: GridSize = None
) -> list[LayerLocality]:
    """Non-locality of every head: D = 1/N sum_ij A_ij |x_i - x_j|, the mean over images (equation 8).

    No attention map is kept: the positional part follows from the relative-position tables alone, the content part
    from blocks of rows of at most 4 million entries.

    Args:
        model: with attention layers that `attention_layers` knows; its parameters' device and dtype fit the images'.
        images: one batch, (B, C, H, W), or batches, for instance of a DataLoader without labels.
        grid_size: (rows, columns) of patches. None: a layer's own, or the image's over the model's
            `patch_embed.patch_size`, or else square.

    Returns:
        One entry for each attention layer, in the model's order. A layer's value in the paper's figures is the mean
        over its heads.

    Raises:
        TypeError: a GPSA layer whose mathematics differs, a layer whose map does not follow from its weights alone
            (hooks on its dropout, a pruned or wrapped positional projection), or a grid_size that is no pair.
        ValueError: no attention layers, no images, or tokens that do not fill the grid.
    """
    found: dict[str, _Sum] = {}

    def visit(name: str, layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
        entry = found.setdefault(name, _Sum())
        q, k = _query_key(layer, x, grid)
        content = _content_distance(q, k, _scale(layer), grid)
        entry.images += x.shape[0]
        entry.content += content * x.shape[0]
        if isinstance(layer, GPSA):
            gate, position = _gate(layer), _position_distance(layer.position_weight(), grid)
            entry.gate = gate
            entry.position += position * x.shape[0]
            content = (1 - gate) * content + gate * position
        entry.mixed += content * x.shape[0]

    layers = attention_layers(model)
    for batch in [images] if isinstance(images, Tensor) else images:
        _visit(model, layers, batch, grid_size, visit)
    if not any(entry.images for entry in found.values()):
        raise ValueError("images must have at least one image")
    return [entry.result(name) for name, entry in found.items()]


def attention_maps(
    model: nn.Module, images: Tensor, query: tuple[int, int], *, grid_size: GridSize = None
) -> dict[str, Tensor]:
    """Where one patch looks: its row of every attention map, laid out over the image.

    Args:
        model, grid_size: as for `nonlocality`.
        images: (B, C, H, W).
        query: (row, column) of the patch, from 0.

    Returns:
        (B, heads, rows, columns) for each attention layer, by name; each map sums to 1.

    Raises:
        TypeError, ValueError: as `nonlocality`, and where the query is outside the grid.
    """
    maps: dict[str, Tensor] = {}

    def visit(name: str, layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
        (row, column), (rows, columns) = query, grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"query must be (row, column) within the grid of {rows} x {columns}, but is {query}")
        q, k = _query_key(layer, x, grid)
        scores = q[:, :, row * columns + column, None] @ k.transpose(-2, -1) * _scale(layer)
        attention = scores.softmax(dim=-1).unflatten(-1, grid).squeeze(2)
        if isinstance(layer, GPSA):
            row_table, column_table = relative_position_tables(layer.position_weight(), grid)
            position = row_table[:, row, :, None] * column_table[:, column, None, :]
            gate = _gate(layer)[:, None, None].to(attention.dtype)
            attention = (1 - gate) * attention + gate * position
        maps[name] = attention

    _visit(model, attention_layers(model), images, grid_size, visit)
    return maps


class _Sum:
    """Distances of one layer, summed over images."""

    def __init__(self) -> None:
        self.images = 0
        self.mixed: Tensor | float = 0.0
        self.content: Tensor | float = 0.0
        self.position: Tensor | float = 0.0
        self.gate: Tensor | None = None

    def result(self, name: str) -> LayerLocality:
        mixed, content, position = (
            torch.as_tensor(total / self.images) for total in (self.mixed, self.content, self.position)
        )
        return LayerLocality(name, mixed, content, None if self.gate is None else position, self.gate)


def _is_plain(module: nn.Module) -> bool:
    """Softmax attention of one qkv projection and nothing that would change its map, as a bias or a rotation does."""
    return (
        type(module).__name__ in _PLAIN_NAMES
        and {"qkv", "proj"} <= {name for name, _ in module.named_children()} <= _PLAIN_PARTS
        and not module._parameters
        and not module._buffers
        and hasattr(module, "num_heads")
        and hasattr(module, "scale")
    )


def _why_unreadable(layer: nn.Module) -> str:
    """Why a layer's map does not follow from its weights alone; "" when it does."""
    if isinstance(layer, GPSA):
        if layer.variant.axes != 2 or layer.variant.divided or layer.spacing != 1 or layer.variant.images:
            return "is not on the tokens of a plane with neighbours one apart"
        return layer.why_dense()
    drop = layer._modules.get("attn_drop")
    why = "" if drop is None else why_not_plain(drop, nn.Dropout, nn.Identity)
    return why and f"attn_drop {why}"


@torch.no_grad()
def _visit(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    grid_size: GridSize,
    visit: Callable[[str, nn.Module, Tensor, tuple[int, int]], None],
) -> None:
    """Runs the model and hands every attention layer's input to `visit`, with its name and the grid."""
    image_grid = _image_grid(model, images) if grid_size is None else parse_plane(grid_size)

    def hook(name: str, layer: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if why := _why_unreadable(layer):  # asked here, where sharded parameters are whole
            raise TypeError(f"{name}: {why}, which may change the map; here weights give the map: undo that first")
        x = args[0] if args else kwargs["x"]
        own = None if grid_size is not None else kwargs.get("grid_size") or getattr(layer, "grid_size", None)
        try:
            others = 0 if isinstance(layer, GPSA) else getattr(model, "num_prefix_tokens", 1)
            visit(name, layer, x, _token_grid(own or image_grid, x.shape[1], others))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    modules = dict(model.named_modules())
    modes = {module: module.training for module in modules.values()}
    handles = [
        modules[name].register_forward_pre_hook(partial(hook, name, layer), with_kwargs=True)
        for name, layer in layers.items()
    ]
    model.eval()
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _image_grid(model: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """Patches in a column and a row of the images, as far as the model says how large a patch is."""
    embed: Any = getattr(model, "patch_embed", None)
    if images.dim() == 4 and hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size(images.shape[2:])
        return rows, columns
    patch = getattr(embed, "patch_size", None)
    if patch is None or images.dim() != 4:
        return None
    height, width = parse_plane(patch)
    return images.shape[2] // height, images.shape[3] // width


def _token_grid(grid: tuple[int, int] | None, tokens: int, others: int) -> tuple[int, int]:
    """The grid of a layer's last tokens; before them there may be so many others, the class token for example."""
    if grid is None:
        has_others = math.isqrt(tokens) ** 2 != tokens
        return parse_plane(resolve_grid(None, tokens - others * has_others))
    if not 0 <= tokens - math.prod(grid) <= others:
        resolve_grid(grid, tokens)  # raises: they are not these tokens
    return grid


def _query_key(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(B, heads, N, head_dim) queries and keys of the patches, at least float32."""
    attributes: Any = layer
    if isinstance(layer, GPSA):
        q, k = layer.query_key(x)
    else:
        qkv = attributes.qkv(x).unflatten(-1, (3, attributes.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = qkv[0], qkv[1]
        if hasattr(layer, "q_norm"):
            q, k = attributes.q_norm(q), attributes.k_norm(k)
    dtype = torch.promote_types(q.dtype, torch.float32)
    patches = math.prod(grid)
    return q[:, :, -patches:].to(dtype), k[:, :, -patches:].to(dtype)


def _scale(layer: Any) -> float | Tensor:
    return layer.scale.detach() if isinstance(layer.scale, Tensor) else float(layer.scale)


def _gate(layer: GPSA) -> Tensor:
    return torch.sigmoid(layer.gate().detach().double())


def _content_distance(q: Tensor, k: Tensor, scale: float | Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance under softmax(scale * q k^T), (heads,) float64: over queries and images, block by block."""
    batch, heads, tokens, _ = q.shape
    token = torch.arange(tokens, device=q.device)
    y, x = (token // grid[1]).to(q.dtype), (token % grid[1]).to(q.dtype)
    images = max(1, _ENTRIES // (heads * tokens * tokens))
    rows = max(1, _ENTRIES // (heads * tokens))
    total = torch.zeros(heads, dtype=torch.float64, device=q.device)
    for queries, keys in zip(q.split(images), k.split(images), strict=True):
        for block, block_y, block_x in zip(queries.split(rows, dim=2), y.split(rows), x.split(rows), strict=True):
            distance = torch.hypot(y - block_y[:, None], x - block_x[:, None])
            attention = (block @ keys.transpose(-2, -1) * scale).softmax(dim=-1)
            total += (attention * distance).sum(dim=(0, 2, 3), dtype=torch.float64)
    return total / max(1, batch * tokens)


def _position_distance(pos_weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance under the positional attention, (heads,) float64, from the sums of its factors' diagonals.

    The distance depends on the offsets (dy, dx) alone, so the sum over all queries factorises as the attention does.
    """

    def by_offset(table: Tensor) -> tuple[Tensor, Tensor]:
        side = table.shape[-1]
        index = torch.arange(side, device=table.device)
        offset = index - index[:, None] + side - 1
        sums = table.new_zeros(table.shape[0], 2 * side - 1).index_add_(1, offset.flatten(), table.flatten(1))
        return sums, torch.arange(1 - side, side, device=table.device, dtype=table.dtype)

    row_table, column_table = relative_position_tables(pos_weight.detach().double(), grid)
    (rows, dy), (columns, dx) = by_offset(row_table), by_offset(column_table)
    distance = torch.hypot(dy[:, None], dx)
    return torch.einsum("hy,hx,yx->h", rows, columns, distance) / math.prod(grid)
