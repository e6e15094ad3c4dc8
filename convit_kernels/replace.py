"""`replace_gpsa`: makes an existing model faster in place."""

import math
import warnings
from collections.abc import Sequence

from torch import nn

from .attention import check_backend
from .gpsa import GPSA, adopt, is_foreign, variant_of
from .variants import Variant


def _grid_of(module: object) -> tuple[int, ...] | None:
    """The patch grid that a module says it makes, where the number of its patches is no square."""
    grid = getattr(module, "grid_size", None)
    if grid is None:  # as in the official PatchEmbed
        sizes = getattr(module, "img_size", None), getattr(module, "patch_size", None)
        if all(isinstance(size, Sequence) and len(size) == 2 for size in sizes):
            grid = [side // patch for side, patch in zip(*sizes, strict=True)]  # type: ignore[arg-type]
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) for side in grid):
        return None
    return None if math.isqrt(math.prod(grid)) ** 2 == math.prod(grid) else tuple(grid)


def _grids(model: nn.Module) -> dict[nn.Module, tuple[int, ...]]:
    """For each module within a model the patch grid that the nearest module around it says, its own or a child's.

    Only where the number of patches is no square: elsewhere the reference takes the square grid.
    """
    found: dict[nn.Module, tuple[int, ...]] = {}

    def visit(module: nn.Module, grid: tuple[int, ...] | None) -> None:
        said = {each for part in (module, *module.children()) if (each := _grid_of(part)) is not None}
        grid = said.pop() if len(said) == 1 else grid if not said else None
        if grid is not None:
            found[module] = grid
        for child in module.children():
            visit(child, grid)

    visit(model, None)
    return found


def replace_gpsa(model: nn.Module, *, backend: str | None = None) -> int:
    """Swaps every reference GPSA layer inside a model for `convit_kernels.GPSA`, in place.

    Recognises the classes of facebookresearch/convit, timm and other projects by their parts, when a copy of the layer
    with random parameters gives what ours gives. The outputs stay the same; parameters are the same objects (an
    optimizer made before goes on working), and training mode, device, dtype, hooks, buffers and state_dict keys are
    kept. A layer that always returns its attention map, as DyTox's, returns None in its place unless its
    `return_attention` is set to True. Where the model tells a patch grid of no square number of patches, it is taken.

    Args:
        model: any module that contains GPSA layers; ConViT's attention layers without position are left alone.
        backend: a name from `convit_kernels.backends()`; None chooses the fastest that can run.

    Returns:
        How many layers were swapped. 0, with a warning, when there are none.

    Raises:
        TypeError: the model itself is a GPSA layer (use `GPSA.from_module`), or a layer's mathematics differs from the
            reference's, its class overrides methods of another GPSA, or it holds more than the reference (a parameter,
            a child, a patched method); the text names it and says in what. Nothing has been swapped then.
        ValueError, RuntimeError: the backend is unknown, or cannot run on this machine.
    """
    if is_foreign(model):
        raise TypeError(
            "the model is itself a GPSA layer, which cannot be swapped in place: use GPSA.from_module(layer)"
        )
    check_backend(backend)
    variants: dict[nn.Module, Variant] = {}
    reasons = []
    for name, module in model.named_modules():
        if is_foreign(module):
            try:
                variants[module] = variant_of(module)
            except TypeError as error:
                reasons.append(f"{name} ({type(module).__name__}): {error}")
    if reasons:
        raise TypeError(
            f"these layers cannot be replaced exactly, and nothing was: {'; '.join(reasons)}. "
            "Others can be one by one, with GPSA.from_module(layer)"
        )
    if not variants:
        present = sum(isinstance(module, GPSA) for module in model.modules())
        already = f" ({present} already are convit_kernels layers)" if present else ""
        warnings.warn(f"{type(model).__name__} contains no reference GPSA layer{already}", UserWarning, stacklevel=2)
    replacements = {module: adopt(module, variant, backend) for module, variant in variants.items()}
    grids = _grids(model)
    for old, new in replacements.items():
        new.expected_grid = new.expected_grid or grids.get(old)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children would pass over a second name of one layer
            if child in replacements:
                setattr(parent, name, replacements[child])
    for old, new in replacements.items():  # the layer is gone, so its dictionary is free for the hooks bound anew
        hooks = old._load_state_dict_pre_hooks
        hooks.update(new._load_state_dict_pre_hooks)
        new._load_state_dict_pre_hooks = hooks
    return len(replacements)
