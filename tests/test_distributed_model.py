"""Models over several processes: each result is that of timm's model in one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from timm.models.convit import ConVit
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import convit_kernels as ck
from convit_kernels import gpsa

WHOLE = StateDictOptions(full_state_dict=True)
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}


def timm_model() -> nn.Module:
    """Three blocks, the last without position, with random parameters: the same in each process."""
    torch.manual_seed(0)
    model = ConVit(embed_dim=8, num_classes=5, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def replaced() -> nn.Module:
    model = timm_model()
    ck.replace_gpsa(model)
    return model


def own_model() -> nn.Module:
    model = ck.models.ConViT(embed_dim=32, num_classes=5, **SIZES)
    model.load_state_dict(timm_model().state_dict())
    return model


MODELS = {"replaced": replaced, "ck.models": own_model}


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One step: outputs, gradients, and the parameters after it, all of them whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    out = model(x)
    F.cross_entropy(out, y).backward()
    found = {f"gradient of {name}": whole(parameter.grad) for name, parameter in model.named_parameters()}
    optimizer.step()
    return found | {"out": whole(out)} | {name: whole(p) for name, p in model.named_parameters()}


def check(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def check_shared_images(model: nn.Module, prefix: str = "") -> None:
    """A step of a model of which each of two processes has half of the images, and averages gradients."""
    x, y = images()
    half = slice(2 * get_rank(), 2 * get_rank() + 2)
    expected = train(timm_model(), x, y)
    expected["out"] = expected["out"][half]
    check({name.replace(prefix, ""): value for name, value in train(model, x[half], y[half]).items()}, expected)


def attended(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of the queries that go to a backend in a call of the model: none where the map is built."""
    shapes, real = [], gpsa.gpsa_attention

    def spy(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        assert type(q) is Tensor
        shapes.append(tuple(q.shape))
        return real(q, *arguments, **options)

    gpsa.gpsa_attention = spy  # type: ignore[assignment]
    try:
        model(x)
    finally:
        gpsa.gpsa_attention = real
    return shapes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pair = Ranks(2, tmp_path_factory.mktemp("two"))
    yield pair
    pair.close()


PARTS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "linear layers": lambda model: [each for each in model.modules() if isinstance(each, nn.Linear)],
    "attention layers": lambda model: [block.attn for block in model.blocks],  # type: ignore[union-attr]
    "blocks": lambda model: list(model.blocks),  # type: ignore[arg-type]
    "the model alone": lambda model: [],
}


def fully_sharded(make: str, part: str) -> list[tuple[int, ...]]:
    model = MODELS[make]()
    for each in PARTS[part](model):
        fully_shard(each)
    check_shared_images(fully_shard(model))
    return attended(model, images()[0])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.situation(
    "Distributed",
    "FSDP2, `fully_shard` on each linear layer, each attention layer, each block, or the model alone",
    timm="as in one process",
    ours="the same; by the fast backends, but where `pos_proj` is sharded by itself",
)
def test_fsdp2_trains_as_one_process_does(ranks, make, part):
    shapes, _ = ranks.run(fully_sharded, make, part)
    assert shapes == ([] if part == "linear layers" else [(4, 4, 16, 8)] * 2)


def sharded_without_values() -> None:
    with torch.device("meta"):
        model = ck.models.ConViT(embed_dim=32, num_classes=5, **SIZES)
    for each in [*model.blocks, model]:
        fully_shard(each)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="shared by several processes, a DTensor: set initial values before"):
        model.blocks[0].attn.reset_parameters()
    set_model_state_dict(model, timm_model().state_dict(), options=WHOLE)
    check_shared_images(model)


def test_fsdp2_of_a_model_that_gets_its_values_afterwards(ranks):
    ranks.run(sharded_without_values)


def replicated(make: str) -> None:
    check_shared_images(DistributedDataParallel(MODELS[make]()), prefix="module.")


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.situation(
    "Distributed",
    "`DistributedDataParallel`, without `find_unused_parameters`",
    timm="as in one process",
    ours="the same",
)
def test_data_parallel_trains_as_one_process_does(ranks, make):
    ranks.run(replicated, make)


HEADS = {"blocks.*.attn": ck.parallel.ShardHeads()}
MLPS = {"blocks.*.mlp.fc1": ColwiseParallel(), "blocks.*.mlp.fc2": RowwiseParallel()}


def by_heads(make: str, plan: dict[str, Any], frozen: str) -> list[tuple[int, ...]]:
    expected_model, model = timm_model(), MODELS[make]()
    for each in (expected_model, model):
        each.get_parameter(frozen).requires_grad_(False)
        each.get_parameter(frozen).grad = torch.zeros_like(each.get_parameter(frozen))
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    assert not model.get_parameter(frozen).requires_grad
    model.get_parameter(frozen).grad = torch.zeros_like(model.get_parameter(frozen))
    assert model.state_dict().keys() == expected_model.state_dict().keys()
    state = get_model_state_dict(model, options=WHOLE)
    torch.testing.assert_close(state, dict(timm_model().state_dict()), rtol=0, atol=0)

    x, y = images()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    check(train(model, mine, y), train(expected_model, theirs, y))
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    set_model_state_dict(model, timm_model().state_dict(), options=WHOLE)  # the old values
    torch.testing.assert_close(model(x), timm_model()(x), rtol=1e-4, atol=1e-6)
    return attended(model, x)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("plan", [HEADS, HEADS | MLPS], ids=["heads", "heads and MLPs"])
@pytest.mark.situation(
    "Distributed",
    "tensor parallelism: heads shared by the ranks of a mesh",
    timm="no plan of PyTorch's fits: `ColwiseParallel` gives one rank the queries and another the keys",
    ours="`parallel.ShardHeads()`, each rank's heads by the fast backends; a `state_dict` in the usual form",
)
def test_heads_on_two_ranks_train_as_one_process_does(ranks, make, plan):
    shapes, _ = ranks.run(by_heads, make, plan, "blocks.1.attn.v.weight")
    assert shapes == [(4, 2, 16, 8)] * 2


def with_hook() -> nn.Module:
    layer = ck.GPSA(32, 4)
    layer.pos_proj.register_forward_hook(lambda module, inputs, output: output)
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "timm's": (lambda: timm_model().blocks[0].attn, TypeError, "not a timm.models.convit.GPSA: call replace_gpsa"),
    "another": (lambda: nn.Linear(4, 4), TypeError, "not a torch.nn.modules.linear.Linear"),
    "three heads": (lambda: ck.GPSA(30, 3), ValueError, r"3 heads cannot be shared equally by a mesh of shape \(2,\)"),
    "hooked": (with_hook, TypeError, "the layer's pos_proj has hooks: shard its heads first"),
}


def refused(case: str) -> None:
    make, error, text = REFUSED[case]
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match=text):
        parallelize_module(layer, init_device_mesh("cpu", (2,)), ck.parallel.ShardHeads())
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_whose_heads_cannot_be_shared_is_refused_and_left_as_it_was(ranks, case):
    ranks.run(refused, case)


def by_rows_of_qk(by_hand: bool) -> None:
    model = replaced()
    layer, mesh, rows = model.blocks[0].attn, init_device_mesh("cpu", (2,)), slice(2 * get_rank(), 2 * get_rank() + 2)
    parallelize_module(layer.qk, mesh, ColwiseParallel())
    theirs = parallelize_module(timm_model(), mesh, {"blocks.0.attn.qk": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"shape .* is invalid"):
        theirs(images()[0])
    if by_hand:  # the rest as if rank 0 had the first two heads
        layer.dim, layer.num_heads, rows = (
            layer.dim // 2,
            layer.num_heads // 2,
            slice(2 * get_rank(), 2 * get_rank() + 2),
        )
        parallelize_module(layer, mesh, {"v": ColwiseParallel(), "proj": RowwiseParallel()})
        layer.gating_param = nn.Parameter(layer.gating_param[rows].detach())
        layer.pos_proj.weight, layer.pos_proj.bias = (
            nn.Parameter(each[rows].detach()) for each in (layer.pos_proj.weight, layer.pos_proj.bias)
        )
    with pytest.raises(RuntimeError, match=r"qk gave 32 of its 64 channels, .*parallel\.ShardHeads"):
        model(images()[0])


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.situation(
    "Distributed",
    "`ColwiseParallel` on `qk`, which gives one rank the queries and another the keys",
    timm="an error of shapes",
    ours="an error that names `ShardHeads`, also where the rest of the layer was cut to fit",
)
def test_queries_on_one_rank_and_keys_on_another_are_no_attention(ranks, by_hand):
    ranks.run(by_rows_of_qk, by_hand)


def by_heads_and_images() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("images", "heads"))
    model = replaced()
    parallelize_module(model, mesh["heads"], HEADS | MLPS)
    for each in [*model.blocks, model]:
        fully_shard(each, mesh=mesh["images"])
    x, y = images()
    half = slice(2 * mesh.get_local_rank("images"), 2 * mesh.get_local_rank("images") + 2)
    expected = train(timm_model(), x, y)
    expected["out"] = expected["out"][half]
    check(train(model, x[half], y[half]), expected)
    state = get_model_state_dict(model, options=WHOLE)
    check(state, {name: expected[name] for name in state})


def test_heads_by_one_dimension_of_a_mesh_and_fsdp2_by_the_other(tmp_path):
    four = Ranks(4, tmp_path)
    try:
        four.run(by_heads_and_images)
    finally:
        four.close()
