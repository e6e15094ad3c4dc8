"""The attention alone, forward: the reference layer's part, PyTorch's fused attention of the content, and our backends.

pytest benchmarks --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F
from timm.models.convit import GPSA

import convit_kernels as ck

SHAPES = [(8, 4, 14, 48), (8, 9, 14, 48), (4, 16, 14, 48)]  # batch, heads, side of the grid, head_dim
CONTENDERS = ["timm eager", "SDPA, content only", *(b.name for b in ck.backends() if b.available)]


def contender(name: str, batch: int, heads: int, side: int, head_dim: int):
    tokens = side * side
    layer = GPSA(heads * head_dim, heads)
    layer.local_init()
    layer.rel_indices = layer.get_rel_indices(tokens)
    x = torch.randn(batch, tokens, heads * head_dim)
    q, k = layer.qk(x).reshape(batch, tokens, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    v = layer.v(x).reshape(batch, tokens, heads, head_dim).transpose(1, 2)

    def eager():
        position = layer.pos_proj(layer.rel_indices.expand(batch, -1, -1, -1)).permute(0, 3, 1, 2).softmax(dim=-1)
        content = ((q @ k.transpose(-2, -1)) * layer.scale).softmax(dim=-1)
        g = torch.sigmoid(layer.gating_param).view(1, -1, 1, 1)
        mixed = (1.0 - g) * content + g * position
        mixed /= mixed.sum(dim=-1).unsqueeze(-1)
        return mixed @ v

    if name == "timm eager":
        return eager
    if name == "SDPA, content only":
        return lambda: F.scaled_dot_product_attention(q, k, v, scale=layer.scale)

    def ours():
        return ck.gpsa_attention(q, k, v, layer.pos_proj.weight, layer.gating_param, scale=layer.scale, backend=name)

    torch.testing.assert_close(ours(), eager(), rtol=1e-4, atol=1e-5)  # no time for a wrong result
    return ours


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward(benchmark, shape, name):
    benchmark.group = "attention forward, float32, (batch, heads, side, head_dim) = " + str(shape)
    with torch.inference_mode():
        benchmark.pedantic(contender(name, *shape), rounds=20, warmup_rounds=3)
