"""Finding what a GPSA layer of another project does: a copy of it with random parameters is run beside ours.

What `pos_proj` of the copy is given says which grid and which features the layer knows, its outputs how it is called;
what is left are a few variants to try. The first that agrees in everything is the layer's.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from .foreign import DROPOUTS, GATES, feature_count, is_linear, is_own, projections, requests
from .variants import Variant, regular_grid

_BATCH = 2


class _Input(NamedTuple):
    """What a trial is run on: random tokens, or an image of as many channels, and what forward needs beside them."""

    x: Tensor
    further: dict[str, Any] = {}  # noqa: RUF012  # never changed


def find(module: nn.Module, adopt: Callable[[nn.Module, Variant], nn.Module]) -> Variant:
    """What a foreign layer does, which `foreign.why_not` has nothing against.

    Args:
        adopt: makes our layer of a foreign one and a variant.

    Raises:
        TypeError: ours does not do it; the text says in what the layer differs.
    """
    with _undisturbed():
        try:
            trial = _trial_copy(module)
        except Exception as error:  # attributes that cannot be copied
            raise TypeError(f"it cannot be copied for a trial ({type(error).__name__}: {error})") from error
        given, variant = _position(module, trial)
        variant = _call(trial, given, variant)
        reasons = []
        for inverted, masks_last in itertools.product((False, True), (False, True) if variant.mask else (False,)):
            tried = replace(variant, inverted=inverted, masks_last=masks_last)
            if not (reason := _difference(trial, adopt(trial, tried), tried, given)):
                return tried
            reasons.append(reason)
    raise TypeError(reasons[0])


def _trial_copy(module: nn.Module) -> nn.Module:
    """A layer of the same class on the CPU in float32, made without its constructor, sharing nothing with the module.

    To be called within `_undisturbed`. Its parameters are random, so that content, position and gate all matter; its
    children are plain linear layers and dropouts with p=0: what the module's own are makes no difference to what its
    class does with them.
    """
    attributes: Any = module
    dim, heads = int(attributes.dim), int(attributes.num_heads)
    # logits of a standard deviation of about 2, whatever the scale is
    scale = attributes.scale if isinstance(attributes.scale, (int, float)) else (dim // heads) ** -0.5
    content = (2 / max(abs(scale), 1e-6)) ** 0.5 * (dim // heads) ** -0.25
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, least: float, most: float) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape).uniform_(least, most, generator=generator))

    new: Any = object.__new__(type(module))
    nn.Module.__init__(new)
    for name, value in vars(module).items():
        if name not in vars(new) and not is_own(module, name):
            vars(new)[name] = _on_cpu(value) if isinstance(value, Tensor) else copy.deepcopy(value)
    for name, parameter in module._parameters.items():
        value = None if parameter is None else uniform(*parameter.shape, least=0.5, most=2)  # also where it is a scale
        new.register_parameter(name, value)
    for name, buffer in module._buffers.items():
        new.register_buffer(name, None if buffer is None else _on_cpu(buffer))
    for name in module._modules:
        if is_linear(name):
            inputs, outputs, gain = dim, dim, 1.0
            if name == "pos_proj":
                inputs, outputs, gain = feature_count(module), heads, 0.4 * dim**0.5
            elif name != "proj":
                outputs, gain = len(name) * dim, 1.0 if name == "v" else content
            most = gain * (3 / dim) ** 0.5
            layer = nn.Linear(inputs, outputs, device="meta")  # no values of its own
            layer.weight = uniform(outputs, inputs, least=-most, most=most)
            if name.endswith("v") and len(name) > 1:  # values as of a v alone
                with torch.no_grad():
                    layer.weight[-dim:] /= content
            layer.bias = uniform(outputs, least=-0.5, most=0.5)
            new.add_module(name, layer)
        elif name in DROPOUTS:
            new.add_module(name, nn.Dropout(0.0))
    return new  # type: ignore[no-any-return]


def _kept(module: nn.Module) -> Tensor | None:
    """The features of more than one token that a layer keeps for its next call, (N, N, features)."""
    kept = getattr(module, "rel_indices", None)
    return kept[0] if isinstance(kept, Tensor) and kept.dim() == 4 and kept.shape[1] > 1 else None


def _position(module: nn.Module, trial: nn.Module) -> tuple[_Input, Variant]:
    """An input on which a trial copy runs, and what it does with positions.

    Raises:
        TypeError: it runs on none, or positions are not those of a grid.
    """
    kept, attributes = _kept(module), vars(module)
    repeats = int(getattr(module, "locality_dim", 1))
    axes = min(max(feature_count(module) // repeats - 1, 1), 3)
    follows = "current_grid_size" in attributes
    if follows:
        grids = [(2, 4, 3)[:axes], (3, 2, 5)[:axes]] if axes > 1 else [(6,), (8,)]
    else:
        grids = [(side,) * axes for side in ((6, 8, 9) if axes == 1 else (3, 4, 5) if axes == 2 else (2, 3, 4))]
        grids = [grid for grid in grids if kept is None or math.prod(grid) != kept.shape[0]]
        if kept is not None:
            own = attributes.get("height", 0), attributes.get("width", 0)
            square = regular_grid(kept.shape[0], 2) or (1, kept.shape[0])
            # for a layer that keeps its features for ever
            grids.append(own if math.prod(own) == kept.shape[0] else square)
    found: list[tuple[_Input, tuple[int, ...], Variant, tuple[float, ...]]] = []
    errors: list[Exception] = []
    for grid in grids:
        probe: Any = copy.copy(trial)
        for name in ("_buffers", "_non_persistent_buffers_set"):  # positions made anew leave no trace in the copy
            vars(probe)[name] = copy.copy(vars(probe)[name])
        if follows:
            probe.current_grid_size = grid
        try:
            given, features = _first_run(probe, grid)
        except Exception as error:  # another project's code, which may fail in any way
            errors.append(error)
            continue
        fitted = _fit(features, axes, float(repeats))
        if fitted is None:
            raise TypeError(
                "its positional features are not (dx, dy, dx^2 + dy^2) of a grid, of one to three dimensions, key "
                "minus query or query minus key"
            )
        found.append((given, *fitted))
        if len(found) == 2:
            break
    if not found:
        needed = _needed(trial)
        if needed:
            raise TypeError(
                f"its forward takes {needed}, which is no key mask on the mixed map "
                f"({type(errors[0]).__name__}: {errors[0]})"
            )
        raise TypeError(f"on random tokens it fails to give outputs ({type(errors[0]).__name__}: {errors[0]})")
    given, grid, variant, steps = found[0]
    if len(found) == 1:  # it knows one grid alone
        variant = replace(variant, grid=grid)
    elif (law := _law(grid, steps, found[1][1], found[1][3])) is None or found[1][2].features != variant.features:
        raise TypeError("its positional features are scaled in a way that is not known here")
    else:
        divided, steps = law
        variant = replace(variant, divided=divided)
    variant = replace(variant, spacing=steps[0] if len(set(steps)) == 1 else steps)
    if kept is not None and not follows:
        variant = _with_kept(kept, variant)
    if follows:
        vars(trial)["current_grid_size"] = grid
    position: Any = trial._modules["pos_proj"]
    with torch.no_grad():  # the logits of a large grid must not be those of one key alone
        ends = _features(variant, grid, torch.tensor([0, math.prod(grid) - 1]))
        position.weight /= (ends.flatten(0, 1).abs().amax(0) / 8).clamp(min=1)
    return given, variant


def _first_run(probe: nn.Module, grid: tuple[int, ...]) -> tuple[_Input, Tensor]:
    """The first input of that grid on which a copy runs, and what it gives its `pos_proj`, (N, N, features)."""
    attributes: Any = probe
    seen: list[Tensor] = []
    handle = attributes.pos_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    needed = _needed(probe)
    errors: list[Exception] = []
    for x, masks in _shapes(attributes.dim, grid):
        for shape in masks if needed else ((),):
            given = _Input(x, {needed: torch.ones(shape, dtype=torch.bool)} if needed else {})
            try:
                _run(probe, given)
            except Exception as error:  # another project's code, which may fail in any way
                errors.append(error)
                seen.clear()
                continue
            handle.remove()
            if not seen:
                raise RuntimeError("it does not call pos_proj")
            return given, seen[-1].reshape(-1, *seen[-1].shape[-3:])[0].detach()
    handle.remove()
    raise errors[0]


def _shapes(dim: int, grid: tuple[int, ...]) -> Iterator[tuple[Tensor, list[tuple[int, ...]]]]:
    """Random tokens, then a random image, each with the shapes that a key mask for it may have."""
    tokens, generator = math.prod(grid), torch.Generator().manual_seed(1)
    x = torch.randn(_BATCH, tokens, dim, generator=generator)
    yield x, [(_BATCH, tokens), (_BATCH, 1, 1, tokens), (_BATCH, 1, tokens)]
    yield x.transpose(1, 2).unflatten(2, grid), [(_BATCH, 1, *grid), (_BATCH, *grid)]


def _needed(module: nn.Module) -> str | None:
    """The argument of a layer's forward, beside the first, without which it cannot be called; it may be a key mask."""
    mask, _ = requests(module)
    parameters = inspect.signature(type(module).forward).parameters
    return mask if mask and parameters[mask].default is inspect.Parameter.empty else None


def _offsets(grid: tuple[int, ...], rows: Tensor) -> Tensor:
    """(rows, N, axes) float64: the key's place minus the query's, the last axis first."""
    token, places = torch.arange(math.prod(grid)), []
    for side in reversed(grid):
        places.append(token % side)
        token = token // side
    place = torch.stack(places, dim=-1).double()
    return place[None] - place[rows][:, None]


def _features(variant: Variant, grid: tuple[int, ...], rows: Tensor) -> Tensor:
    """(rows, N, features) float64 that a layer of this variant gives its `pos_proj` for some queries."""
    offsets = _offsets(grid, rows) * torch.tensor(variant.steps(variant.spacing, grid)[::-1], dtype=torch.float64)
    return variant.given(torch.cat((offsets, offsets.square().sum(dim=-1, keepdim=True)), dim=-1))


def _are_features(features: Tensor, variant: Variant, grid: tuple[int, ...], rtol: float) -> bool:
    """Whether features, (N, N, F) on any device, are those of a variant on a grid of N tokens."""
    for rows in torch.arange(features.shape[0]).split(64):  # all at once would be gigabytes for large images
        expected = _features(variant, grid, rows)
        some = features[rows[0] : rows[-1] + 1].to("cpu", torch.float64)
        floor = 1e-5 * expected.abs().max().item()
        if some.shape != expected.shape or not torch.allclose(some, expected, rtol=rtol, atol=floor):
            return False
    return True


def _factorisations(tokens: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Grids of so many tokens with at least two along each axis."""
    if axes == 1:
        yield (tokens,)
        return
    for side in range(2, tokens // 2 + 1):
        if tokens % side == 0:
            yield from ((side, *rest) for rest in _factorisations(tokens // side, axes - 1) if min(rest) > 1)


def _near(value: float) -> float:
    """The simple fraction that a value computed in float32 stands for, if there is one."""
    simple = float(Fraction(value).limit_denominator(2000))
    return simple if math.isclose(simple, value, rel_tol=1e-5) else value


def _fit(features: Tensor, axes: int, divisor: float) -> tuple[tuple[int, ...], Variant, tuple[float, ...]] | None:
    """The grid, the variant and the spacing along each side by which features, (N, N, F), are what they are."""
    tokens, rows = features.shape[0], torch.tensor([0, features.shape[0] // 2, features.shape[0] - 1])
    some = torch.stack([features[row] for row in rows.tolist()]).to("cpu", torch.float64).flatten(0, 1)
    for grid in _factorisations(tokens, axes):
        offsets = _offsets(grid, rows).flatten(0, 1)
        design = torch.cat((offsets, offsets.square()), dim=1)
        factors = torch.linalg.lstsq(design, some).solution  # (2 axes, F)
        if not torch.allclose(design @ factors, some, rtol=1e-4, atol=1e-5 * some.abs().max().item()):
            continue
        if (read := _read(factors, axes)) is None:
            return None
        runs, steps = read
        plain = runs == tuple((index, 1.0, 1) for index in range(axes + 1)) and divisor == 1
        variant = Variant(axes=axes, features=None if plain else runs, divisor=divisor)
        return (grid, variant, steps) if _are_features(features, replace(variant, spacing=steps), grid, 1e-4) else None
    return None


def _read(factors: Tensor, axes: int) -> tuple[tuple[tuple[int, float, int], ...], tuple[float, ...]] | None:
    """The runs of features and the spacing along each side, from each feature's factors of offsets and their squares.

    Each feature has to be one offset, or the sum of all squares in a proportion that is the same for all such features.
    """
    factors = torch.where(factors.abs() > 1e-4 * factors.abs().max(), factors, 0)
    linear, squared = factors[:axes].T.tolist(), factors[axes:].T.tolist()
    steps: list[float | None] = [None] * axes
    sums = [each for each in squared if all(each)]
    if not sums:
        return None
    for offsets in linear:
        for axis, factor in enumerate(offsets):
            steps[axis] = steps[axis] or abs(factor) or None
    if None in steps:
        return None
    known = [_near(step) for step in steps if step is not None]
    shares = [value / step**2 for value, step in zip(sums[0], known, strict=True)]
    if max(shares) - min(shares) > 1e-4 * max(map(abs, shares)):  # offsets and distance are not of one scale
        if min(sums[0]) * max(sums[0]) <= 0:
            return None
        known = [_near((value / sums[0][0]) ** 0.5) for value in sums[0]]
    runs: list[tuple[int, float, int]] = []
    for offsets, squares in zip(linear, squared, strict=True):
        used = [axis for axis in range(axes) if offsets[axis]]
        if len(used) == 1 and not any(squares):
            index, factor = used[0], offsets[used[0]] / known[used[0]]
        elif not used and all(squares):
            index, ratios = axes, [value / step**2 for value, step in zip(squares, known, strict=True)]
            factor = ratios[0]
            if max(ratios) - min(ratios) > 1e-4 * abs(factor):
                return None
        else:
            return None
        factor = _near(factor)
        if runs and runs[-1][:2] == (index, factor):
            runs[-1] = (index, factor, runs[-1][2] + 1)
        else:
            runs.append((index, factor, 1))
    return tuple(runs), tuple(reversed(known))


def _law(
    grid: tuple[int, ...], steps: tuple[float, ...], other_grid: tuple[int, ...], other_steps: tuple[float, ...]
) -> tuple[Any, tuple[float, ...]] | None:
    """By what the spacing is divided, so that it is one for both grids, and that one; None if there is no such law."""
    for divided in (None, "ends", "sides"):
        less = divided == "ends"
        first, second = (
            steps_of if divided is None else tuple(s * (n - less) for s, n in zip(steps_of, sides, strict=True))
            for steps_of, sides in ((steps, grid), (other_steps, other_grid))
        )
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(first, second, strict=True)):
            return divided, tuple(map(_near, first))
    return None


def _with_kept(kept: Tensor, variant: Variant) -> Variant:
    """The variant, with the grid of the features that a layer keeps for its next call, were they put there by others.

    Raises:
        TypeError: they are those of no grid.
    """
    tokens = kept.shape[0]
    grid = variant.grid or regular_grid(tokens, variant.axes)
    # they may have been rounded to bfloat16 on the way
    if grid is not None and _are_features(kept, variant, grid, rtol=2**-8):
        return variant
    fitted = _fit(kept, variant.axes, variant.divisor)
    if fitted is not None:
        found, other, steps = fitted
        if other.features == variant.features and steps == variant.steps(variant.spacing, found):
            return replace(variant, grid=found)
    raise TypeError(
        f"its rel_indices of {tokens} tokens are not those of a grid: build convit_kernels.GPSA with "
        "grid_size=(height, width) and load this layer's state_dict into it"
    )


def _call(trial: nn.Module, given: _Input, variant: Variant) -> Variant:
    """The variant, with how the layer is called and what it gives."""
    attributes: Any = trial
    gate = next(name for name in GATES if name in trial._parameters)
    mask, request = requests(trial)
    parameters = list(inspect.signature(type(trial).forward).parameters)[2:]
    variant = replace(
        variant,
        projections=projections(trial),
        gate=gate,
        shaped_gate=attributes.get_parameter(gate).dim() != 1,
        images=given.x.dim() > 3,
        arguments=tuple(parameters),
        mask=mask,
        request=request,
    )
    tokens, dim = math.prod(given.x.shape[2:]) if variant.images else given.x.shape[1], int(attributes.dim)
    shapes = {
        tuple(given.x.shape): "x",
        (_BATCH, int(attributes.num_heads), tokens, tokens): "attention",
        (_BATCH, int(attributes.num_heads), tokens, dim // int(attributes.num_heads)): "v",
    }

    def outputs(layer: nn.Module, **further: Any) -> tuple[str, ...] | None:
        result = _run(layer, given, **further)
        if not isinstance(result, tuple):
            return None
        return tuple(shapes.get(tuple(getattr(each, "shape", ())), "") for each in result)

    trial.eval()
    try:
        plain = outputs(trial)
        requested = outputs(trial, **{request: True}) if request else plain
        for name in () if request else [name for name, value in vars(trial).items() if _asks(name, value)]:
            asked: Any = copy.copy(trial)
            by_value = []
            for value in (False, True):
                setattr(asked, name, value)
                by_value.append(outputs(asked))
            if by_value[0] != by_value[1]:
                variant, (plain, requested) = replace(variant, request_attribute=name), by_value
                break
    except Exception as error:  # another project's code, which may fail in any way
        raise TypeError(f"on random tokens it fails to give outputs ({type(error).__name__}: {error})") from error
    for each in (plain, requested):
        if each and ("x" not in each or "" in each):
            raise TypeError("for the same tokens it gives other outputs than the reference, a map or values")
    try:
        mean = isinstance(_run(trial, given, "get_attention_map"), float)
    except Exception:  # missing, or with other arguments
        mean = False
    return replace(variant, outputs=plain, requested=requested, mean_distance=mean)


def _asks(name: str, value: object) -> bool:
    """Whether an attribute may be one that asks for the attention map where it is True."""
    return isinstance(value, bool) and any(word in name for word in ("attn", "attention", "map"))


def _run(layer: nn.Module, given: _Input, method: str = "forward", **further: Any) -> Any:
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
    return getattr(layer, method)(given.x, **{**given.further, **further})


def _run_and_differentiate(layer: nn.Module, given: _Input, **further: Any) -> tuple[Any, ...]:
    """The outputs, and the gradients of x and of every parameter, for a loss to which each output's place matters."""
    x = given.x.clone().requires_grad_()
    layer.zero_grad()
    with torch.enable_grad():
        result = _run(layer, given._replace(x=x), **further)
        out = next((each for each in tree_leaves(result) if getattr(each, "shape", None) == x.shape), None)
        if out is None:
            return (result,)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return result, x.grad, *(parameter.grad for parameter in layer.parameters())


def _difference(trial: Any, ours: Any, variant: Variant, given: _Input) -> str:
    """What a trial copy does otherwise than our layer with its parameters and children; "" where they agree.

    Compared are outputs in both modes and with dropout, gradients, and what the layers say of their maps: as the layer
    is called by default, with a key mask, and asked for its map.
    """

    def compare(what: Callable[..., Any], name: str, **further: Any) -> str:
        try:
            theirs = what(trial, given, **further)
        except Exception as error:  # another project's code, which may fail in any way
            return f"on random tokens it fails to give {name} ({type(error).__name__}: {error})"
        try:
            mine = what(ours, given, **further)
        except (ValueError, RuntimeError) as error:
            return f"its parameters do not fit the reference's: {error}"
        return "" if _agree(mine, theirs) else f"for the same tokens it gives other {name} than the reference"

    def disagree(**further: Any) -> str:
        for training, dropout_p, what in ((True, 0.0, _run_and_differentiate), (True, 0.5, _run), (False, 0.0, _run)):
            trial.training = ours.training = training
            for drop in (trial.attn_drop, trial.proj_drop):
                drop.training, drop.p = training, dropout_p
            outputs = "outputs or gradients" if what is _run_and_differentiate else "outputs"
            case = f"{outputs} in {'training' if training else 'evaluation'} mode{' with dropout' if dropout_p else ''}"
            if reason := compare(what, case, **further):
                return reason
        return ""

    asked, may_ask = variant.request_attribute, variant.request_attribute in vars(trial)
    for asks in (False, True) if may_ask else (bool(variant.outputs),):
        if may_ask:
            setattr(trial, asked, asks)
        setattr(ours, asked, asks)  # where theirs always gives the map, ours has to be asked
        if reason := disagree():
            return reason
    if variant.request and (reason := disagree(**{variant.request: True})):
        return reason
    if variant.mask and (reason := _mask_difference(trial, variant.mask, given, disagree)):
        return f"its forward takes {variant.mask}, which is no key mask on the mixed map: {reason}"
    for name in ("get_attention", "get_attention_map"):
        try:
            theirs = _run(trial, given, name)
        except Exception:  # missing, or with other arguments: then ours gives no result in its place
            continue
        if not _agree(_run(ours, given, name), theirs):
            return f"for the same tokens its {name} gives something else than the reference's"
    return ""


def _mask_difference(trial: nn.Module, name: str, given: _Input, disagree: Callable[..., str]) -> str:
    """In what the layers differ under a random mask, of the first shape in which theirs takes one."""
    reason = ""
    images = given.x.dim() > 3
    grid = tuple(given.x.shape[2:]) if images else (given.x.shape[1],)
    for shape in list(_shapes(given.x.shape[1 if images else 2], grid))[images][1]:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.8
        try:
            _run(trial, given, "forward", **{name: mask})
        except Exception as error:  # another project's code, which may fail in any way
            reason = reason or f"on random tokens it fails to give outputs ({type(error).__name__}: {error})"
            continue
        return disagree(**{name: mask})
    return reason


def _agree(mine: Any, theirs: Any) -> bool:
    """Whether two results are the same up to the rounding of float32."""
    (ours, form), (others, their_form) = tree_flatten(mine), tree_flatten(theirs)
    if form != their_form:
        return False
    largest = max((leaf.nan_to_num(0).abs().max().item() for leaf in others if isinstance(leaf, Tensor)), default=0.0)
    return all(map(partial(_equal, floor=1e-6 * largest), ours, others))


def _equal(mine: Any, theirs: Any, floor: float) -> bool:
    """`floor` is for what cancels to zero, as the gradient of pos_proj.bias, and leaves rounding."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=1e-4)
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
        return mine is theirs is None
    both = mine.isnan() & theirs.isnan()  # a row of the map whose keys are all masked
    mine, theirs = mine.masked_fill(both, 0), theirs.masked_fill(both, 0)
    return not both.all() and bool((mine - theirs).abs().max() <= 1e-4 * theirs.abs().max() + floor)


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, in float32 if it is of floating point; zeros of what has no values."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=dtype)
    return tensor.detach().to("cpu", dtype, copy=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Runs trials so that nobody notices: float32, no autocast, no hooks on every module, RNG as it was."""
    state = vars(nn.modules.module)
    hooks = [state[name] for name in state if name.startswith("_global_") and isinstance(state[name], dict)]
    saved, dtype = [dict(each) for each in hooks], torch.get_default_dtype()
    for each in hooks:
        each.clear()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for each, values in zip(hooks, saved, strict=True):
            each.update(values)
