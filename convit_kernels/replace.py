"""`replace_gpsa`: makes an existing model faster in place."""

import warnings

from torch import nn

from .foreign import why_not
from .gpsa import GPSA, is_foreign


def replace_gpsa(model: nn.Module, *, backend: str | None = None) -> int:
    """Swaps every reference GPSA layer inside a model for `convit_kernels.GPSA`, in place.

    Recognises the classes of facebookresearch/convit, timm, DyTox and VISSL, and those with separate q, k and v. The
    outputs stay the same; parameters are the same objects (an optimizer made before goes on working), and training
    mode, device, dtype, hooks and state_dict keys are kept. DyTox's layer returns None in place of its attention map.

    Args:
        model: any module that contains GPSA layers; ConViT's attention layers without position are left alone.
        backend: a name from `convit_kernels.backends()`; None chooses the fastest that can run.

    Returns:
        How many layers were swapped. 0, with a warning, when there are none.

    Raises:
        TypeError: the model itself is a GPSA layer (use `GPSA.from_module`), or a layer's mathematics differs from the
            reference's; the text names it and says in what. Nothing has been swapped then.
        ValueError, RuntimeError: the backend is unknown, or cannot run on this machine.
    """
    if is_foreign(model):
        raise TypeError(
            "the model is itself a GPSA layer, which cannot be swapped in place: use GPSA.from_module(layer)"
        )
    found = {name: module for name, module in model.named_modules() if is_foreign(module)}
    reasons = [f"{name} ({type(module).__name__}): {why}" for name, module in found.items() if (why := why_not(module))]
    if reasons:
        raise TypeError("these layers cannot be replaced exactly, and nothing was: " + "; ".join(reasons))
    if not found:
        present = sum(isinstance(module, GPSA) for module in model.modules())
        already = f" ({present} already are convit_kernels layers)" if present else ""
        warnings.warn(f"{type(model).__name__} contains no reference GPSA layer{already}", UserWarning, stacklevel=2)
    replacements = {module: GPSA.from_module(module, backend=backend) for module in found.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children would pass over a second name of one layer
            if child in replacements:
                setattr(parent, name, replacements[child])
    return len(replacements)
