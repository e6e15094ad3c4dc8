"""`gpsa_attention`: checks what it is given, chooses a backend, calls it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .backends import composite, cpu, reference, triton
from .grid import GridSize
from .inputs import Inputs, checked
from .key_mask import divided, folded

NO_SCRIPT = (
    "torch.jit.script cannot compile the code of convit_kernels: take torch.compile, or torch.export or "
    "torch.jit.trace for a program that runs without it"
)


class Backend(NamedTuple):
    """One way to compute the attention: its name, whether it can run here, and if not the reason."""

    name: str
    available: bool
    reason: str


class _Entry(NamedTuple):
    attention: Callable[[Inputs], Tensor]
    why_not: Callable[[Inputs | None], str]  # "" when it can run: on those inputs, or on this machine at all for None
    why_later: Callable[[Inputs], str] = lambda inputs: ""  # "" but where backend=None should rather take the next
    masks_keys: bool = False  # whether it takes inputs with a key mask as they are


# fastest first: backend=None takes the first that can run and does not itself come later
_BACKENDS: dict[str, _Entry] = {
    "triton": _Entry(triton.attention, triton.why_not, triton.why_later),
    "cpu": _Entry(cpu.attention, cpu.why_not, cpu.why_later),
    "composite": _Entry(composite.attention, composite.why_not),
    "reference": _Entry(reference.attention, reference.why_not, masks_keys=True),
}


def backends() -> list[Backend]:
    """Every backend, fastest first: its name, whether it can run on this machine, and the reason where it cannot."""
    reasons = {name: why_not(name) for name in _BACKENDS}
    return [Backend(name, not reason, reason) for name, reason in reasons.items()]


def why_not(name: str, inputs: Inputs | None = None) -> str:
    """Why a backend cannot compute from these inputs, or for None, run on this machine at all; "" when it can."""
    return _BACKENDS[name].why_not(inputs)


def _check_name(name: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}: allowed are None (the fastest that can run) and {list(_BACKENDS)}")


def check_backend(name: str | None) -> None:
    """Raises ValueError for a name that is no backend, RuntimeError for one that cannot run on this machine."""
    if name is None:
        return
    _check_name(name)
    if reason := why_not(name):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")


def fastest(inputs: Inputs) -> str:
    """The name of the backend that backend=None takes."""
    return next(name for name, entry in _BACKENDS.items() if not entry.why_not(inputs) and not entry.why_later(inputs))


def _choose(name: str | None, inputs: Inputs) -> _Entry:
    if name is None:
        return _BACKENDS[fastest(inputs)]
    _check_name(name)
    if reason := why_not(name, inputs):
        check_backend(name)  # of a machine that cannot there is more to say than of these inputs
        raise RuntimeError(
            f"backend {name!r} cannot do this: {reason}. backend=None would take {fastest(inputs)!r} here"
        )
    return _BACKENDS[name]


def gpsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    *,
    grid_size: GridSize = None,
    spacing: float | Sequence[float] = 1.0,
    key_mask: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Gated positional self-attention (arXiv 2103.10697, equation 7) of tokens on a grid.

    out = A v,  A = (1 - g) * softmax(scale * q k^T) + g * softmax_j(w . (dx, dy, dx^2 + dy^2)),  g = sigmoid(gate)

    On a line the features are (dx, dx^2), in space (dx, dy, dz, dx^2 + dy^2 + dz^2).

    Args:
        q, k, v: (B, H, N, D) in float16, bfloat16, float32 or float64, any strides; N tokens in row-major order.
        pos_weight: (H, 3), the reference layer's `pos_proj.weight`; (H, 2) on a line and (H, 4) in space.
        gate: (H,), the raw gating parameter, before the sigmoid.
        grid_size: (height, width) with height * width == N, one int for a square grid, or None: square; (N,) is a line
            and (depth, height, width) in space.
        spacing: the distance between neighbours, in the unit that pos_weight is for: one number, or one for each side
            of the grid. Three axes, and two of different spacing, only "composite" and "reference" have.
        key_mask: (B, N), or (N,) for all images, bool or floating-point: A is multiplied by it, key by key, and each of
            its rows then divided by its sum, which makes NaN of a row without a key. Exact, and no map is built.
        scale: of the content logits; default D ** -0.5. A tensor of a shape that broadcasts to (B, H, N, 1), one factor
            or one a head for example, is rounded to q's dtype and gets its gradient.
        dropout_p: probability that an entry of the mixed map A is dropped, in [0, 1). The other entries grow by
            1 / (1 - dropout_p). Only "reference" and "triton" have it, each with a mask of its own, and with a
            key_mask only "reference".
        backend: a name from `backends()`; None chooses the fastest that can run.

    Returns:
        (B, H, N, D) in q's dtype. Every backend has derivatives backwards of any order, those after the first in plain
        PyTorch; backend=None finds one for forward-mode differentiation and torch.func by itself.

    Raises:
        TypeError: something is no dense floating-point tensor or no number, or q, k and v differ in dtype.
        ValueError: shapes, devices, grid, scale, dropout_p or the backend's name do not fit; the text says what does.
        RuntimeError: the backend asked for cannot run on this machine, or cannot do what is asked, dropout for example;
            the text says why, and what backend=None would take.
        NotImplementedError: in a second backward pass through "triton" with dropout.
    """
    inputs = checked(q, k, v, pos_weight, gate, grid_size, scale, dropout_p, spacing, key_mask)
    entry = _choose(backend, inputs)
    if key_mask is None or entry.masks_keys:
        return entry.attention(inputs)
    return divided(entry.attention(folded(inputs)))


gpsa_attention.__script_unsupported = NO_SCRIPT  # type: ignore[attr-defined]  # which torch.jit.script raises
