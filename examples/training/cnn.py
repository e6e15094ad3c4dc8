"""A plain CNN, as wide and as deep as a ConViT on the same patches: locality and equivariance by construction."""

from torch import nn


class CNN(nn.Sequential):
    """Patches as a ConViT embeds them, then convolutions of 3 x 3 patches with batch norm and ReLU, then the mean.

    (B, in_chans, H, W) -> (B, num_classes).

    Args:
        patch_size: side of a patch in pixels.
        embed_dim: channels of a patch.
        depth: convolutions, beside that of the patches.
    """

    def __init__(self, *, in_chans: int, num_classes: int, patch_size: int, embed_dim: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)]
        for _ in range(depth):
            layers += [nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False), nn.BatchNorm2d(embed_dim), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(embed_dim, num_classes))
