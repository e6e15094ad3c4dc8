"""What a run is: the options as given, and the config in which every decision has been taken.

An option that is not given is decided by the recipe of its data, `RECIPES`. In a config 0 and "" mean none, so that
nothing is optional there; of `epochs` and `steps` one is 0, and of `warmup_epochs` and `warmup_steps` at least one.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from convit_kernels import models

from .data import FASHION_MNIST, Kind
from .distributed import DEFAULT_DEVICE, under_torchrun

RECIPES: dict[Kind, dict[str, Any]] = {
    # a short training of a small model
    "idx": {
        "model": "convit_tiny",
        "embed_dim": 64,
        "num_heads": 4,
        "depth": 6,
        "local_up_to_layer": 5,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "init_gain": 0.5,
        "epochs": 10,
        "batch_size": 32,
        "lr": 3.2e-2,
        "min_lr": 1e-5,
        "warmup_epochs": 0.5,
        "drop_path": 0.0,
        "smoothing": 0.1,
        "mixup": 0.0,
        "cutmix": 0.0,
        "repeats": 1,
        "crop_padding": 1,
        "img_size": 0,
        "auto_augment": "",
        "reprob": 0.0,
        "workers": 0,
    },
    # the paper's
    "folder": {
        "model": "convit_tiny",
        **models.SIZES["convit_tiny"],
        "depth": 12,
        "local_up_to_layer": 10,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "init_gain": 0.0,
        "epochs": 300,
        "batch_size": 64,
        "lr": 5e-4,
        "min_lr": 1e-5,
        "warmup_epochs": 5.0,
        "drop_path": 0.1,
        "smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 3,
        "crop_padding": 0,
        "img_size": 224,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "workers": 2,
    },
}
ARCHITECTURE = ("embed_dim", "num_heads", "depth", "local_up_to_layer", "mlp_ratio")  # what --model decides
ONLY_FOR: dict[Kind, Sequence[str]] = {
    "idx": ("crop_padding",),
    "folder": ("img_size", "auto_augment", "reprob", "workers"),
}
INSTEAD = (("epochs", "steps"), ("warmup_epochs", "warmup_steps"))  # of each pair one decides


# the sections of --help
RUN, MODEL, TRAINING, IMAGES, LOGS = (
    partial(Option, rich_help_panel=title) for title in ("Run", "Model", "Training", "Images", "Logs and checkpoints")
)


def by_recipe(section: Callable[..., Any], name: str, description: str) -> Any:
    """An option whose default depends on the data; --help shows the default of each recipe."""
    titles: dict[Kind, str] = {"idx": "Fashion-MNIST", "folder": "folder"}
    defaults = {
        kind: str(recipe[name] or "none")
        for kind, recipe in RECIPES.items()
        if not any(name in names for other, names in ONLY_FOR.items() if other != kind)
    }
    both = len(defaults) == len(RECIPES) and len(set(defaults.values())) == 1
    shown = defaults["idx"] if both else ", ".join(f"{titles[kind]} {value}" for kind, value in defaults.items())
    return section(help=description, show_default=shown)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What has the same default for all data."""

    data: Annotated[Path, RUN(help="Folder of Fashion-MNIST's IDX files, or one with train/ and val/.")] = FASHION_MNIST
    output: Annotated[Path, RUN(help="Folder for checkpoint, logs and weights.")] = Path("run")
    resume: Annotated[
        str, RUN(help="A checkpoint, or 'auto': the one in --output, and the first step if there is none.")
    ] = ""
    change_lr: Annotated[
        bool, RUN("--change-lr", help="With --resume: --lr, --min-lr and --amp may differ from the checkpoint's.")
    ] = False
    device: Annotated[str, RUN(help="cpu or cuda.")] = DEFAULT_DEVICE
    fsdp: Annotated[bool, RUN("--fsdp", help="Shard parameters over the processes (FSDP2) instead of DDP.")] = False
    amp: Annotated[bool, RUN("--amp", help="bfloat16 where torch.autocast takes it.")] = False
    reference: Annotated[bool, RUN("--reference", help="GPSA as dense eager mathematics, to compare with.")] = False
    seed: Annotated[int, RUN(help="Of initial weights, data order, augmentation and subset.")] = 0
    sampling_ratio: Annotated[float, RUN(help="Share of each class's training images that is used.")] = 1.0

    locality_strength: Annotated[float, MODEL(help="The paper's alpha.")] = 1.0
    pos_embed: Annotated[bool, MODEL(help="A learnt positional embedding.")] = True
    stem: Annotated[Literal["patch", "conv"], MODEL(help="How images become patches.")] = "patch"
    ablation: Annotated[Literal["a", "b", "c", "d", "e", "f", "g"], MODEL(help="Row of the paper's Table 3.")] = "a"
    cnn: Annotated[bool, MODEL("--cnn", help="A plain CNN, as wide and as deep on the same patches.")] = False

    warmup_lr: Annotated[float, TRAINING(help="Learning rate at the first step.")] = 1e-6
    weight_decay: Annotated[float, TRAINING(help="AdamW's.")] = 0.05
    ema_decay: Annotated[
        float, TRAINING(help="Average of the weights, timm's ModelEmaV3; then evaluated and written. 0: none.")
    ] = 0.0
    hflip: Annotated[float, IMAGES(help="Probability that an image is mirrored.")] = 0.5

    checkpoint_every: Annotated[int, LOGS(help="Steps between checkpoints; 0: at each evaluation only.")] = 0
    evaluate_every: Annotated[int, LOGS(help="Steps between evaluations; 0: one epoch. The last step always.")] = 0
    log_every: Annotated[int, LOGS(help="Steps between rows of the training log.")] = 10
    locality_images: Annotated[int, LOGS(help="Test images for non-locality at each evaluation; 0: none.")] = 64
    tensorboard: Annotated[bool, LOGS("--tensorboard", help="Log for TensorBoard as well.")] = False


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """A run as given; each field is an option of the command line, and None leaves it to the recipe."""

    model: Annotated[
        str | None,
        by_recipe(MODEL, "model", f"One of {', '.join(models.SIZES)}; then its width, heads, depth and MLP."),
    ] = None
    embed_dim: Annotated[int | None, by_recipe(MODEL, "embed_dim", "Channels of a token, all heads together.")] = None
    num_heads: Annotated[int | None, by_recipe(MODEL, "num_heads", "Attention heads.")] = None
    depth: Annotated[int | None, by_recipe(MODEL, "depth", "Blocks.")] = None
    mlp_ratio: Annotated[float | None, by_recipe(MODEL, "mlp_ratio", "Hidden channels of the MLP, in embed_dim.")] = (
        None
    )
    patch_size: Annotated[int | None, by_recipe(MODEL, "patch_size", "Side of a patch in pixels.")] = None
    local_up_to_layer: Annotated[
        int | None, by_recipe(MODEL, "local_up_to_layer", "GPSA layers, from the first; 0 is the DeiT twin.")
    ] = None
    init_gain: Annotated[
        float | None,
        by_recipe(
            MODEL,
            "init_gain",
            "Initial projections have a standard deviation of this over the root of their inputs; 0: the paper's 0.02, "
            "a gain of 0.42 at ConViT-S' 432 channels, but far less in a small model, which then learns slowly.",
        ),
    ] = None

    epochs: Annotated[int | None, by_recipe(TRAINING, "epochs", "Passes over the training images.")] = None
    steps: Annotated[int | None, TRAINING(help="Optimizer steps; in place of --epochs.")] = None
    batch_size: Annotated[int | None, by_recipe(TRAINING, "batch_size", "Images of one process in a step.")] = None
    lr: Annotated[
        float | None, by_recipe(TRAINING, "lr", "Learning rate for 512 images a step; scaled to the step's.")
    ] = None
    min_lr: Annotated[float | None, by_recipe(TRAINING, "min_lr", "Learning rate at the end of the cosine.")] = None
    warmup_epochs: Annotated[
        float | None, by_recipe(TRAINING, "warmup_epochs", "Epochs of linear warm-up; at most half the run.")
    ] = None
    warmup_steps: Annotated[int | None, TRAINING(help="Steps of linear warm-up; in place of --warmup-epochs.")] = None
    drop_path: Annotated[float | None, by_recipe(TRAINING, "drop_path", "Stochastic depth of the last block.")] = None
    smoothing: Annotated[float | None, by_recipe(TRAINING, "smoothing", "Label smoothing.")] = None
    mixup: Annotated[float | None, by_recipe(TRAINING, "mixup", "Mixup's alpha, 0: none.")] = None
    cutmix: Annotated[float | None, by_recipe(TRAINING, "cutmix", "CutMix's alpha, 0: none.")] = None
    repeats: Annotated[
        int | None,
        by_recipe(
            IMAGES,
            "repeats",
            "Repeated augmentation: an epoch, of the same length, draws one of so many images, so often; 1: none.",
        ),
    ] = None
    crop_padding: Annotated[int | None, by_recipe(IMAGES, "crop_padding", "Random shifts in pixels.")] = None
    img_size: Annotated[int | None, by_recipe(IMAGES, "img_size", "Side of an image in pixels.")] = None
    auto_augment: Annotated[str | None, by_recipe(IMAGES, "auto_augment", "timm's policy, '': none.")] = None
    reprob: Annotated[float | None, by_recipe(IMAGES, "reprob", "Probability of random erasing.")] = None
    workers: Annotated[int | None, by_recipe(IMAGES, "workers", "Processes that read images.")] = None


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A run with every decision taken; `Options` says what each field is."""

    model: str
    embed_dim: int
    num_heads: int
    depth: int
    mlp_ratio: float
    patch_size: int
    local_up_to_layer: int
    init_gain: float
    epochs: int
    steps: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_epochs: float
    warmup_steps: int
    drop_path: float
    smoothing: float
    mixup: float
    cutmix: float
    repeats: int
    crop_padding: int
    img_size: int
    auto_augment: str
    reprob: float
    workers: int


# What may differ when a run is resumed; anything else would make it another run.
FREE_ON_RESUME = {
    "data",
    "output",
    "resume",
    "change_lr",
    "workers",
    "device",
    "checkpoint_every",
    "evaluate_every",
    "log_every",
    "locality_images",
    "tensorboard",
}
FREE_WITH_CHANGE_LR = {"lr", "min_lr", "amp"}


def identity(settings: Settings) -> dict[str, Any]:
    """What makes a run the one it is, fit for JSON and checkpoints."""
    return {name: value for name, value in vars(settings).items() if name not in FREE_ON_RESUME}


def resolve(options: Options, kind: Kind) -> Config:
    """The config of these options on data of this kind.

    Raises:
        ValueError: an option is out of range, or has no meaning for these data; the text says what is allowed.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    for other, names in ONLY_FOR.items():
        for name in names:
            if other != kind and name in given:
                raise ValueError(f"{_option(name)} is not for the data in {options.data}")
    recipe = dict(RECIPES[kind])
    if options.model is not None:
        if options.model not in models.SIZES:
            raise ValueError(f"--model must be one of {', '.join(models.SIZES)}, but is {options.model!r}")
        architecture = RECIPES["folder"] | models.SIZES[options.model]
        recipe |= {name: architecture[name] for name in ARCHITECTURE}
    for epochs, steps in INSTEAD:
        if epochs in given and steps in given:
            raise ValueError(f"give {_option(epochs)} or {_option(steps)}, not both")
        recipe |= {steps: 0, epochs: 0 if steps in given else recipe[epochs]}
    _check_ranges(given)
    config = Config(**(recipe | given))
    _check_together(config)
    return config


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


AT_LEAST_1 = ("epochs", "steps", "batch_size", "repeats", "log_every", "img_size", "patch_size")
AT_LEAST_0 = (
    "init_gain",
    "lr",
    "min_lr",
    "warmup_epochs",
    "warmup_steps",
    "warmup_lr",
    "weight_decay",
    "mixup",
    "cutmix",
    "crop_padding",
    "workers",
    "checkpoint_every",
    "evaluate_every",
    "locality_images",
)
FROM_0_TO_1 = ("smoothing", "drop_path", "reprob", "hflip")


def _check_ranges(given: dict[str, Any]) -> None:
    if not 0 < given["sampling_ratio"] <= 1:
        raise ValueError(f"--sampling-ratio must be above 0 and at most 1, but is {given['sampling_ratio']}")
    if not 0 <= given["ema_decay"] < 1:
        raise ValueError(f"--ema-decay must be at least 0 and below 1, but is {given['ema_decay']}")
    for name, value in given.items():
        if name in AT_LEAST_1 and not value >= 1:
            raise ValueError(f"{_option(name)} must be at least 1, but is {value}")
        if name in AT_LEAST_0 and not value >= 0:
            raise ValueError(f"{_option(name)} must be at least 0, but is {value}")
        if name in FROM_0_TO_1 and not 0 <= value <= 1:
            raise ValueError(f"{_option(name)} must be from 0 to 1, but is {value}")


def _check_together(config: Config) -> None:
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise ValueError(f"mixup and CutMix pair the images of a batch: --batch-size {config.batch_size} must be even")
    if config.cnn and (config.ablation != "a" or config.reference or config.stem != "patch" or config.fsdp):
        raise ValueError("--cnn has no attention: --ablation, --reference, --stem and --fsdp are not for it")
    if config.fsdp and config.ema_decay:
        raise ValueError("--fsdp and --ema-decay do not go together: timm's average knows no sharded parameters")
    if config.fsdp and not under_torchrun():
        raise ValueError("--fsdp needs several processes: start it with torchrun")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
    if config.change_lr and not config.resume:
        raise ValueError("--change-lr is for a run that goes on: give --resume, too")
    nearest = next(folder for folder in (config.output, *config.output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output {config.output} cannot be written: {nearest} is no folder, or not yours to write")
