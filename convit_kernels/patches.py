"""From images to patches on a grid: timm's patch embedding for images of any size and for convolutions of any kind."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import Tensor, nn

from .resample import resample_position

Grid = tuple[int, int]

# torch.fx keeps them as one call each: they read shapes, which a symbolic trace does not have
torch.fx.wrap("_checked_images")
torch.fx.wrap("_checked_patches")


class ConvStem(nn.Sequential):
    """Image to patches by 3 x 3 convolutions of stride 2 that double the channels, then 1 x 1.

    Xiao et al., 2021, "Early Convolutions Help Transformers See Better" (arXiv 2106.14881). Their models drop one
    block of the transformer in exchange.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        steps = patch_size.bit_length() - 1
        widths = [in_chans, *(embed_dim // 2 ** (steps - 1 - step) for step in range(steps))]
        layers = [ConvNormAct(*pair, kernel_size=3, stride=2) for pair in pairwise(widths)]
        super().__init__(*layers, nn.Conv2d(embed_dim, embed_dim, kernel_size=1))


def check_divides(height: int, width: int, patch: Grid) -> None:
    """Raises ValueError where an image does not divide into patches, whose border would be lost."""
    if height < patch[0] or width < patch[1] or height % patch[0] or width % patch[1]:
        side = "{} and {}".format(*patch) if patch[0] != patch[1] else str(patch[0])
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {patch[0]} x {patch[1]}: "
            f"height and width must be multiples of {side}"
        )


def _checked_images(images: Tensor, channels: int | None, patch: Grid | None) -> Tensor:
    """The images; None for whatever is not to be checked."""
    if images.dim() != 4 or (channels is not None and images.shape[1] != channels):
        raise ValueError(
            f"images must have shape (batch, {channels or 'channels'}, height, width), but have {tuple(images.shape)}"
        )
    if patch is not None:
        check_divides(images.shape[2], images.shape[3], patch)
    return images


def _checked_patches(x: Tensor, made_for: Grid) -> Tensor:
    """The patches, (B, C, rows, columns), on the grid for which a block alone takes so many."""
    rows, columns = x.shape[2:]
    if (rows, columns) != (made_for if made_for[0] != made_for[1] else (rows, rows)):
        takes = "square" if made_for[0] == made_for[1] else f"of {made_for[0]} x {made_for[1]}"
        raise ValueError(
            f"patches in {rows} rows and {columns} columns, but a block alone takes its grid to be {takes}: call "
            "x, grid = model.embed(images), and then block(x, grid)"
        )
    return x


class PatchEmbed(TimmPatchEmbed):
    """timm's; `proj` may be replaced by any convolution, and the grid is that of the convolution that is there.

    Who calls patches and blocks by hand gets no patches on another grid than the blocks take them for: only on the grid
    that the blocks were made for, or any square one where that is square. The model asks for any_grid.

    Shapes:
        forward: (B, in_chans, H, W) -> (B, N, embed_dim), the patches in row-major order.

    Raises:
        ValueError: in forward, images of another shape, or that do not divide into the model's own patches; or patches
            on another grid.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.made_for: Grid = self.grid_size

    def _window(self) -> tuple[Grid, Grid, Grid] | None:
        """Pixels that a patch sees, that patches lie apart, and that both borders add; None without a convolution."""
        proj: Any = self.proj
        if not isinstance(proj, nn.Conv2d):
            return None
        seen = [step * (side - 1) + 1 for step, side in zip(proj.dilation, proj.kernel_size, strict=True)]
        if proj.padding == "same":
            added = [side - 1 for side in seen]
        else:
            added = [0, 0] if proj.padding == "valid" else [2 * int(side) for side in proj.padding]
        return (seen[0], seen[1]), (proj.stride[0], proj.stride[1]), (added[0], added[1])

    def _own(self) -> bool:
        """Whether `proj` is as the model made it, or like it: patches side by side, of patch_size."""
        return isinstance(self.proj, ConvStem) or self._window() == (self.patch_size, self.patch_size, (0, 0))

    def dynamic_feat_size(self, img_size: Sequence[int]) -> Grid:
        """Rows and columns of patches of an image of (height, width) pixels.

        Where `proj` has been replaced by something else than a convolution, those of patches of patch_size.
        """
        window = self._window()
        if window is None:
            return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]
        seen, apart, added = window
        return (
            (img_size[0] + added[0] - seen[0]) // apart[0] + 1,
            (img_size[1] + added[1] - seen[1]) // apart[1] + 1,
        )

    def forward(self, x: Tensor, any_grid: bool = False) -> Tensor:
        channels = self.proj.in_channels or None if isinstance(self.proj, nn.Conv2d) else None  # 0: lazy, not known yet
        patch = self.patch_size if self._own() else None
        x = self.proj(_checked_images(x, channels, patch))
        if not any_grid:
            x = _checked_patches(x, self.made_for)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)  # type: ignore[no-any-return]


def tokens_on_grid(x: Tensor, image_shape: Sequence[int], claimed: Grid | None) -> tuple[Tensor, Grid]:
    """(B, N, C), N patches in row-major order, and their grid, of what an embedding made of images.

    Args:
        x: (B, C, rows, columns) or (B, N, C).
        image_shape: shape of the images, (B, channels, height, width).
        claimed: the grid by the embedding's own account.

    Raises:
        ValueError: nothing says on which grid the N patches are: neither the account, nor a square image.
    """
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
    tokens = x.shape[1]
    if claimed is not None and claimed[0] * claimed[1] == tokens:
        return x, claimed
    side = math.trunc(tokens**0.5)  # math.isqrt would fix a number that is symbolic
    if side * side == tokens and (len(image_shape) != 4 or image_shape[2] == image_shape[3]):
        return x, (side, side)
    raise ValueError(
        f"patch_embed made {tokens} tokens of images of shape {tuple(image_shape)}, and nothing says in how many rows "
        "and columns: let it return (batch, channels, rows, columns), as timm's does with flatten = False, or give it "
        "a method dynamic_feat_size((height, width)) that returns (rows, columns)"
    )


def position_on_grid(pos_embed: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """The positional embedding, (1, N, C), interpolated from the grid that it was made for to another.

    One with another number of positions than that grid has stands for the grid itself, or else for a square.

    Raises:
        ValueError: its number of positions is neither.
    """
    positions = pos_embed.shape[1]
    if positions != made_for[0] * made_for[1]:
        made_for = grid if positions == grid[0] * grid[1] else (math.isqrt(positions),) * 2
    if positions != made_for[0] * made_for[1]:
        raise ValueError(
            f"pos_embed has {positions} positions, neither a square nor the {grid[0]} x {grid[1]} patches of the images"
        )
    return resample_position(pos_embed, made_for, grid)
