"""Forwards for the layers of other projects, without a state of their own."""

from typing import Any

from torch import Tensor, nn

from .attention import gpsa_attention


class GPSA(nn.Module):
    """The forward of timm's GPSA, over its own parameters and children.

    Shapes:
        forward: (B, N, C) -> (B, N, C), N patches of a square grid, without a class token.
    """

    has_backward: bool = True
    can_torch_compile: bool = True

    num_heads: int
    scale: float
    qk: nn.Module
    v: nn.Module
    attn_drop: Any
    pos_proj: Any
    gating_param: nn.Parameter
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = gpsa_attention(
            q,
            k,
            v,
            self.pos_proj.weight,
            self.gating_param,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
