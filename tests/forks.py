"""Forks of the reference's layer: its name and parameters, and something else in what it does or holds."""

import torch
from foreign import Layer, named
from torch import nn


@named("GPSA")
class WithConvolution(Layer):
    """A convolution over the tokens before the attention, in the manner of Conviformer."""

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.conv = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)

    def attend(self, x):
        return super().attend(self.conv(x.transpose(1, 2)).transpose(1, 2))


@named("GPSA")
class Smoothed(Layer):
    """The same without parameters of its own."""

    def attend(self, x):
        return super().attend((x + x.roll(1, dims=1)) / 2)


@named("GPSA")
class MapWhileTraining(Layer):
    """A second output for a loss on the map."""

    def forward(self, x):
        out, attention, _ = self.attend(x)
        return (out, attention) if self.training else out


@named("GPSA")
class Pair(Layer):
    def forward(self, x):
        return self.attend(x)[:2]


@named("GPSA")
class Dictionary(Layer):
    def forward(self, x):
        return {"x": self.attend(x)[0]}


@named("GPSA")
class ScaledOutput(Layer):
    def forward(self, x):
        return 0.5 * super().forward(x)


@named("GPSA")
class LayerScale(Layer):
    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gamma * super().forward(x)


@named("GPSA")
class Residual(Layer):
    def forward(self, x):
        return x + super().forward(x)


@named("GPSA")
class NoisyMap(Layer):
    """BiRT: noise on the map while training."""

    def get_attention(self, x):
        attention = super().get_attention(x)
        return attention + 0.1 * torch.rand_like(attention) if self.training else attention


@named("GPSA")
class MaskedMap(Layer):
    """A mask that is all ones until somebody sets it."""

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.register_buffer("mask", torch.ones(num_heads, 1, 1))

    def get_attention(self, x):
        return super().get_attention(x) * self.mask


@named("GPSA")
class DropsLogits(Layer):
    """DropKey: the same dropout, before the softmax."""

    def get_attention(self, x):
        q, k = (self.heads(t) for t in self.project(x))
        content = self.attn_drop((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        g = self.gating()
        return (1 - g) * content + g * self.position().softmax(dim=-1)


@named("GPSA")
class InvertedGate(Layer):
    def gating(self):
        return 1 - super().gating()


@named("GPSA")
class OwnDistance(Layer):
    """The same output; what it says of itself differs."""

    def get_attention_map(self, x, return_map=False):
        return 16 * super().get_attention_map(x)


@named("GPSA")
class FurtherArgument(Layer):
    def forward(self, x, mask=None):
        return super().forward(x)


@named("GPSA")
class AnyArguments(Layer):
    def forward(self, *args):
        return super().forward(args[0])


@named("GPSA")
class OwnLoading(Layer):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}rel_indices", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


@named("GPSA")
class ScheduledScale(Layer):
    step = 0

    @property
    def scale(self):
        return 0.1 * (1 + self.step)

    @scale.setter
    def scale(self, value):
        pass


@named("GPSA")
class NeedsSetting(Layer):
    def forward(self, x):
        return super().forward(x) * self.not_set_yet


@named("GPSA")
class KeepsItsMaps(Layer):
    """What a visualisation reads later."""

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.maps = []

    def get_attention(self, x):
        self.maps.append(super().get_attention(x))
        return self.maps[-1]


@named("GPSA")
class PersistentPosition(Layer):
    """Lux-AI: the features are a buffer in the state_dict."""

    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        self.register_buffer("rel_indices", self.features(4, 4))


@named("GPSA")
class LearntScale(Layer):
    """One temperature a head, or one for all."""

    def __init__(self, dim, num_heads=8, each_head=True, **options):
        super().__init__(dim, num_heads, **options)
        scale = torch.full((num_heads, 1, 1) if each_head else (), self.scale)
        del self.scale
        self.scale = nn.Parameter(scale)


@named("GPSA")
class BroadcastGate(Layer):
    def make_gate(self):
        self.gating_param = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))


@named("GPSA")
class FunctionForValues(Layer):
    def __init__(self, dim, num_heads=8, **options):
        super().__init__(dim, num_heads, **options)
        del self.v
        self.v = torch.tanh


@named("GPSA")
class DetachedPosition(Layer):
    """The same outputs; the positions do not learn."""

    def position(self):
        return super().position().detach()


@named("GPSA")
class WithoutGradient(Layer):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@named("GPSA")
class Checkpointed(Layer):
    """Less memory, the same outputs and gradients."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
