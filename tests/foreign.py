"""GPSA layers as other projects have them, written anew from their descriptions: what replace_gpsa has to recognise.

One class with the reference's mathematics; the variants change what those projects changed.
"""

import timm
import torch
from torch import Tensor, nn


def named(name: str):
    """Gives a class the name it has in its own project: recognition sees no more of the project than that."""

    def rename(cls: type) -> type:
        cls.__name__ = name
        return cls

    return rename


@named("GPSA")
class OfficialGPSA(nn.Module):
    """facebookresearch/convit: the constructor initialises, `rel_indices` is a plain attribute of a square grid."""

    def __init__(
        self,
        dim,
        num_heads=8,
        qkv_bias=False,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
        locality_strength=1.0,
        use_local_init=True,
    ):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.make_query_key(qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.make_position()
        self.proj_drop = nn.Dropout(proj_drop)
        self.locality_strength = locality_strength
        self.make_gate()
        self.apply(self._init_weights)
        if use_local_init:
            self.local_init(locality_strength)

    def make_query_key(self, bias):
        self.qk = nn.Linear(self.dim, 2 * self.dim, bias=bias)

    def make_position(self):
        self.pos_proj = nn.Linear(3, self.num_heads)

    def make_gate(self):
        self.gating_param = nn.Parameter(torch.ones(self.num_heads))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            timm.layers.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def local_init(self, locality_strength=1.0):
        weight = self.pos_proj.weight.data
        self.v.weight.data.copy_(torch.eye(self.dim))
        window = int(self.num_heads**0.5)
        center = (window - 1) / 2 if window % 2 == 0 else window // 2
        for i in range(window):
            for j in range(window):
                weight[i + window * j] = torch.tensor([2 * (j - center), 2 * (i - center), -1.0])
        weight *= locality_strength

    def features(self, height, width):
        token = torch.arange(height * width)
        x, y = token % width, token // width
        dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
        return torch.stack((dx, dy, self.distance(dx, dy)), dim=-1).float()[None]

    def distance(self, dx, dy):
        return dx**2 + dy**2

    def get_rel_indices(self, num_patches):
        side = int(num_patches**0.5)
        self.rel_indices = self.features(side, side).to(self.v.weight.device)

    def project(self, x) -> tuple[Tensor, Tensor]:
        return self.qk(x).chunk(2, dim=-1)

    def heads(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def position(self):
        return self.pos_proj(self.rel_indices).permute(0, 3, 1, 2)

    def gating(self):
        return torch.sigmoid(self.gating_param).view(1, -1, 1, 1)

    def get_attention(self, x):
        q, k = (self.heads(t) for t in self.project(x))
        content = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        g = self.gating()
        mixed = (1 - g) * content + g * self.position().softmax(dim=-1)
        return self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))

    def prepare(self, tokens):
        if not hasattr(self, "rel_indices") or self.rel_indices.shape[1] != tokens:
            self.get_rel_indices(tokens)

    def attend(self, x):
        self.prepare(x.shape[1])
        attention, v = self.get_attention(x), self.heads(self.v(x))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2))), attention, v

    def forward(self, x):
        return self.attend(x)[0]

    def get_attention_map(self, x, return_map=False):
        self.prepare(x.shape[1])
        attention = self.get_attention(x).mean(0)
        distance = torch.einsum("nm,hnm->h", self.rel_indices[0, :, :, -1] ** 0.5, attention) / x.shape[1]
        return (distance, attention) if return_map else distance


@named("GPSA")
class DyToxGPSA(OfficialGPSA):
    """DyTox: takes and ignores `fc`, returns three things."""

    def __init__(self, dim, num_heads=8, fc=None, **options):
        super().__init__(dim, num_heads, **options)

    def reset_parameters(self):
        self.apply(self._init_weights)

    def forward(self, x):
        return self.attend(x)


@named("GPSA")
class ImagingGPSA(OfficialGPSA):
    """MLI-lab's transformers for imaging: q and k apart, any grid, which the block sets before each call."""

    def __init__(self, dim, num_heads=8, grid_size=None, **options):
        super().__init__(dim, num_heads, **options)
        self.current_grid_size = grid_size

    def make_query_key(self, bias):
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.k = nn.Linear(self.dim, self.dim, bias=bias)

    def project(self, x):
        return self.q(x), self.k(x)

    def get_rel_indices(self):
        self.rel_indices = self.features(*self.current_grid_size)

    def prepare(self, tokens):
        self.get_rel_indices()


@named("GPSA")
class VisslGPSA(OfficialGPSA):
    """VISSL: every feature locality_dim times, logits divided by it, a gate named alpha."""

    locality_dim = 10

    def __init__(self, embed_dim, num_heads=9, **options):
        super().__init__(embed_dim, num_heads, use_local_init=False, **options)

    def make_position(self):
        self.pos_proj = nn.Linear(3 * self.locality_dim, self.num_heads)

    def make_gate(self):
        self.alpha = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def gating(self):
        return torch.sigmoid(self.alpha)

    def position(self):
        return super().position() / self.locality_dim

    get_rel_indices = None

    def set_rel_indices(self, num_patches):
        side = int(num_patches**0.5)
        features = self.features(side, side).repeat_interleave(self.locality_dim, dim=-1)
        self.register_buffer("rel_indices", features, persistent=False)

    def prepare(self, tokens):
        if not hasattr(self, "rel_indices") or self.rel_indices.shape[1] != tokens:
            self.set_rel_indices(tokens)

    def get_attention_map(self, x, return_map=False):
        distance, attention = super().get_attention_map(x, return_map=True)
        mean = distance.mean().item()
        return (mean, attention) if return_map else mean


@named("GPSA")
class PlainDistanceGPSA(OfficialGPSA):
    """A distance that is not squared does not factorise."""

    def distance(self, dx, dy):
        return (dx**2 + dy**2) ** 0.5


@named("GPSA")
class MirroredGPSA(OfficialGPSA):
    """Offsets of the query from the key: the opposite sign."""

    def features(self, height, width):
        return super().features(height, width).transpose(1, 2)


@named("GPSA1D")
class OneDimensionalGPSA(OfficialGPSA):
    """TorchSig: a sequence, two features."""

    def make_position(self):
        self.pos_proj = nn.Linear(2, self.num_heads)

    def local_init(self, locality_strength=1.0):
        pass


@named("GPSA3D")
class ThreeDimensionalGPSA(ImagingGPSA):
    """DIRECT: three coordinates in the grid."""

    def features(self, depth, height, width):
        token = torch.arange(depth * height * width)
        return token.expand(1, depth * height * width, -1)[..., None].repeat(1, 1, 1, 3).float()


@named("GatedPositionalSelfAttention")
class VformerGPSA(nn.Module):
    """vformer: its own layout, with a distance that is not squared."""

    def __init__(self, dim=32, num_heads=4):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.pos = nn.Linear(3, num_heads)
        self.gate = nn.Parameter(torch.ones(1, num_heads, 1, 1))
