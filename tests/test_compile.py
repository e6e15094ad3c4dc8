"""torch.compile where batch and image sizes change: one more program when a size first does, and none for each size."""

from collections.abc import Callable, Iterable

import pytest
import torch
from backends import EACH_BACKEND
from equivalence import make_inputs
from timm.models import convit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import convit_kernels as ck
from convit_kernels import models

pytestmark = pytest.mark.usefixtures("on_device")
SMALL = {"patch_size": 8, "depth": 2, "num_heads": 4, "local_up_to_layer": 1, "num_classes": 5}


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def programs(function: Callable[..., Tensor], calls: Iterable[tuple], backend: str = "aot_eager") -> list[int]:
    """How many programs there were after each call and its backward, each in one graph; results are held to eager's."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    counts = []
    for arguments in calls:
        leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
        results = []
        for call in (compiled, function):
            for leaf in leaves:
                leaf.grad = None
                leaf.requires_grad_()
            out = call(*arguments)
            out.square().sum().backward()
            results.append((out, *(leaf.grad for leaf in leaves)))
        for mine, truth in zip(*results, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    return counts


def images(*sizes: tuple[int, int, int]) -> list[tuple[Tensor]]:
    return [(torch.randn(batch, 3, height, width),) for batch, height, width in sizes]


@EACH_BACKEND
@pytest.mark.parametrize("square", [True, False])
def test_gpsa_attention(backend, square, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("needs CUDA tensors: with --device cuda it has them")

    def call(q, k, v, pos_weight, gate, grid):
        return ck.gpsa_attention(q, k, v, pos_weight, gate, grid_size=None if square else grid, backend=backend)

    grids = [(3, 3), (4, 4), (6, 6)] if square else [(3, 4), (4, 5), (7, 2)]
    found = programs(call, [(*make_inputs(2, 2, grid, 8)[:5], grid) for grid in grids])
    assert found == [1, 2, 2]


@pytest.mark.situation(
    "Compiling",
    "`torch.compile` of the layer, with another number of tokens each time",
    timm="compiled anew for each",
    ours="compiled twice, for one number and for any",
)
def test_the_layer_for_any_number_of_tokens():
    calls = [(torch.randn(2, tokens, 32),) for tokens in (9, 16, 25)]
    assert programs(ck.GPSA(32, 4), calls) == [1, 2, 2]
    assert programs(convit.GPSA(32, 4), calls) == [1, 2, 3]


def replaced() -> nn.Module:
    model = convit.ConVit(img_size=32, embed_dim=8, **SMALL)
    ck.replace_gpsa(model)
    return model


@pytest.mark.situation(
    "Compiling",
    "`torch.compile` of a model, with another batch size each time",
    timm="compiled twice, for one size and for any",
    ours="the same",
)
@pytest.mark.parametrize(
    "model",
    [
        lambda: convit.ConVit(img_size=32, embed_dim=8, **SMALL),
        replaced,
        lambda: models.ConViT(img_size=32, embed_dim=32, **SMALL),
    ],
    ids=["timm", "replaced", "ck.models"],
)
def test_a_model_for_any_batch(model):
    found = programs(model(), images((2, 32, 32), (3, 32, 32), (5, 32, 32)), backend="eager")
    assert found == [1, 2, 2]


@pytest.mark.situation(
    "Compiling",
    "`torch.compile` of a model, with images of another size each time",
    timm="takes one size",
    ours="`ck.models`: compiled twice, for one size and for any; once more for the size that it was made for",
)
@pytest.mark.parametrize(
    "sizes",
    [[(2, 40, 40), (2, 48, 48), (2, 16, 16)], [(2, 40, 48), (2, 48, 64), (2, 64, 16)]],
    ids=["square", "not square"],
)
def test_ck_models_for_any_image(sizes):
    model = models.ConViT(img_size=32, embed_dim=32, **SMALL)
    assert programs(model, images(*sizes)) == [1, 2, 2]
    with pytest.raises(AssertionError, match="doesn't match model"):
        convit.ConVit(img_size=32, embed_dim=8, **SMALL)(torch.randn(2, 3, 40, 40))


def test_ck_models_have_one_program_more_for_the_size_that_they_were_made_for():
    model = models.ConViT(img_size=32, embed_dim=32, **SMALL)
    sizes = (2, 40, 48), (2, 48, 64), (2, 32, 32), (2, 64, 16)
    assert programs(model, images(*sizes), backend="eager") == [1, 2, 3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and torch sees none")
def test_cuda_graphs():
    model = replaced().cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for batch in (2, 2, 2, 3, 3, 3):
            x = torch.randn(batch, 3, 32, 32, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
