"""The ConViTs of the paper (d'Ascoli et al., 2021, arXiv 2103.10697) on the fused layer, and their DeiT twins.

Parameters carry the names that timm and facebookresearch/convit give them, so state_dicts load strictly both ways. The
parts are timm's; the model is not a subclass of timm's, whose forward knows one image size and whose blocks build
another layer.

Once this module is imported, `timm.create_model("convit_small_fused")` builds them too: a constructor's name with
`_fused` after it, so that timm's own `convit_small` stays what it is.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .extras import needs

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers import DropPath, LayerNorm, Mlp, resample_abs_pos_embed, trunc_normal_
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        get_pretrained_cfg,
        register_model,
        resolve_pretrained_cfg,
    )
    from timm.models._features import feature_take_indices
    from timm.models.vision_transformer import Attention
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(needs("convit_kernels.models", "models", error), name=error.name) from error

from .attention import check_backend
from .gpsa import GPSA
from .grid import GridSize, parse_grid, parse_plane
from .patches import ConvStem, Grid, PatchEmbed, check_divides, position_on_grid, tokens_on_grid

# torch.fx keeps them as one call each: they read shapes, which a symbolic trace does not have
torch.fx.wrap("tokens_on_grid")
torch.fx.wrap("position_on_grid")

Pool = Literal["", "token", "avg"]
Stem = Literal["patch", "conv"]

POOLS = ("", "token", "avg")
STEMS = ("patch", "conv")

# Arguments that turn a ConViT into the rows of the paper's Table 3, where it is ConViT-S+.
ABLATIONS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"train_gates": False},
    "c": {"use_local_init": False},
    "d": {"train_gates": False, "use_local_init": False},
    "e": {"local_up_to_layer": 0},
    "f": {"train_gpsa": False},
    "g": {"train_gpsa": False, "use_local_init": False},
}


def _on_grid(module: nn.Module, x: Tensor, grid_size: GridSize) -> Tensor:
    """module(x), a block or an attention. GPSA inside is told the grid where it would take the tokens for another's.

    So whatever takes tokens alone may stand in their place, as in timm's model.
    """
    if type(module) in (Block, GPSA):
        return module(x, grid_size=grid_size)  # type: ignore[no-any-return]
    for part in module.modules():
        if isinstance(part, GPSA) and grid_size is not None:
            rows, columns = parse_plane(grid_size)
            if (rows, columns) != (parse_grid(part.grid_size) if part.grid_size else (rows, rows)):
                return module(x, grid_size=grid_size)  # type: ignore[no-any-return]
    return module(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block, norm first: GPSA or plain attention, then the MLP."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)

    __prepare_scriptable__ = GPSA.__prepare_scriptable__

    def forward(self, x: Tensor, grid_size: GridSize = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim).

        Args:
            x: the tokens: the patches in row-major order, T = N, for GPSA; with the class token first, T = 1 + N, for
                plain attention.
            grid_size: (rows, columns) of the patches, or one number for a square; None: the grid that the GPSA layer
                was made for, or a square. Plain attention does without.

        Raises:
            ValueError: x has another number of tokens than the grid, or grid_size is None and their number no square.
        """
        x = x + self.drop_path(_on_grid(self.attn, self.norm1(x), grid_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class ConViT(nn.Module):
    """A vision transformer whose first layers are GPSA and whose last are plain attention with a class token.

    Images may have any size and aspect ratio that divides into patches: the positional embedding is interpolated, and
    GPSA follows from three weights on any grid.

    Args:
        img_size: (height, width) in pixels, or one number, that the positional embedding is made for.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for none.
        global_pool: what the head sees: "token" the class token, "avg" the mean of the patches, "" every token.
        embed_dim: channels of a token, all heads together (timm's ConVit takes those of one head).
        depth: blocks.
        num_heads: heads of each attention.
        mlp_ratio: hidden channels of the MLP, in embed_dim.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the head, after the
            positional embedding, after projections and MLP, on attention maps; stochastic depth of the last block.
        local_up_to_layer: how many blocks, from the first, have GPSA; the class token joins after them. 0 makes a DeiT
            of the same code; depth leaves out the class token, and global_pool must then not be "token".
        locality_strength: alpha in the paper, how sharply heads attend to their pixel at the start.
        use_pos_embed: whether patches get a learnt positional embedding.
        use_local_init: start GPSA as a convolution (equation 5); False: at random (Table 3, c).
        train_gates: False: every gating parameter is 0 and stays so, half content and half position (Table 3, b).
        train_gpsa: False: the GPSA layers stay as they were initialised (Table 3, f and g).
        stem: "patch": one strided convolution; "conv": the stem of Xiao et al., 2021; patch_size a power of two.
        backend: of the GPSA layers, a name from `convit_kernels.backends()`; None chooses the fastest that can run.
        norm_layer: a function of the number of channels that makes the norms.
        device, dtype: of the parameters.

    Shapes:
        forward: (B, in_chans, H, W) -> (B, num_classes); with global_pool="" (B, 1 + N, num_classes), N patches in
        row-major order after the class token.

    Raises:
        ValueError: arguments that do not fit each other, or an image that does not divide into patches; the text says
            what was given and what is allowed.
        RuntimeError: the backend cannot run on this machine.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        use_local_init: bool = True,
        train_gates: bool = True,
        train_gpsa: bool = True,
        stem: Stem = "patch",
        backend: str | None = None,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads, but {embed_dim=} and {num_heads=}")
        if depth < 1 or not 0 <= local_up_to_layer <= depth:
            raise ValueError(
                f"local_up_to_layer, the number of GPSA layers, must be from 0 to depth, but {local_up_to_layer=} "
                f"and {depth=}"
            )
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, but is {stem!r}")
        if stem == "conv" and (patch_size < 2 or patch_size & (patch_size - 1) or embed_dim % (patch_size // 2)):
            raise ValueError(
                "the convolutional stem halves the image and doubles the channels step by step: patch_size must be a "
                f"power of two from 2 and embed_dim a multiple of its half, but {patch_size=} and {embed_dim=}"
            )
        if patch_size < 1 or in_chans < 1 or num_classes < 0:
            raise ValueError(
                "patch_size and in_chans must be positive and num_classes at least 0, "
                f"but {patch_size=}, {in_chans=} and {num_classes=}"
            )
        check_backend(backend)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        check_divides(height, width, (patch_size, patch_size))
        self.grid_size: Grid = (height // patch_size, width // patch_size)  # of pos_embed, and of blocks called alone
        self.num_patches = math.prod(self.grid_size)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.local_up_to_layer = local_up_to_layer
        self.locality_strength = locality_strength
        self.use_pos_embed = use_pos_embed
        self.num_prefix_tokens = int(local_up_to_layer < depth)
        self.global_pool = self._checked_pool(global_pool)
        self.grad_checkpointing = False

        def attention(index: int) -> nn.Module:
            if index >= local_up_to_layer:
                return Attention(
                    embed_dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate
                )
            return GPSA(
                embed_dim,
                num_heads,
                qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                locality_strength=locality_strength,
                use_local_init=use_local_init,
                grid_size=None if height == width else self.grid_size,
                backend=backend,
            )

        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()  # also where the default is "meta"
        with torch.device(torch.get_default_device() if device is None else device):
            self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim)
            if stem == "conv":
                self.patch_embed.register_module("proj", ConvStem(in_chans, embed_dim, patch_size))
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if self.num_prefix_tokens else None
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches, embed_dim)) if use_pos_embed else None
            self.pos_drop = nn.Dropout(pos_drop_rate)
            self.blocks = nn.ModuleList(
                Block(embed_dim, attention(index), mlp_ratio, proj_drop_rate, drop_path[index], norm_layer)
                for index in range(depth)
            )
            self.norm = norm_layer(embed_dim)
            self.feature_info = [
                {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
            ]
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
            for parameter in (self.cls_token, self.pos_embed):
                if parameter is not None:
                    trunc_normal_(parameter, std=0.02)
            self.apply(self._initialise)
        for module in self.modules():
            if isinstance(module, GPSA):
                module.requires_grad_(train_gpsa)
                if not train_gates:
                    nn.init.zeros_(module.gating_param.requires_grad_(False))
        self.to(dtype=dtype)

    def _init_weights(self, module: nn.Module) -> None:
        """timm's initial values of one layer, for `model.apply`; what GPSA adds is in its `local_init`."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def _initialise(self, module: nn.Module) -> None:
        """The initial values of one layer in a new model; convolutions keep PyTorch's."""
        if isinstance(module, GPSA):
            module.reset_parameters()
        else:
            self._init_weights(module)

    def _checked_pool(self, global_pool: Pool) -> Pool:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {POOLS}, but is {global_pool!r}")
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError(
                'with GPSA in every layer there is no class token: give global_pool="avg", '
                "or local_up_to_layer smaller than depth"
            )
        return global_pool

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(B, in_chans, H, W) -> the patches with their positional embedding, (B, N, embed_dim), and their grid.

        Raises:
            ValueError: images of another shape, or that do not divide into the model's own patches; or `patch_embed`
                has been replaced by a module that does not say on which grid its tokens are, or `pos_embed` by one
                that fits no grid.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if tracing and images.dim() == 4:
            # the trace is for this size: another ends with an error, also where it makes as many patches
            images = images.expand(-1, -1, *map(int, images.shape[2:]))
        patches = self.patch_embed
        x = patches(images, any_grid=True) if isinstance(patches, PatchEmbed) else patches(images)
        claimed = patches.dynamic_feat_size(images.shape[2:]) if hasattr(patches, "dynamic_feat_size") else None
        found = tokens_on_grid(x, images.shape, claimed)
        x, grid = found[0], found[1]
        if tracing:
            grid = int(grid[0]), int(grid[1])
        if self.use_pos_embed and self.pos_embed is not None:
            x = x + position_on_grid(self.pos_embed, self.grid_size, grid)
        return self.pos_drop(x), grid

    def _block(self, index: int, x: Tensor, grid: Grid) -> Tensor:
        """One block; before the first with plain attention the class token joins."""
        if index == self.local_up_to_layer and self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(_on_grid, self.blocks[index], x, grid, use_reentrant=False)
        return _on_grid(self.blocks[index], x, grid)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1 + N, embed_dim): every token after the last norm, the class token first."""
        x, grid = self.embed(images)
        for index in range(len(self.blocks)):
            x = self._block(index, x, grid)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features, (B, 1 + N, embed_dim), and the patches' tokens after chosen blocks, without the class token.

        Args:
            x: images, (B, in_chans, H, W).
            indices: the last so many blocks, or those listed (negative ones count from the end); None: all.
            norm: apply the last norm to each of them.
            stop_early: leave out the blocks after the last one chosen; the features are then that block's.
            output_fmt: "NCHW" for (B, embed_dim, rows, columns), "NLC" for (B, N, embed_dim).
            intermediates_only: return only the list.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, but is {output_fmt!r}")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        intermediates = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            x = self._block(index, x, grid)
            if index in chosen:
                patches = (self.norm(x) if norm else x)[:, -grid[0] * grid[1] :]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                intermediates.append(patches)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of `forward_features` -> logits, (B, num_classes); with pre_logits what the head would see."""
        has_class_token = self.cls_token is not None and self.local_up_to_layer < len(self.blocks)
        if self.global_pool == "avg":
            x = x[:, int(has_class_token) :].mean(dim=1)
        elif self.global_pool == "token":
            if not has_class_token:
                raise ValueError(
                    f"the class token joins before block {self.local_up_to_layer}, and there are {len(self.blocks)}: "
                    'give the model local_up_to_layer smaller than that, or pool by reset_classifier(classes, "avg")'
                )
            x = x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_chans, H, W) -> logits (B, num_classes).

        With num_classes=0 the last dimension is embed_dim, and with global_pool="" there is one row a token, as the
        class says.

        Raises:
            ValueError: as `embed`; or the head sees a class token that joined before none of the blocks left.
        """
        return self.forward_head(self.forward_features(images))

    __prepare_scriptable__ = GPSA.__prepare_scriptable__

    # What timm's training, fine-tuning and feature extraction ask of a model.

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside biases, norms and gates."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward and compute the rest again: less memory, more time."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """A new head for num_classes outputs, 0 for none."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what `forward_intermediates` does not need for these indices; returns them, counted from the start."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if last < self.local_up_to_layer:  # the class token would join later
            self.cls_token = None
            self.num_prefix_tokens = 0
            prune_head = prune_head or self.global_pool == "token"
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(chosen)


SIZES: dict[str, dict[str, int]] = {
    # the paper's Table 1
    "convit_tiny": {"embed_dim": 192, "num_heads": 4},
    "convit_tiny_plus": {"embed_dim": 256, "num_heads": 4},
    "convit_small": {"embed_dim": 432, "num_heads": 9},
    "convit_small_plus": {"embed_dim": 576, "num_heads": 9},
    "convit_base": {"embed_dim": 768, "num_heads": 16},
    "convit_base_plus": {"embed_dim": 1024, "num_heads": 16},
    "deit_tiny": {"embed_dim": 192, "num_heads": 3, "local_up_to_layer": 0},
    "deit_tiny_plus": {"embed_dim": 256, "num_heads": 4, "local_up_to_layer": 0},
    "deit_small": {"embed_dim": 384, "num_heads": 6, "local_up_to_layer": 0},
    "deit_small_plus": {"embed_dim": 576, "num_heads": 9, "local_up_to_layer": 0},
    "deit_base": {"embed_dim": 768, "num_heads": 12, "local_up_to_layer": 0},
    "deit_base_plus": {"embed_dim": 1024, "num_heads": 16, "local_up_to_layer": 0},
}
WEIGHTS = "fb_in1k"  # timm's tag of the published weights
PUBLISHED = ("convit_tiny", "convit_small", "convit_base")


def _registered(size: str) -> str:
    return f"{size}_fused"


def _published_config(size: str) -> Any:
    """timm's description of the published weights; only the image size is not fixed here."""
    config: Any = get_pretrained_cfg(f"{size}.{WEIGHTS}")
    return dataclasses.replace(config, fixed_input_size=False)


_UNPUBLISHED = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs(
    {f"{_registered(size)}.{WEIGHTS}": _published_config(size) for size in PUBLISHED}
    | {_registered(size): _UNPUBLISHED for size in SIZES if size not in PUBLISHED}
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: ConViT) -> dict[str, Tensor]:
    """A state_dict whose positional embedding fits the model's grid.

    On which grid it is now: that of the image size which timm knows of the weights, or the model's own (first, where
    they are from a file, of which timm knows nothing), or a square.

    Raises:
        ValueError: its number of positions is that of none of them.
    """
    state = dict(state_dict)
    if model.pos_embed is None or "pos_embed" not in state:
        return state
    positions = state["pos_embed"].shape[1]
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    arguments: Mapping[str, Any] = getattr(model, "pretrained_model_args", {})  # of the model that was saved
    height, width = parse_plane(arguments.get("img_size") or config.get("input_size", (1, 1, 1))[1:])
    described = (height // model.patch_size, width // model.patch_size)
    from_file = config.get("source") is None and (config.get("file") or config.get("state_dict"))
    grids = [model.grid_size, described] if from_file else [described, model.grid_size]
    source = next((grid for grid in [*grids, (math.isqrt(positions),) * 2] if math.prod(grid) == positions), None)
    if source is None:
        raise ValueError(
            f"the weights have a positional embedding of {positions} patches, neither a square nor the model's "
            f"{model.grid_size[0]} x {model.grid_size[1]}: give the size of the images that they were made for, "
            "pretrained_cfg_overlay=dict(input_size=(channels, height, width))"
        )
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(model.grid_size), list(source), num_prefix_tokens=0
    )
    return state


_BUILDER_ARGUMENTS = (
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args", "cache_dir"),
    *("features_only", "out_indices", "feature_cls"),
)
_ARGUMENTS = (*inspect.signature(ConViT).parameters, *_BUILDER_ARGUMENTS)


def _constructor(size: str) -> Callable[..., ConViT]:
    """The function that builds one size; another is registered with timm, which takes timm's arguments."""

    def construct(pretrained: bool = False, **arguments: Any) -> ConViT:
        if unknown := [name for name in arguments if name not in _ARGUMENTS]:
            raise TypeError(f"{size} has no arguments {', '.join(unknown)}: allowed are {', '.join(_ARGUMENTS)}")
        name = _registered(size)
        if pretrained:
            source = resolve_pretrained_cfg(
                name, arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")
            )
            given = source.file or source.state_dict or source.source
            if not (given or source.url or source.hf_hub_id):
                raise ValueError(
                    f"no weights are published for {size}: pretrained=True is for {', '.join(PUBLISHED)}, or with a "
                    'file of your own, pretrained_cfg_overlay=dict(file="weights.pth")'
                )
            if not given and arguments.get("stem", "patch") != "patch":
                raise ValueError('the published weights have the patch stem: pretrained=True needs stem="patch"')
        model: ConViT = build_model_with_cfg(
            ConViT,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
            **(SIZES[size] | arguments),
        )
        return model

    def registered(pretrained: bool = False, **arguments: Any) -> ConViT:
        widths = SIZES[size] | arguments
        if size.startswith("convit"):  # timm's ConViT takes the channels of a head, its DeiT those of all of them
            of_a_head = arguments.get("embed_dim", SIZES[size]["embed_dim"] // SIZES[size]["num_heads"])
            widths["embed_dim"] = of_a_head * widths["num_heads"]
        return construct(pretrained, **widths)

    architecture = ", ".join(f"{name}={value}" for name, value in SIZES[size].items())
    construct.__name__ = construct.__qualname__ = size
    construct.__doc__ = (
        f"ConViT({architecture}); takes ConViT's other arguments.\n\n"
        f"pretrained=True takes the published weights through timm; there are some for {', '.join(PUBLISHED)}."
    )
    registered.__name__ = registered.__qualname__ = _registered(size)
    registered.__doc__ = f"`{size}` under timm's name and with timm's meaning of embed_dim."
    register_model(registered)
    return construct


convit_tiny = _constructor("convit_tiny")
convit_tiny_plus = _constructor("convit_tiny_plus")
convit_small = _constructor("convit_small")
convit_small_plus = _constructor("convit_small_plus")
convit_base = _constructor("convit_base")
convit_base_plus = _constructor("convit_base_plus")
deit_tiny = _constructor("deit_tiny")
deit_tiny_plus = _constructor("deit_tiny_plus")
deit_small = _constructor("deit_small")
deit_small_plus = _constructor("deit_small_plus")
deit_base = _constructor("deit_base")
deit_base_plus = _constructor("deit_base_plus")

# last: registering adds names to it under which nothing stands here
__all__ = ["ABLATIONS", "SIZES", "Block", "ConViT", "checkpoint_filter_fn", *SIZES]
