"""What torch.utils.flop_counter.FlopCounterMode counts: what timm's model multiplies, but for position."""

import subprocess
import sys

import pytest
import torch
from backends import FAST
from equivalence import make_inputs
from timm.models import convit
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import convit_kernels as ck
from convit_kernels import models

pytestmark = pytest.mark.skipif("cpu" not in FAST, reason="needs the built library; the CI builds it")
# without plain attention, whose kernel on the CPU PyTorch has no formula for
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 4, "local_up_to_layer": 2, "num_classes": 5}
LAYERS, HEADS, TOKENS, BATCH = 2, 4, 16, 3
POSITION = LAYERS * 2 * BATCH * HEADS * TOKENS**2 * 3  # the weights of each head times three features of each pair


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def pair() -> tuple[nn.Module, nn.Module]:
    """timm's model, and the same replaced."""
    theirs, ours = (convit.ConVit(embed_dim=8, global_pool="avg", **SMALL) for _ in range(2))
    ck.replace_gpsa(ours)
    return theirs, ours


@pytest.mark.situation(
    "Tools",
    "`FlopCounterMode` around a model, forward and backward",
    timm="counts every product",
    ours="timm's count without 6BHN² a layer and pass, the products of its positions",
)
@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
def test_the_count_is_timm_s_without_what_position_saves(device):
    theirs, ours = (model.to("meta" if device == "meta" else "cpu") for model in pair())
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else torch.device(device):
        images = torch.randn(BATCH, 3, 32, 32)
        assert count(lambda: theirs(images)) - count(lambda: ours(images)) == POSITION
        both = [count(lambda model=model: model(images).sum().backward()) for model in (theirs, ours)]
        assert both[0] - both[1] == 2 * POSITION


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_too(mode):
    theirs, ours = pair()
    images = torch.randn(BATCH, 3, 32, 32)
    with mode():
        assert count(lambda: theirs(images)) - count(lambda: ours(images)) == POSITION


def test_ck_models_as_a_replaced_model():
    _, replaced = pair()
    model = models.ConViT(embed_dim=32, global_pool="avg", **SMALL)
    images = torch.randn(BATCH, 3, 32, 32)
    assert count(lambda: model(images)) == count(lambda: replaced(images))


def test_modules_are_counted_apart():
    _, ours = pair()
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(BATCH, 3, 32, 32))
    found = counter.get_flop_counts()["ConVit.blocks.0.attn"][torch.ops.convit_kernels.gated_attention]
    assert found == 4 * BATCH * HEADS * TOKENS**2 * 8
    assert "ConVit.blocks.0.attn.qk" in counter.get_flop_counts()


class TestAttention:
    shape = (2, 3, 12, 8)

    def call(self) -> torch.Tensor:
        inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 3, (3, 4), 8)[:5]]
        return ck.gpsa_attention(*inputs, grid_size=(3, 4))

    def test_against_pytorch_s_formulas_for_its_own_attention(self):
        forward = count(self.call)
        assert forward == sdpa_flop_count(*[self.shape] * 3) == 4 * 2 * 3 * 12**2 * 8
        # which counts one product more: the scores, taken again
        assert count(lambda: self.call().sum().backward()) - forward == 2 * forward
        assert sdpa_backward_flop_count(*[self.shape] * 4) == 2.5 * forward

    def test_a_backward_alone(self):
        out = self.call()
        assert count(lambda: out.sum().backward()) == 8 * 2 * 3 * 12**2 * 8

    def test_a_formula_of_the_user_s_own_stays(self):
        mine = {torch.ops.convit_kernels.gated_attention: lambda *shapes, **out: 7}
        with FlopCounterMode(display=False, custom_mapping=mine) as counter:
            self.call()
        assert counter.get_total_flops() == 7


ORDER = """
import sys
import torch
assert "torch.utils.flop_counter" not in sys.modules
{imports}
q = torch.zeros(1, 1, 4, 8)
with counter:
    ck.gpsa_attention(q, q, q, torch.zeros(1, 3), torch.zeros(1))
assert counter.get_total_flops() == 4 * 4 * 4 * 8, counter.get_total_flops()
"""
PACKAGE = "import convit_kernels as ck\nassert 'torch.utils.flop_counter' not in sys.modules"
COUNTER = "from torch.utils.flop_counter import FlopCounterMode\ncounter = FlopCounterMode(display=False)"


@pytest.mark.parametrize("imports", [(PACKAGE, COUNTER), (COUNTER, PACKAGE.partition("\n")[0])], ids=["first", "last"])
def test_the_package_may_be_imported_before_or_after_the_counter_is_made(imports):
    code = ORDER.format(imports="\n".join(imports))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_hooks_on_every_module_still_call_everything():
    _, ours = pair()
    seen = []
    with FlopCounterMode(display=False):
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        ours(torch.randn(BATCH, 3, 32, 32))
        handle.remove()
    assert ours.blocks[0].attn.pos_proj in seen
