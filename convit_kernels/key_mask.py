"""A key mask for backends that know none: exact, and without a map.

The mixed map A times the mask m, its rows divided by their sums, gives sum_j A_ij m_j v_j / sum_j A_ij m_j. Numerator
and denominator are both A applied to values: to the masked ones, and to the mask itself as one more channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs


def folded(inputs: Inputs) -> Inputs:
    """Inputs with one more channel, (B, H, N, D + 1), and no key mask; their attention is for `divided`."""
    assert inputs.key_mask is not None
    q, k, v = inputs[:3]
    mask = inputs.key_mask.to(v.dtype)[:, None, :, None]  # (B or 1, 1, N, 1)
    values = torch.cat((v * mask, mask.expand(*v.shape[:3], 1)), dim=-1)
    return inputs._replace(q=F.pad(q, (0, 1)), k=F.pad(k, (0, 1)), v=values, key_mask=None)


def divided(out: Tensor) -> Tensor:
    """(B, H, N, D + 1) -> (B, H, N, D): the last channel is what the others are divided by."""
    return out[..., :-1] / out[..., -1:]
