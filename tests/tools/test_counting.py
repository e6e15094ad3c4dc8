"""Parameters and operations, as tools count them that put hooks on every layer or run the model beneath themselves."""

import pytest
import torchinfo
from ptflops import get_model_complexity_info
from small import images, replaced, same, timm_model
from torch import nn


def by_torchinfo(model: nn.Module) -> tuple[int, ...]:
    found = torchinfo.summary(model, input_data=images(), verbose=0)
    return found.total_params, found.total_mult_adds, found.total_output_bytes


def by_ptflops(model: nn.Module) -> tuple[float, ...]:
    return get_model_complexity_info(
        model, (3, 32, 32), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )


@pytest.mark.parametrize("count", [by_torchinfo, by_ptflops])
@pytest.mark.situation(
    "Tools",
    "counted by torchinfo, or by ptflops with hooks on layers",
    timm="all linear layers count",
    ours="the same numbers, and afterwards the fast backends again",
)
def test_what_is_counted(count):
    theirs, mine = timm_model(), replaced()
    assert count(mine) == count(theirs)
    assert mine.blocks[0].attn.why_dense() == ""
    same(mine(images()), theirs(images()))
