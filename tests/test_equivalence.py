"""The rule of equivalence: it holds for whatever rounds, on any processor, and for nothing else."""

import pytest
import torch
from equivalence import eager_attention, make_inputs, problem, with_gradients
from timm.models import convit

from convit_kernels import equivalence
from convit_kernels.equivalence import NAMES, expected, expected_attention

GRID = (4, 5)


def test_the_eager_formula_is_timm_s():
    layer, x = convit.GPSA(24, 3).double(), torch.randn(2, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.gating_param.copy_(torch.randn(3))
    q, k = layer.qk(x).reshape(2, 16, 2, 3, 8).permute(2, 0, 3, 1, 4)
    v = layer.v(x).reshape(2, 16, 3, 8).transpose(1, 2)
    features = equivalence.relative_indices((4, 4), x)
    assert torch.equal(features, layer.get_rel_indices(16).double())
    out = equivalence.eager_attention(q, k, v, layer.pos_proj.weight, layer.gating_param, features, layer.scale)
    torch.testing.assert_close(layer.proj(out.transpose(1, 2).reshape(2, 16, 24)), layer(x), rtol=1e-12, atol=1e-13)


@pytest.mark.equivalence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_holds_for_eager_in_every_order_of_adding_up(dtype):
    """Images, keys and channels turned round are other orders: what another processor's rounding may draw."""
    inputs, rule = problem(batch=3, heads=2, grid=GRID, head_dim=16, dtype=dtype)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        images, channels = (torch.randperm(size, generator=generator) for size in (3, 16))
        turned = inputs._replace(**{name: getattr(inputs, name)[images][..., channels] for name in ("q", "k", "v")})
        turned = turned._replace(grad=inputs.grad[images][..., channels])
        out, dq, dk, dv, *scalars = with_gradients(lambda i: eager_attention(i, GRID, 0.25), turned)
        back = images.argsort(), channels.argsort()
        results = [t[back[0]][..., back[1]] for t in (out, dq, dk, dv)]
        for name, result in zip(NAMES, [*results, *scalars], strict=True):
            assert rule[name].share(result) <= 1, name


def test_a_lucky_draw_of_eager_s_does_not_bind():
    """Eager may be exact where another order of the same sum is not."""
    values = torch.tensor([1.0, 3e-8, 3e-8, 3e-8, 3e-8, -1.0]).repeat(50)
    smallest_first = values[values.abs().argsort()]

    def total(dtype):
        return {"total": (smallest_first[None].to(dtype) @ torch.ones(len(values), 1, dtype=dtype))[0]}

    rule = expected(total, torch.float32)["total"]
    other = torch.zeros(1)
    for value in values:
        other = other + value
    assert rule.error(other) > 2 * rule.eager_error
    assert rule.share(other) <= 1


def test_a_layer_norm_s_parameters_may_be_added_up_in_the_dtype_itself():
    """As PyTorch does on the CPU; eager elsewhere adds up in float32."""
    x, d_out = (torch.randn(400, 32).bfloat16() for _ in range(2))

    def gradients(dtype):
        weight, bias = (torch.ones(32, dtype=dtype, requires_grad=True) for _ in range(2))
        out = torch.nn.functional.layer_norm(x.to(dtype), (32,), weight, bias)
        d_weight, d_bias = torch.autograd.grad(out, (weight, bias), d_out.to(dtype))
        return {"d weight": d_weight, "d bias": d_bias}

    def in_float32(dtype):
        wide = gradients(torch.promote_types(dtype, torch.float32))
        return {name: result.to(dtype) for name, result in wide.items()}

    rule = expected(in_float32, torch.bfloat16)
    one_after_another = torch.zeros(32, dtype=torch.bfloat16)
    for row in d_out:
        one_after_another += row
    assert rule["d bias"].error(one_after_another) > 2 * rule["d bias"].eager_error
    assert rule["d bias"].share(one_after_another) <= 1
    for name, found in gradients(torch.bfloat16).items():
        assert rule[name].share(found) <= 1 < rule[name].share(1.2 * found), name


class TestItCatches:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4, -1.0])
    def test_a_factor(self, name, factor):
        inputs, rule = problem(batch=2, heads=3, grid=GRID, head_dim=16, dtype=torch.float32)
        found = dict(zip(NAMES, with_gradients(lambda i: eager_attention(i, GRID, 0.25), inputs), strict=True))
        assert rule[name].share(found[name]) <= 1
        assert rule[name].share(found[name] * factor) > 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_one_token_s_result_for_another_s(self, dtype):
        inputs, rule = problem(batch=2, heads=3, grid=GRID, head_dim=16, dtype=dtype)
        for name, result in zip(
            NAMES[:4], with_gradients(lambda i: eager_attention(i, GRID, 0.25), inputs), strict=False
        ):
            swapped = result.clone()
            swapped[1, 2, 7], swapped[1, 2, 8] = result[1, 2, 8], result[1, 2, 7]
            assert rule[name].share(swapped) > 1, name

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, value):
        inputs, rule = problem(batch=1, heads=1, grid=GRID, head_dim=4, dtype=torch.float32)
        out = eager_attention(inputs, GRID, 0.5)
        out[0, 0, 3, 1] = value
        assert rule["out"].share(out) == float("inf")

    def test_another_shape(self):
        inputs, rule = problem(batch=1, heads=1, grid=GRID, head_dim=4, dtype=torch.float32)
        assert rule["out"].share(eager_attention(inputs, GRID, 0.5)[:, :, :1]) == float("inf")

    def test_a_result_that_must_be_zero(self):
        rule = expected(lambda dtype: {"zero": torch.zeros(3, dtype=dtype).view(3)}, torch.float32)["zero"]
        assert rule.share(torch.zeros(3)) == 0
        assert rule.share(torch.tensor([0.0, 1e-30, 0.0])) == float("inf")


def test_what_one_token_leaves_is_rounding_and_allowed():
    """A softmax over one key is constant: the gradients of its logits are rounding alone, of large terms."""
    inputs = make_inputs(2, 3, (1, 1), 16)
    rule = expected_attention(*inputs, (1, 1))
    terms = (inputs.grad * inputs.v).abs().sum(-1).max().item() * inputs.k.abs().max().item()
    assert rule["dq"].exact.abs().max() < 1e-12
    assert 1e-8 * terms < rule["dq"].allowed < 1e-5 * terms


@pytest.mark.equivalence
def test_two_sums_that_cancel_may_be_added_up_in_two_orders():
    """A fused backward finds dP and sum P dP apart: over one key they are equal but for rounding."""
    inputs = make_inputs(3, 2, (1, 1), 16)
    rule = expected_attention(*inputs, (1, 1), recomputed=False)
    products, share = inputs.grad * inputs.v, 1 - torch.sigmoid(inputs.gate[:, None, None])
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        one, other = torch.zeros(2, 3, 2, 1, 1)
        for channel in range(16):
            one = one + products[..., channel, None]
            other = other + products[..., order[channel], None]
        assert rule["dq"].share((one - other) * share * inputs.k / 4) <= 1
