"""When a result counts as right: the eager formula of the reference layer, and how far rounding may move its results.

The rule is flash-attention's, made independent of the processor: an error against float64 may be at most twice that
of the eager reference in the same dtype. Eager's own error is one draw of its rounding: another order of summation,
another width of vectors, another number of threads draws again, and twice a lucky draw bounds nothing. So what is
doubled is the largest of several draws: eager's own and simulated ones.

A simulated draw is the formula in float64, where each operation's result is moved, up or down at random, by the most
that rounding can move it:

- u |result| for storing it, u the unit roundoff of the dtype;
- w sqrt(n (s^2 / 3 + q / 6)) where it is a sum s of n terms, as of a matrix product, w the unit roundoff of what is
  added up in (float32 for half precision), q the sum of the terms' squares: that is w times the root of the sum of
  the squares of all partial sums, on average over the orders of adding up, and far above w |s| where terms cancel.
  All n terms count: libraries add long sums up in blocks, but not always;
- for the gradients of a layer norm's weight and bias on the CPU, sums over all rows: added up one row after another in
  the dtype itself, as PyTorch does there. In half precision many terms of one sign are lost, which is no random error;
- (e + sum P e) P for a softmax's gradient P (dP - sum P dP), where e is u |dP| and, if dP is a product, what adding it
  up may do: a fused backward finds the two parts apart, so that they share no error that would cancel;
- for the softmax P of content, in one direction for a row, w |lse| P and what those sums do to its logits, where a
  backward finds P anew, from logits that it adds up once more and the log-sum-exp of the forward's: PyTorch's fused
  attention does. The kernels of this package do not need it (`recomputed=False`), and their tests do without.

Why it holds on any processor: an implementation of the formula, in whatever order it adds up, is a sequence of
roundings of these sizes, carried on by the same derivatives to first order. Their signs depend on the machine, their
sizes do not. The simulation takes each as large as it can be, real ones are spread evenly below that: the largest of
several simulations is above what a real implementation shows, and the rule doubles it.

What it still catches: all that is no rounding. In float32 a result may be off by some millionths of its largest value;
a wrong sign, scale, border, axis, gate or mask changes it by a thousandth and more. The tests plant such faults in the
kernels and hold that each is noticed.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

DRAWS = 4
NAMES = ("out", "dq", "dk", "dv", "d_pos_weight", "d_gate")

Results = Mapping[str, Tensor | None]


def relative_indices(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(1, N, N, 3), dx, dy and dx^2 + dy^2 from query to key on a (height, width) grid, in like's dtype and device."""
    token = torch.arange(grid[0] * grid[1], device=like.device)
    x, y = token % grid[1], token // grid[1]
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    return torch.stack((dx, dy, dx**2 + dy**2), dim=-1)[None].to(like.dtype)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    rel_indices: Tensor,
    scale: float,
    *,
    keep: Tensor | None = None,
    renormalise: bool = True,
) -> Tensor:
    """The attention of the reference layer (timm.models.convit.GPSA), operation by operation in the inputs' own dtype.

    Args:
        q, k, v: (B, H, N, D); pos_weight: (H, 3); gate: (H,); all of one dtype.
        rel_indices: (1, N, N, 3), see `relative_indices`.
        scale: of the content logits.
        keep: (B, H, N, N), what the mixed map is multiplied by: a dropout's mask over its probability to keep.
        renormalise: divide the mixed map by its rows' sums, as the reference does: of 1, so it only removes rounding.

    Returns:
        (B, H, N, D).
    """
    position = F.linear(rel_indices.expand(q.shape[0], -1, -1, -1), pos_weight).permute(0, 3, 1, 2)
    content = (q @ k.transpose(-2, -1)) * scale
    content, position = content.softmax(dim=-1), position.softmax(dim=-1)
    gating = torch.sigmoid(gate.view(1, -1, 1, 1))
    mixed = (1.0 - gating) * content + gating * position
    if renormalise:
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
    return (mixed if keep is None else mixed * keep) @ v


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor, names: Sequence[str] = NAMES
) -> dict[str, Tensor]:
    """The output of function(*inputs) and its gradients, for the gradient d_out of the output, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return dict(zip(names, (out.detach(), *torch.autograd.grad(out, leaves, d_out)), strict=True))


class Expected(NamedTuple):
    """A result in float64, eager's largest error in some dtype, and the one that an implementation may have."""

    exact: Tensor
    eager_error: float
    allowed: float

    def error(self, found: Tensor) -> float:
        """The largest of an implementation's result; inf where it is not finite, or has another shape."""
        if found.shape != self.exact.shape or not torch.isfinite(found).all():
            return float("inf")
        return _largest(found.double() - self.exact)

    def share(self, found: Tensor) -> float:
        """The error as a part of what is allowed: right up to 1."""
        error = self.error(found)
        return error / self.allowed if self.allowed > 0 else (0.0 if error == 0 else float("inf"))


def expected(
    eager: Callable[[torch.dtype], Results],
    dtype: torch.dtype,
    *,
    implementation: Callable[[], Results] | None = None,
    recomputed: bool = True,
    draws: int = DRAWS,
) -> dict[str, Expected]:
    """What an implementation in `dtype` is held to.

    Args:
        eager: computes the reference's results, by name, in the dtype it is given, from the same values each time.
        dtype: float16, bfloat16 or float32; nothing here is more exact than float64.
        implementation: what is simulated: the same in float64 by the mathematics alone, without a step of eager's that
            only removes rounding. None: eager itself.
        recomputed: whether a backward may find the content's softmax anew from the log-sum-exp, as the module says.
        draws: simulations of eager's rounding; few do for results of many elements.
    """
    exact = eager(torch.float64)
    runs = [eager(dtype)]
    for seed in range(draws):
        with _Rounding(dtype, seed, recomputed):
            runs.append(implementation() if implementation else eager(torch.float64))
    found = {}
    for name, truth in exact.items():
        if truth is not None:
            errors = [_largest(run[name].double() - truth) for run in runs]  # type: ignore[union-attr]
            found[name] = Expected(truth, errors[0], 2 * max(errors))
    return found


def expected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    d_out: Tensor | None,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
    recomputed: bool = True,
    draws: int = DRAWS,
) -> dict[str, Expected]:
    """`expected` of `eager_attention` in q's dtype, and of its gradients unless d_out, that of the output, is None.

    Arguments as there; scale None is D ** -0.5.
    """

    def run(dtype: torch.dtype, renormalise: bool = True) -> dict[str, Tensor]:
        rel_indices = relative_indices(grid, q.new_empty(0, dtype=dtype))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        mask = None if keep is None else keep.to(dtype)

        def attention(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> Tensor:
            return eager_attention(q, k, v, pos_weight, gate, rel_indices, factor, keep=mask, renormalise=renormalise)

        inputs = [tensor.to(dtype) for tensor in (q, k, v, pos_weight, gate)]
        if d_out is None:
            return {"out": attention(*inputs)}
        return with_gradients(attention, inputs, d_out.to(dtype))

    return expected(run, q.dtype, implementation=lambda: run(torch.float64, False), recomputed=recomputed, draws=draws)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


_PRODUCTS = {"addmm", "baddbmm", "bmm", "convolution", "mm"}
# Results that are copies, selections or constants: nothing is rounded.
_EXACT = {
    *("_to_copy", "_unsafe_view", "abs", "arange", "cat", "clone", "constant_pad_nd", "copy_", "empty", "empty_like"),
    *("fill_", "full", "full_like", "index_select", "lift_fresh", "neg", "new_empty", "new_empty_strided", "new_ones"),
    *("new_zeros", "ones", "ones_like", "relu", "select_backward", "slice_backward", "stack", "where", "zero_"),
    *("zeros", "zeros_like"),
}


class _Rounding(TorchDispatchMode):
    """Moves each float64 result by the most that rounding to `dtype` can, in directions drawn from `seed`."""

    def __init__(self, dtype: torch.dtype, seed: int, recomputed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        wide = torch.promote_types(dtype, torch.float32)
        self._dtype = dtype
        self._store, self._accumulate = (torch.finfo(each).eps / 2 for each in (dtype, wide))
        self._smallest = torch.finfo(dtype).smallest_normal * self._store  # half a step between subnormal numbers
        self._recomputed = recomputed
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        # what adding up has done to products, and to their views and multiples: to a softmax's logits, to its gradient
        self._of_products: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        carried = self._of_products.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if func.is_view or name in _EXACT:
            if carried is not None and (func.is_view or name == "_unsafe_view"):
                self._of_products[result] = func(carried, *args[1:], **kwargs)
            return result
        size: Tensor | float = 0.0
        if name in _PRODUCTS:
            terms = args[1][0].numel() if name == "convolution" else args[-1].shape[-2]
            size = self._added_up(result, func(*tree_map_only(Tensor, torch.square, args), **kwargs), terms)
            if name == "bmm":  # a query by a key: logits of content, not of position
                self._of_products[result] = size
        elif name == "sum" and result.numel():
            squares = func(args[0].square(), *args[1:], **kwargs)
            size = self._added_up(result, squares, args[0].numel() // result.numel())
        elif name == "native_layer_norm_backward" and args[0].device.type == "cpu":
            d_out, x, shape, mean, rstd = args[:5]
            for total, terms in ((result[1], d_out * (x - mean) * rstd), (result[2], d_out)):
                if total is not None:
                    total.copy_(self._in_turn(terms.reshape(-1, *shape)))
        elif name == "mul" and carried is not None:
            self._of_products[result] = carried * args[1]
        elif name == "_softmax" and carried is not None and self._recomputed:
            lse = torch.logsumexp(args[0], args[1], keepdim=True)
            row = self._accumulate * lse.abs() + (result * carried.abs()).sum(args[1], keepdim=True)
            result.mul_(1 + row * self._directions(row))
        elif name == "_softmax_backward_data":
            p, dim = args[1:3]
            apart = self._store * args[0].abs() + (0.0 if carried is None else carried)
            size = p * (apart + (p * apart).sum(dim, keepdim=True))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                value.add_((value.abs() * self._store + self._smallest + size) * self._directions(value))
        return result

    def _directions(self, like: Tensor) -> Tensor:
        device = like.device  # drawing elsewhere would take longer than all else
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.randint(0, 2, like.shape, generator=self._generators[device], device=device) * 2 - 1

    def _in_turn(self, terms: Tensor) -> Tensor:
        """The sum over the first dimension as it comes out when each addition is rounded to the dtype."""
        total = terms.new_zeros(terms.shape[1:])
        for term in terms:
            total = (total + term).to(self._dtype).double()
        return total

    def _added_up(self, result: Tensor, squares: Tensor, terms: int) -> Tensor:
        """What adding up `terms` terms may do to their sum, given the sum of their squares."""
        return self._accumulate * (terms * (result.square() / 3 + squares / 6)).sqrt()
