"""GPSA layers as other projects have them, written anew from their descriptions: what replace_gpsa has to recognise.

They share one class with the reference's mathematics, but none is a subclass of another, as in those projects, each of
which has its own copy of the file.
"""

import timm
import torch
from timm.models import convit
from torch import Tensor, nn


def named(name: str):
    """Gives a class the name it has in its own project: recognition sees no more of the project than that."""

    def rename(cls: type) -> type:
        cls.__name__ = name
        return cls

    return rename


class Layer(nn.Module):
    """The reference's mathematics, in parts that projects change."""

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
        self.make_projections(qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.make_position()
        self.proj_drop = nn.Dropout(proj_drop)
        self.locality_strength = locality_strength
        self.make_gate()
        self.apply(self._init_weights)
        if use_local_init:
            self.local_init(locality_strength)

    def make_projections(self, bias):
        self.qk = nn.Linear(self.dim, 2 * self.dim, bias=bias)
        self.v = nn.Linear(self.dim, self.dim, bias=bias)

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
        self.rel_indices = self.features(side, side).to(self.proj.weight.device)

    def project(self, x) -> tuple[Tensor, Tensor]:
        return self.qk(x).chunk(2, dim=-1)

    def values(self, x) -> Tensor:
        return self.v(x)

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
        attention, v = self.get_attention(x), self.heads(self.values(x))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2))), attention, v

    def forward(self, x):
        return self.attend(x)[0]

    def get_attention_map(self, x, return_map=False):
        self.prepare(x.shape[1])
        attention = self.get_attention(x).mean(0)
        distance = torch.einsum("nm,hnm->h", self.rel_indices[0, :, :, -1] ** 0.5, attention) / x.shape[1]
        return (distance, attention) if return_map else distance


@named("GPSA")
class OfficialGPSA(Layer):
    """facebookresearch/convit: the constructor initialises, `rel_indices` is a plain attribute of a square grid."""


@named("GPSA")
class DyToxGPSA(Layer):
    """DyTox: takes and ignores `fc`, returns three things."""

    def __init__(self, dim, num_heads=8, fc=None, **options):
        super().__init__(dim, num_heads, **options)

    def reset_parameters(self):
        self.apply(self._init_weights)

    def forward(self, x):
        return self.attend(x)


class Separate(Layer):
    """q, k and v apart."""

    def make_projections(self, bias):
        self.q, self.k, self.v = (nn.Linear(self.dim, self.dim, bias=bias) for _ in range(3))

    def project(self, x):
        return self.q(x), self.k(x)


@named("GPSA")
class SeparateGPSA(Separate):
    """Copies that split qk."""


class Imaging(Separate):
    """Any grid, which the block sets before each call."""

    def __init__(self, dim, num_heads=8, grid_size=None, **options):
        super().__init__(dim, num_heads, **options)
        self.current_grid_size = grid_size

    def get_rel_indices(self):
        self.rel_indices = self.features(*self.current_grid_size)

    def prepare(self, tokens):
        self.get_rel_indices()


@named("GPSA")
class ImagingGPSA(Imaging):
    """MLI-lab's transformers for imaging."""


@named("GPSA")
class VisslGPSA(Layer):
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
class PlainDistanceGPSA(Layer):
    """A distance that is not squared does not factorise."""

    def distance(self, dx, dy):
        return (dx**2 + dy**2) ** 0.5


@named("GPSA")
class MirroredGPSA(Layer):
    """Offsets of the query from the key: the opposite sign."""

    def features(self, height, width):
        return super().features(height, width).transpose(1, 2)


@named("GPSA1D")
class OneDimensionalGPSA(Layer):
    """TorchSig: a sequence, two features."""

    def make_position(self):
        self.pos_proj = nn.Linear(2, self.num_heads)

    def local_init(self, locality_strength=1.0):
        pass

    def get_rel_indices(self, num_patches):
        token = torch.arange(num_patches)
        d = (token[None, :] - token[:, None]).float()
        self.rel_indices = torch.stack((d, d**2), dim=-1)[None]


def space(depth, height, width):
    """Offsets along z, y and x, (N, N) each."""
    token = torch.arange(depth * height * width)
    places = token // (height * width), token // width % height, token % width
    return [(place[None, :] - place[:, None]).float() for place in places]


@named("GPSA3D")
class ThreeDimensionalGPSA(Imaging):
    """DIRECT: volumes, four features, the grid set before each call; here from the slowest axis to the fastest."""

    def make_position(self):
        self.pos_proj = nn.Linear(4, self.num_heads)

    def local_init(self, locality_strength=1.0):
        pass

    def features(self, depth, height, width):
        dz, dy, dx = space(depth, height, width)
        return torch.stack((dz, dy, dx, dx**2 + dy**2 + dz**2), dim=-1)[None]


@named("GPSA")
class CubeGPSA(ThreeDimensionalGPSA):
    """Voxels: a cube of as many, query minus key."""

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        del self.current_grid_size

    def get_rel_indices(self, num_patches):
        side = round(num_patches ** (1 / 3))
        self.rel_indices = self.features(side, side, side).transpose(1, 2)

    prepare = Layer.prepare


@named("GPSA")
class IrregularGPSA(Layer):
    """Point clouds: coordinates come with each call."""

    def make_position(self):
        self.pos_proj = nn.Linear(4, self.num_heads)

    def local_init(self, locality_strength=1.0):
        pass

    def forward(self, x, coords):
        d = coords[:, None, :] - coords[:, :, None]
        self.rel_indices = torch.cat((d, d.square().sum(-1, keepdim=True)), dim=-1)
        return self.attend(x)[0]

    def prepare(self, tokens):
        pass


@named("GPSA")
class FusedGPSA(Layer):
    """One projection for queries, keys and values."""

    def make_projections(self, bias):
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)

    def local_init(self, locality_strength=1.0):
        pass

    def project(self, x):
        return self.qkv(x).chunk(3, dim=-1)[:2]

    def values(self, x):
        return self.qkv(x).chunk(3, dim=-1)[2]


@named("GPSA")
class InterleavedGPSA(FusedGPSA):
    """The same by heads first: each head's queries, keys and values side by side."""

    def split(self, x):
        return self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)

    def project(self, x):
        return [each.flatten(2) for each in self.split(x)[:2]]

    def values(self, x):
        return self.split(x)[2].flatten(2)


@named("GPSA")
class ScaledGPSA(Layer):
    """Coordinates from -1 to 1 along each side, whatever the size."""

    def features(self, height, width):
        y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        place = torch.cartesian_prod(y, x).flip(-1)
        d = place[None, :] - place[:, None]
        return torch.cat((d, d.square().sum(-1, keepdim=True)), dim=-1)[None]


@named("GPSA")
class EncoderGPSA(FusedGPSA):
    """ConViTEnc: qkv in one, a grid that is not square, coordinates from -1 to 1, the gate inverted and begun at -2."""

    def __init__(self, dim, num_heads=8, grid_size=(3, 5), **options):
        super().__init__(dim, num_heads, **options)
        self.register_buffer("rel_indices", ScaledGPSA.features(self, *grid_size), persistent=False)

    def make_gate(self):
        self.gating_param = nn.Parameter(torch.full((self.num_heads,), -2.0))

    def gating(self):
        return 1 - super().gating()

    def prepare(self, tokens):
        pass


@named("GPSA")
class RowFirst(Layer):
    """The features in another order, half as large."""

    def features(self, height, width):
        dx, dy, d2 = super().features(height, width).unbind(-1)
        return torch.stack((dy / 2, dx / 2, d2 / 4), dim=-1)


@named("GPSA")
class LuxGPSA(Layer):
    """Lux-AI: feature maps in and out, a persistent buffer for one size, a mask on the map after the dropout."""

    def __init__(self, dim, height, width, n_heads=4, **options):
        super().__init__(dim, n_heads, **options)
        self.height, self.width = height, width
        self.register_buffer("rel_indices", self.features(height, width))

    def get_attention(self, x, input_mask):
        attention = super().get_attention(x) * input_mask.float().unsqueeze(-2)
        return attention / attention.sum(dim=-1, keepdim=True)

    def forward(self, x, input_mask):
        tokens, mask = x.flatten(2).transpose(1, 2), input_mask.flatten(2)
        attention, v = self.get_attention(tokens, mask), self.heads(self.v(tokens))
        out = self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2)))
        return out.transpose(1, 2).view(x.shape)


@named("GPSA")
class MaskedGPSA(Layer):
    """A key mask for tokens, or none; the dropout comes after it."""

    def forward(self, x, mask=None):
        self.prepare(x.shape[1])
        drop, self._modules["attn_drop"] = self.attn_drop, nn.Identity()
        attention = self.get_attention(x)
        self._modules["attn_drop"] = drop
        if mask is not None:
            attention = attention * mask[:, None, None, :]
            attention = attention / attention.sum(dim=-1, keepdim=True)
        attention = self.attn_drop(attention)
        return self.proj_drop(self.proj((attention @ self.heads(self.v(x))).transpose(1, 2).flatten(2)))


@named("GPSA")
class CombinedGPSA(FusedGPSA):
    """A sequence, qkv in one, the gate inverted, a mask by name and three outputs on request."""

    make_position = OneDimensionalGPSA.make_position
    get_rel_indices = OneDimensionalGPSA.get_rel_indices

    def gating(self):
        return 1 - super().gating()

    def forward(self, x, return_attention=False, *, mask=None):
        self.prepare(x.shape[1])
        attention, v = self.get_attention(x), self.heads(self.values(x))
        if mask is not None:
            attention = attention * mask[:, None, None, :]
            attention = attention / attention.sum(dim=-1, keepdim=True)
        out = self.proj_drop(self.proj((attention @ v).transpose(1, 2).flatten(2)))
        return (out, attention, v) if return_attention else out


@named("GPSA")
class MapOnRequest(Layer):
    """DyTox's descendants: the map if the call asks for it."""

    def forward(self, x, return_attention=False):
        return self.attend(x)[:2] if return_attention else self.attend(x)[0]


@named("GPSA")
class MapByAttribute(Layer):
    """The map and the values if the layer was told to."""

    return_attn = None

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.return_attn = False

    def forward(self, x):
        return self.attend(x) if self.return_attn else self.attend(x)[0]


@named("GatedPositionalSelfAttention")
class VformerGPSA(nn.Module):
    """vformer: its own layout, with a distance that is not squared."""

    def __init__(self, dim=32, num_heads=4):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.pos = nn.Linear(3, num_heads)
        self.gate = nn.Parameter(torch.ones(1, num_heads, 1, 1))


def perturbed(layer: nn.Module) -> nn.Module:
    """Gates and positions away from their equal initial values, so that every branch matters."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "pos_proj" in name or "gating" in name or "alpha" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def timm_layer(dim=32, num_heads=4, **options):
    return convit.GPSA(dim, num_heads, **options)


LAYERS = {
    "timm": timm_layer,
    "official": OfficialGPSA,
    "dytox": DyToxGPSA,
    "imaging": lambda dim, num_heads, **options: ImagingGPSA(dim, num_heads, grid_size=(4, 4), **options),
    "vissl": VisslGPSA,
}


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def patch(module, function):
    module.forward = function
