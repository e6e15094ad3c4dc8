"""Tensor parallelism: the heads of a GPSA layer, shared by the ranks of a device mesh.

PyTorch's own styles shard neighbouring rows of a weight. Those of `qk` are all queries and then all keys, so that of
two ranks one would get the queries and the other the keys; and no style reaches the gates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from .foreign import looks_like_gpsa
from .gpsa import GPSA
from .grid import GridSize
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
        for name in ("qk", "v", "proj", "pos_proj"):
            if why := why_not_plain(getattr(module, name), nn.Linear):
                raise TypeError(f"the layer's {name} {why}: shard its heads first, and change it then")
        ranks = device_mesh.size()
        if device_mesh.ndim != 1 or module.num_heads % ranks:
            raise ValueError(
                f"{module.num_heads} heads cannot be shared equally by a mesh of shape {tuple(device_mesh.shape)}: "
                "take a mesh of one dimension, whose size divides the number of heads"
            )
        for layer, name in _by_rows(module):
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

    def forward(self, x: Tensor, grid_size: GridSize = None, *, key_mask: Tensor | None = None) -> Tensor:
        with _local(self) as mesh:
            # whole and the same everywhere; its gradient is a sum over what each rank's heads made of it
            whole = DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
            return super().forward(whole, grid_size, key_mask=key_mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, on each rank"


def _by_rows(layer: GPSA) -> list[tuple[nn.Module, str]]:
    """The parameters with a row, or several, for each head."""
    owners = (layer.qk, layer.v, layer.pos_proj)
    return [(layer, "gating_param")] + [(each, name) for each in owners for name, p in each.named_parameters()]


@contextmanager
def _local(layer: GPSA) -> Iterator[DeviceMesh]:
    """The rows of this rank's heads as the layer's parameters, differentiable; gives the mesh."""
    held = [(owner, name, cast(DTensor, owner._parameters[name])) for owner, name in _by_rows(layer)]
    try:
        for owner, name, parameter in held:
            rows = _of_own_heads(parameter) if owner is layer.qk else parameter.to_local()
            owner._parameters[name] = rows  # type: ignore[assignment]  # no leaf, so no nn.Parameter
        yield held[0][2].device_mesh
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter  # type: ignore[assignment]  # a DTensor that is an nn.Parameter


def _of_own_heads(parameter: DTensor) -> Tensor:
    """(2 dim, ...), sharded anyhow -> the rows of this rank's queries, then those of its keys."""
    queries_and_keys = parameter.redistribute(placements=[Replicate()]).unflatten(0, (2, -1))
    return cast(DTensor, queries_and_keys).redistribute(placements=[Shard(1)]).to_local().flatten(0, 1)
