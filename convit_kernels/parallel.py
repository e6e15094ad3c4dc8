"""Tensor parallelism: the heads of a GPSA layer, shared by the ranks of a device mesh.

PyTorch's own styles shard neighbouring rows of a weight. Those of `qk` are all queries and then all keys, so that of
two ranks one would get the queries and the other the keys; and no style reaches the gates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from .foreign import looks_like_gpsa
from .gpsa import GPSA
from .linear import why_not_plain

__all__ = ["ShardHeads"]


class ShardHeads(ParallelStyle):
    """Gives each rank of a mesh an equal share of a GPSA layer's heads, for `parallelize_module`.

        parallelize_module(model, mesh, {"blocks.*.attn": ShardHeads()})

    The tokens come in whole on every rank, and the output leaves whole. Each rank computes the attention of its heads
    by the backend that the layer would take without sharding. Parameters become DTensors of their old names and shapes:
    of `qk`, `v`, `pos_proj` and the gates each rank holds a part of the rows, of `proj` a part of the columns.
    A forward pass gathers `qk.weight`, whose rows are not in the order of the heads, and sums the output over the
    ranks; a backward pass sums the gradient of the tokens.

    Attention layers without position, which have `num_heads` and no gate, stay as they are, whole on every rank. Where
    dropout is used, seed every rank alike: what is whole must be dropped alike.

    Raises:
        TypeError: from `parallelize_module`, for another layer than `convit_kernels.GPSA`, or one whose linear layers
            have hooks or are of another class.
        ValueError: from `parallelize_module`, where the mesh has not one dimension, or its ranks cannot have equally
            many heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not looks_like_gpsa(module) and hasattr(module, "num_heads"):
            return module
        if type(module) is not GPSA or not module.variant.has_the_reference_s_parameters:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(
                f"ShardHeads takes layers of convit_kernels.GPSA itself, each once, not a {kind}: call replace_gpsa "
                "first, or leave it out of the plan"
            )
        if further := set(module._parameters) - {"gating_param"}:
            raise TypeError(f"the layer has {', '.join(further)}, not known to be by heads: leave it out of the plan")
        for name in (*_projections(module), "pos_proj", "proj"):
            if why := why_not_plain(getattr(module, name), nn.Linear):
                raise TypeError(f"the layer's {name} {why}: shard its heads first, and change it then")
        ranks = device_mesh.size()
        if device_mesh.ndim != 1 or module.num_heads % ranks:
            raise ValueError(
                f"{module.num_heads} heads cannot be shared equally by a mesh of shape {tuple(device_mesh.shape)}: "
                "take a mesh of one dimension, whose size divides the number of heads"
            )
        for layer, name, _ in _by_rows(module):
            parameter = layer._parameters[name]
            assert parameter is not None
            sharded = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            layer._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
        parallelize_module(module.proj, device_mesh, RowwiseParallel(), src_data_rank=self.src_data_rank)
        module.dim, module.num_heads = module.dim // ranks, module.num_heads // ranks
        module.__class__ = _HeadsOfARank
        return module


class _HeadsOfARank(GPSA):
    """A layer whose dim and num_heads are those of one rank, and whose parameters are DTensors between calls."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _local(self) as mesh:
            # whole and the same everywhere; its gradient is a sum over what each rank's heads made of it
            whole = DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            return super().forward(whole, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, on each rank"


def _projections(layer: GPSA) -> list[str]:
    """The names of its linear layers for queries, keys and values: a letter for each."""
    return [name for name in ("qkv", "qk", "q", "k", "v") if name in layer._modules]


def _by_rows(layer: GPSA) -> list[tuple[nn.Module, str, int]]:
    """The parameters with rows for each head: their owner, name, and how many such sets of rows they have in turn."""
    owners = {"pos_proj": 1} | {name: len(name) for name in _projections(layer)}
    found: list[tuple[nn.Module, str, int]] = [(layer, "gating_param", 1)]
    for child, sets in owners.items():
        owner = getattr(layer, child)
        found += [(owner, name, sets) for name, _ in owner.named_parameters()]
    return found


@contextmanager
def _local(layer: GPSA) -> Iterator[DeviceMesh]:
    """The rows of this rank's heads as the layer's parameters, differentiable; gives the mesh."""
    held = [(owner, name, sets, cast(DTensor, owner._parameters[name])) for owner, name, sets in _by_rows(layer)]
    try:
        for owner, name, sets, parameter in held:
            owner._parameters[name] = _of_own_heads(parameter, sets)  # type: ignore[assignment]  # no leaf
        yield held[0][3].device_mesh
    finally:
        for owner, name, _, parameter in held:
            owner._parameters[name] = parameter  # type: ignore[assignment]  # a DTensor that is an nn.Parameter


def _of_own_heads(parameter: DTensor, sets: int) -> Tensor:
    """(rows, ...), sharded by rows -> this rank's share of each set of rows."""
    if sets == 1:
        return parameter.to_local()
    by_set = cast(DTensor, parameter.redistribute(placements=[Replicate()]).unflatten(0, (sets, -1)))
    return by_set.redistribute(placements=[Shard(1)]).to_local().flatten(0, 1)
