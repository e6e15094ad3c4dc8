"""gpsa_attention beyond the paper's plane of unit spacing: lines, space, other spacings, and a mask of the keys."""

import pytest
import torch
from backends import AVAILABLE, EACH_BACKEND, EACH_EXACT_BACKEND
from equivalence import assert_as_exact, sliced
from torch import Tensor

import convit_kernels as ck
from convit_kernels.equivalence import eager_attention, expected, with_gradients

pytestmark = pytest.mark.usefixtures("on_device")
GENERAL = pytest.mark.parametrize("backend", [None, "composite", "reference"])
KERNELS = pytest.mark.parametrize("backend", [name for name in ("cpu", "triton") if name in AVAILABLE])


def features(grid: tuple[int, ...], spacing: tuple[float, ...] | None, dtype: torch.dtype) -> Tensor:
    """(1, N, N, axes + 1): the offsets of key and query, the last axis first, and the squared distance."""
    steps = torch.tensor(spacing or [1.0] * len(grid), dtype=dtype)
    points = torch.cartesian_prod(*(torch.arange(side) for side in grid)).reshape(-1, len(grid)) * steps
    offsets = (points[None, :, :] - points[:, None, :]).flip(-1)
    return torch.cat((offsets, offsets.square().sum(-1, keepdim=True)), dim=-1)[None]


def inputs_for(grid: tuple[int, ...], dtype: torch.dtype = torch.float32, head_dim: int = 8) -> list[Tensor]:
    """q, k, v, pos_weight, gate and the gradient of the output: float64 values that dtype has."""
    shape = (2, 3, torch.Size(grid).numel(), head_dim)
    pos_weight = torch.randn(3, len(grid) + 1, dtype=torch.float64) * 0.4
    tensors = [*(sliced(*shape) for _ in range(3)), pos_weight, torch.randn(3, dtype=torch.float64), sliced(*shape)]
    return [tensor.to(dtype) for tensor in tensors]


def check(backend, grid, dtype=torch.float32, *, spacing=None, key_mask=None, head_dim=8) -> None:
    """Output and gradients, that of a floating-point mask among them, by the rule of convit_kernels.equivalence."""
    *inputs, grad = inputs_for(grid, dtype, head_dim)
    learnt = key_mask is not None and key_mask.is_floating_point()
    inputs += [key_mask.to(dtype)] if learnt else []
    names = ("out", "d_q", "d_k", "d_v", "d_pos_weight", "d_gate", "d_key_mask")[: len(inputs) + 1]

    def eager(wide: torch.dtype, renormalise: bool = True) -> dict[str, Tensor]:
        def attention(q, k, v, pos_weight, gate, mask=key_mask):
            identity = torch.eye(v.shape[2], dtype=wide).expand(*v.shape[:2], -1, -1)
            rel_indices = features(grid, spacing, torch.float64).to(wide)
            settings = {"renormalise": renormalise}
            mixed = eager_attention(q, k, identity, pos_weight, gate, rel_indices, head_dim**-0.5, **settings)
            if mask is not None:
                mixed = mixed * mask.to(wide).expand(2, -1)[:, None, None, :]
                mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            return mixed @ v

        return with_gradients(attention, [tensor.to(wide) for tensor in inputs], grad.to(wide), names)

    def ours(q, k, v, pos_weight, gate, mask=key_mask):
        options = {} if spacing is None else {"spacing": spacing}
        return ck.gpsa_attention(q, k, v, pos_weight, gate, grid_size=grid, key_mask=mask, backend=backend, **options)

    rule = expected(eager, dtype, implementation=lambda: eager(torch.float64, renormalise=False))
    assert_as_exact(with_gradients(ours, inputs, grad, names), rule)


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_line(backend, dtype):
    check(backend, (17,), dtype)


@pytest.mark.equivalence
@EACH_BACKEND
@pytest.mark.parametrize("spacing", [(0.5,), (-2.0,)])
def test_a_line_of_another_spacing(backend, spacing):
    check(backend, (9,), spacing=spacing)


@pytest.mark.equivalence
@EACH_BACKEND
def test_a_plane_with_one_spacing(backend):
    check(backend, (3, 5), spacing=(0.25, 0.25))


@pytest.mark.equivalence
@GENERAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plane_whose_axes_have_spacings_of_their_own(backend, dtype):
    """Coordinates scaled to [-1, 1] on a grid that is not square."""
    check(backend, (3, 5), dtype, spacing=(1.0, 0.5))


@pytest.mark.equivalence
@GENERAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 4, 3), (3, 1, 1)])
def test_space(backend, grid, dtype):
    check(backend, grid, dtype)
    check(backend, grid, dtype, spacing=(2.0, 0.5, 1.0))


def test_one_number_is_the_spacing_of_each_axis():
    *inputs, _ = inputs_for((2, 3, 2), torch.float64)
    one, each = (ck.gpsa_attention(*inputs, grid_size=(2, 3, 2), spacing=s) for s in (0.5, (0.5, 0.5, 0.5)))
    assert torch.equal(one, each)


@KERNELS
@pytest.mark.parametrize("grid, spacing", [((2, 3, 4), 1.0), ((3, 4), (1.0, 2.0))])
def test_a_kernel_that_does_not_know_such_positions_says_so_and_which_backend_does(backend, grid, spacing):
    *inputs, _ = inputs_for(grid)
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot do this: the kernels know.*take 'composite' here"):
        ck.gpsa_attention(*inputs, grid_size=grid, spacing=spacing, backend=backend)


class TestKeyMask:
    @pytest.mark.equivalence
    @EACH_BACKEND
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [1, 16, 48])
    def test_multiplies_the_mixed_map_whose_rows_are_then_renormalised(self, backend, dtype, head_dim):
        check(backend, (4, 5), dtype, key_mask=torch.rand(2, 20) < 0.6, head_dim=head_dim)

    @pytest.mark.equivalence
    @EACH_BACKEND
    def test_of_numbers_gets_its_gradient(self, backend):
        check(backend, (3, 4), key_mask=torch.rand(2, 12) + 0.1)

    @pytest.mark.equivalence
    @EACH_BACKEND
    def test_of_all_images_at_once(self, backend):
        check(backend, (3, 4), key_mask=torch.arange(12) % 3 > 0)

    @pytest.mark.equivalence
    @GENERAL
    def test_in_space(self, backend):
        check(backend, (2, 3, 2), key_mask=torch.rand(2, 12) < 0.7)

    @EACH_EXACT_BACKEND
    def test_of_ones_changes_nothing_but_rounding(self, backend):
        *inputs, _ = inputs_for((3, 4), torch.float64)
        masked, plain = (
            ck.gpsa_attention(*inputs, grid_size=(3, 4), key_mask=m, backend=backend) for m in (torch.ones(12), None)
        )
        torch.testing.assert_close(masked, plain, rtol=1e-12, atol=1e-13)

    @EACH_BACKEND
    def test_without_a_key_left_the_image_is_nan_and_no_other_one(self, backend):
        *inputs, _ = inputs_for((3, 4))
        mask = torch.tensor([[False], [True]]).expand(2, 12)
        out = ck.gpsa_attention(*inputs, grid_size=(3, 4), key_mask=mask, backend=backend)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()

    def test_dropout_acts_on_the_renormalised_map(self):
        *inputs, _ = inputs_for((3, 4), torch.float64)
        mask, identity = torch.rand(2, 12) < 0.6, torch.eye(12, dtype=torch.float64).expand(2, 3, 12, 12)
        q, k, v, pos_weight, gate = inputs
        fill = torch.zeros(2, 3, 12, 4, dtype=torch.float64)  # 12 channels, to have the map as the output
        torch.manual_seed(3)
        out = ck.gpsa_attention(*inputs, grid_size=(3, 4), key_mask=mask, dropout_p=0.5)
        torch.manual_seed(3)
        wide = [torch.cat((tensor, fill), dim=-1) for tensor in (q, k)]
        map_ = ck.gpsa_attention(
            *wide, identity, pos_weight, gate, grid_size=(3, 4), key_mask=mask, dropout_p=0.5, scale=8**-0.5
        )
        torch.testing.assert_close(out, map_ @ v)
        assert (map_ == 0).sum() > 2 * 3 * 12 * (~mask).sum() / 2

    @pytest.mark.on_cpu
    @pytest.mark.parametrize(
        "key_mask, error, text",
        [
            ([True] * 12, TypeError, "key_mask must be a tensor, but is a list"),
            (torch.ones(12, dtype=torch.int64), TypeError, r"key_mask must be bool.*but is torch\.int64"),
            (torch.ones(3, 12), ValueError, r"key_mask must have shape \(batch, tokens\), \(2, 12\).*has \(3, 12\)"),
            (torch.ones(2, 1, 1, 12), ValueError, r"key_mask must have shape.*has \(2, 1, 1, 12\)"),
            (torch.ones(11), ValueError, r"key_mask must have shape.*has \(11,\)"),
            (torch.ones(12, device="meta"), ValueError, "key_mask is on meta, but q is on cpu"),
        ],
    )
    def test_what_is_no_mask_is_refused(self, key_mask, error, text):
        *inputs, _ = inputs_for((3, 4))
        with pytest.raises(error, match=text):
            ck.gpsa_attention(*inputs, grid_size=(3, 4), key_mask=key_mask)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"grid_size": (1, 2, 3, 2)}, TypeError, "grid_size must be an int for a square"),
        ({"grid_size": (3, 3)}, ValueError, r"grid_size \(3, 3\) has 9 tokens, but the input has 12"),
        ({"grid_size": (12,)}, ValueError, r"pos_weight must have shape \(3, 2\) for 3 heads, but has \(3, 3\)"),
        ({"spacing": (1.0,)}, ValueError, "one for each of the grid's 2 sides"),
        ({"spacing": float("nan")}, ValueError, "spacing must be finite"),
        ({"spacing": "1"}, TypeError, "spacing must be a number, but is '1'"),
    ],
)
def test_what_is_no_grid_or_spacing_is_refused(options, error, text):
    *inputs, _ = inputs_for((3, 4))
    with pytest.raises(error, match=text):
        ck.gpsa_attention(*inputs, **{"grid_size": (3, 4)} | options)


@pytest.mark.parametrize("grid, spacing", [((12,), 1.0), ((2, 3, 2), (1.0, 2.0, 1.0)), ((3, 4), 0.5)])
def test_compile_without_a_break(grid, spacing):
    *inputs, _ = inputs_for(grid)
    mask = torch.rand(2, 12) < 0.7
    compiled = torch.compile(
        lambda *args: ck.gpsa_attention(*args, grid_size=grid, spacing=spacing, key_mask=mask),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        compiled(*inputs), ck.gpsa_attention(*inputs, grid_size=grid, spacing=spacing, key_mask=mask)
    )
