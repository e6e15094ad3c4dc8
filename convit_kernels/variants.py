"""`Variant`: what a GPSA layer does otherwise than the reference's. `GPSA` reads it; `trial` finds it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# what a layer's children may be called that give queries, keys and values: a letter for each of them
PROJECTIONS = (("qk", "v"), ("q", "k", "v"), ("qkv",), ("q", "kv"))


@dataclass(frozen=True)
class Variant:
    """A layer's parts and how it is called; by default the reference's.

    axes: of the grid, 1 to 3.
    projections: the children that give queries, keys and values, one of PROJECTIONS.
    gate: the name of the gating parameter. shaped_gate: it has more dimensions than that of the heads.
    inverted: the share of position is 1 - sigmoid(gate).
    features: what `pos_proj` is given, as runs (index, factor, count): so many times in turn factor times that one of
        (dx, dy, dx^2 + dy^2) and its like on other grids. None: each once, as it is.
    divisor: of the positional logits.
    divided: what the layer's spacing is divided by: "ends", each side less one, for coordinates from end to end of a
        fixed interval; "sides", each side; None: by nothing.
    grid, spacing: what the layer starts with: the grid of so many tokens, the distance between neighbours.
    mean_distance: `get_attention_map` gives the mean over heads as a number.
    images: takes and gives (B, dim, height, width), not tokens.
    arguments: of forward after the first, in their order.
    mask: the one of them that is a key mask. request: the one that asks for the other outputs.
    request_attribute: of the layer: the same for every call.
    outputs, requested: what forward gives without and with a request, of "x", "attention" and "v"; None: x, no tuple.
    masks_last: the key mask comes after the dropout, and so rows sum to 1 under dropout, too.
    """

    axes: int = 2
    projections: tuple[str, ...] = ("qk", "v")
    gate: str = "gating_param"
    shaped_gate: bool = False
    inverted: bool = False
    features: tuple[tuple[int, float, int], ...] | None = None
    divisor: float = 1.0
    divided: Literal["ends", "sides"] | None = None
    grid: tuple[int, ...] | None = None
    spacing: float | tuple[float, ...] = 1.0
    mean_distance: bool = False
    images: bool = False
    arguments: tuple[str, ...] = ()
    mask: str | None = None
    request: str | None = None
    request_attribute: str = "return_attention"
    outputs: tuple[str, ...] | None = None
    requested: tuple[str, ...] | None = None
    masks_last: bool = False

    @property
    def has_the_reference_s_parameters(self) -> bool:
        """Whether they have its names, and its shapes but for the number of positional features."""
        return self.projections == ("qk", "v") and self.gate == "gating_param" and not self.shaped_gate

    @property
    def is_called_otherwise(self) -> bool:
        """Whether forward takes or gives something else than tokens."""
        return bool(self.images or self.arguments or self.outputs or self.requested)

    def steps(self, spacing: float | Sequence[float], grid: Sequence[int]) -> tuple[float, ...]:
        """The distance between neighbours along each side of a grid."""
        given = tuple(spacing) if isinstance(spacing, Sequence) else (spacing,) * len(grid)
        if self.divided is None:
            return given
        less = self.divided == "ends"
        return tuple(step / max(1, side - less) for step, side in zip(given, grid, strict=True))

    def weights(self, weight: Tensor) -> Tensor:
        """(H, features) of `pos_proj` -> (H, axes + 1), those of the offsets and the squared distance."""
        if self.features is None:
            return weight
        columns: dict[int, Tensor] = {}
        parts = weight.split([count for _, _, count in self.features], dim=1)
        for (index, factor, _), part in zip(self.features, parts, strict=True):
            column = part.sum(dim=1) * (factor / self.divisor)
            columns[index] = columns[index] + column if index in columns else column
        return torch.stack([columns[index] for index in range(self.axes + 1)], dim=1)

    def spread(self, weights: Tensor) -> Tensor:
        """(..., axes + 1) -> (..., features): a weight of `pos_proj` whose `weights` are these."""
        if self.features is None:
            return weights
        counts = [0] * (self.axes + 1)
        for index, _, count in self.features:
            counts[index] += count
        return torch.cat(
            [
                weights[..., index, None].expand(*weights.shape[:-1], count) * (self.divisor / factor / counts[index])
                for index, factor, count in self.features
            ],
            dim=-1,
        )

    def given(self, features: Tensor) -> Tensor:
        """(..., axes + 1), the offsets and the squared distance -> (..., features), what `pos_proj` is given."""
        if self.features is None:
            return features
        return torch.cat(
            [features[..., index, None].expand(*features.shape[:-1], n) * f for index, f, n in self.features], dim=-1
        )


def window_side(heads: int, axes: int) -> int:
    """The largest k with k ** axes <= heads."""
    side: int = round(heads ** (1 / axes))
    return side if side**axes <= heads else side - 1


def regular_grid(tokens: int, axes: int) -> tuple[int, ...] | None:
    """The square, the cube or the line of so many tokens; None where there is none."""
    side = tokens if axes == 1 else math.isqrt(tokens) if axes == 2 else round(tokens ** (1 / 3))
    return (side,) * axes if side**axes == tokens else None
