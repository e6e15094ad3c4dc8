"""`replace_gpsa`: makes an existing model faster in place."""

import warnings

from torch import nn

from .attention import check_backend
from .gpsa import GPSA, adopt, is_foreign, kind_of


def replace_gpsa(model: nn.Module, *, backend: str | None = None) -> int:
    """Swaps every reference GPSA layer inside a model for `convit_kernels.GPSA`, in place.

    Recognises the classes of facebookresearch/convit, timm, DyTox and VISSL, and those with separate q, k and v; also
    copies of them in other projects, when a copy of the layer with random parameters gives what ours gives. The outputs
    stay the same; parameters are the same objects (an optimizer made before goes on working), and training mode,
    device, dtype, hooks, buffers and state_dict keys are kept. DyTox's layer returns None in place of its attention
    map.

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
    kinds: dict[nn.Module, type[GPSA]] = {}
    reasons = []
    for name, module in model.named_modules():
        if is_foreign(module):
            try:
                kinds[module] = kind_of(module)
            except TypeError as error:
                reasons.append(f"{name} ({type(module).__name__}): {error}")
    if reasons:
        raise TypeError(
            f"these layers cannot be replaced exactly, and nothing was: {'; '.join(reasons)}. "
            "Others can be one by one, with GPSA.from_module(layer)"
        )
    if not kinds:
        present = sum(isinstance(module, GPSA) for module in model.modules())
        already = f" ({present} already are convit_kernels layers)" if present else ""
        warnings.warn(f"{type(model).__name__} contains no reference GPSA layer{already}", UserWarning, stacklevel=2)
    replacements = {module: adopt(module, kind, backend) for module, kind in kinds.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children would pass over a second name of one layer
            if child in replacements:
                setattr(parent, name, replacements[child])
    for old, new in replacements.items():  # the layer is gone, so its dictionary is free for the hooks bound anew
        hooks = old._load_state_dict_pre_hooks
        hooks.update(new._load_state_dict_pre_hooks)
        new._load_state_dict_pre_hooks = hooks
    return len(replacements)
