"""Lines, other spacings and a key mask, through the Triton kernels."""

import pytest
import torch
from test_positions import check

from convit_kernels import gpsa_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("tokens", [5, 17])
def test_a_line(tokens, dtype):
    check("triton", (tokens,), dtype, head_dim=16)


def test_another_spacing():
    check("triton", (3, 5), spacing=(0.25, 0.25), head_dim=16)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 48])
def test_a_key_mask(dtype, head_dim):
    check("triton", (4, 5), dtype, key_mask=torch.rand(2, 20) < 0.6, head_dim=head_dim)


def test_a_key_mask_of_numbers_gets_its_gradient():
    check("triton", (3, 4), key_mask=torch.rand(2, 12) + 0.1)


def test_a_head_that_is_too_wide_with_a_mask():
    q = torch.randn(1, 1, 4, 256)
    args = q, q, q, torch.randn(1, 3), torch.randn(1)
    gpsa_attention(*args, backend="triton")
    with pytest.raises(RuntimeError, match="head_dim is at most 256, not 257"):
        gpsa_attention(*args, key_mask=torch.ones(4), backend="triton")


def test_dropout_with_a_mask_is_refused():
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match=r"never normalised.*backend=None would take 'reference'"):
        gpsa_attention(
            q, q, q, torch.randn(1, 3), torch.randn(1), key_mask=torch.ones(4), dropout_p=0.5, backend="triton"
        )
