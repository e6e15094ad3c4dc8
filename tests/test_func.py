"""What torch.func and autograd's other ways make of timm's ConViT and of the same one after replace_gpsa."""

import copy
import warnings

import pytest
import torch
from foreign import perturbed
from timm.models.convit import ConVit
from torch import func, nn
from torch.autograd import forward_ad

import convit_kernels as ck

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """timm's, in float64, and its replaced copy."""
    model = ConVit(
        img_size=24, patch_size=8, num_classes=3, embed_dim=4, depth=3, num_heads=4, local_up_to_layer=2
    ).double()
    theirs = perturbed(model.eval())
    theirs(torch.zeros(1, 3, 24, 24, dtype=torch.float64))  # timm's layer makes its features in its first forward
    ours = copy.deepcopy(theirs)
    assert ck.replace_gpsa(ours) == 2
    return theirs, ours


def images(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, 24, 24, dtype=torch.float64)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of_one(model: nn.Module):
    """The loss of an image, (3, 24, 24), as a function of the parameters."""

    def loss(values, image):
        return func.functional_call(model, values, (image[None],)).square().sum()

    return loss


@pytest.mark.situation(
    "Derivatives", "`torch.func.grad` and `functional_call`", timm="works", ours="works, as plain PyTorch operators"
)
def test_grad(models):
    image = images(1)[0]
    theirs, ours = (func.grad(loss_of_one(model))(parameters(model), image) for model in models)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.situation(
    "Derivatives",
    "a gradient for each image, `vmap(grad(...))`",
    timm="works",
    ours="works, as plain PyTorch operators",
)
def test_per_sample_gradients(models):
    batch = images()
    theirs, ours = (func.vmap(func.grad(loss_of_one(model)), (None, 0))(parameters(model), batch) for model in models)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.situation(
    "Derivatives", "`torch.func.jacrev` and `jacfwd`", timm="works", ours="works, as plain PyTorch operators"
)
@pytest.mark.parametrize("jacobian", [func.jacrev, func.jacfwd])
def test_jacobians(models, jacobian):
    gates = {name: value for name, value in parameters(models[0]).items() if "gating" in name}
    batch = images()

    def logits(model):
        return lambda gates: func.functional_call(model, parameters(model) | gates, (batch,))

    theirs, ours = (jacobian(logits(model))(gates) for model in models)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.situation(
    "Derivatives", "`torch.func.jvp`, `hessian`", timm="works", ours="works, as plain PyTorch operators"
)
def test_forwards_and_twice(models):
    batch, tangent = images(), images()
    theirs, ours = (func.jvp(model, (batch,), (tangent,)) for model in models)
    torch.testing.assert_close(ours, theirs)
    small = {name: value for name, value in parameters(models[0]).items() if name.endswith("1.attn.gating_param")}

    def loss(model):
        return lambda gate: func.functional_call(model, parameters(model) | gate, (batch,)).square().sum()

    theirs, ours = (func.hessian(loss(model))(small) for model in models)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.situation(
    "Derivatives",
    "forward-mode differentiation (`dual_level`)",
    timm="works",
    ours="works, as plain PyTorch operators",
)
def test_dual_numbers(models):
    batch, tangent = images(), images()
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(model(forward_ad.make_dual(batch, tangent))) for model in models]
    theirs, ours = found
    torch.testing.assert_close((ours.primal, ours.tangent), (theirs.primal, theirs.tangent))


@pytest.mark.situation(
    "Derivatives",
    "an ensemble by `stack_module_state` and `vmap`",
    timm="works",
    ours="works; the fused kernels take the models as further heads, in one call",
)
def test_an_ensemble(models):
    def outputs(model):
        ensemble = [model, copy.deepcopy(model)]
        ensemble[1].load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})
        state = func.stack_module_state(ensemble)
        return func.vmap(lambda *state: func.functional_call(model, state, (batch,)))(*state)

    batch = images()
    theirs, ours = (outputs(model) for model in models)
    torch.testing.assert_close(ours, theirs)


def test_the_attention_in_vmap_is_one_call(models):
    layer, tokens = models[1].blocks[0].attn, torch.randn(4, 2, 9, 16, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        found = func.vmap(layer)(tokens)
    torch.testing.assert_close(found, torch.stack([layer(each) for each in tokens]))


@pytest.mark.situation(
    "Derivatives",
    "a gradient penalty (`create_graph=True`)",
    timm="works",
    ours="works; the second pass builds the content's map",
)
def test_a_second_backward_pass(models):
    batch = images()
    for model in models:
        leaf = batch.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().sum().backward()
    theirs, ours = ({name: parameter.grad for name, parameter in model.named_parameters()} for model in models)
    bias = [name for name in theirs if name.endswith("pos_proj.bias")]  # zero but for timm's rounding
    assert all(theirs.pop(name).abs().max() < 1e-9 for name in bias)
    assert all(ours.pop(name).abs().max() < 1e-9 for name in bias)
    torch.testing.assert_close(ours, theirs)
