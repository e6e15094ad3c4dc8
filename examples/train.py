"""Trains a ConViT, or its DeiT twin, on Fashion-MNIST or on a folder of images.

    python examples/train.py --output runs/first
    python examples/train.py --output runs/first --resume auto
    torchrun --nproc-per-node 2 examples/train.py --data imagenet --model convit_small --amp --output runs/small

Without options Fashion-MNIST gets a small model and a short recipe, a folder of images the recipe of the paper
(d'Ascoli et al., 2021, arXiv 2103.10697). `python examples/train.py --help` lists every option.
"""

import csv
import dataclasses
import inspect
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import data as datasets
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from typer import Exit, Option, Typer

from convit_kernels import GPSA, locality, models

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.safetensors"
STEPS_LOG = "steps.csv"
EVALUATIONS_LOG = "evaluations.csv"
EVALUATION_BATCH = 250  # images of one process

console = Console(stderr=True)
T = TypeVar("T")

# What an option that is not given becomes, by the kind of data; for folders the paper's recipe.
RECIPES: dict[datasets.Kind, dict[str, Any]] = {
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
    },
    "folder": {
        "model": "convit_tiny",
        "depth": 12,
        "local_up_to_layer": 10,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "img_size": 224,
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
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "workers": 2,
    },
}


@dataclass(frozen=True)
class Config:
    """A run; each field is an option of the command line."""

    data: Annotated[Path, Option(help="Folder of Fashion-MNIST's IDX files, or one with train/ and val/.")] = (
        datasets.FASHION_MNIST
    )
    output: Annotated[Path, Option(help="Folder for checkpoint, logs and weights.")] = Path("run")
    resume: Annotated[
        str | None, Option(help="A checkpoint, or 'auto': the one in --output, and the first step if there is none.")
    ] = None

    model: Annotated[str | None, Option(help="Name in convit_kernels.models.SIZES; the options below change it.")] = (
        None
    )
    embed_dim: Annotated[int | None, Option(help="Channels of a token, all heads together.")] = None
    num_heads: Annotated[int | None, Option(help="Attention heads.")] = None
    depth: Annotated[int | None, Option(help="Blocks.")] = None
    mlp_ratio: Annotated[float | None, Option(help="Hidden channels of the MLP, in embed_dim.")] = None
    patch_size: Annotated[int | None, Option(help="Side of a patch in pixels.")] = None
    local_up_to_layer: Annotated[int | None, Option(help="GPSA layers, from the first; 0 is the DeiT twin.")] = None
    locality_strength: Annotated[float, Option(help="The paper's alpha.")] = 1.0
    pos_embed: Annotated[bool, Option(help="A learnt positional embedding.")] = True
    stem: Annotated[Literal["patch", "conv"], Option(help="How images become patches.")] = "patch"
    init_gain: Annotated[
        float | None,
        Option(
            help="Initial projections have a standard deviation of this over the root of their inputs. The paper's "
            "0.02 is a gain of 0.42 at ConViT-S' 432 channels, but far less in a small model, which learns slowly."
        ),
    ] = None
    ablation: Annotated[Literal["a", "b", "c", "d", "e", "f", "g"], Option(help="Row of the paper's Table 3.")] = "a"
    reference: Annotated[bool, Option("--reference", help="GPSA as dense eager mathematics, to compare with.")] = False

    epochs: Annotated[int | None, Option(help="Passes over the training images.")] = None
    steps: Annotated[int | None, Option(help="Optimizer steps; in place of --epochs.")] = None
    batch_size: Annotated[int | None, Option(help="Images of one process in a step.")] = None
    lr: Annotated[float | None, Option(help="Learning rate for 512 images a step; scaled to the step's.")] = None
    min_lr: Annotated[float | None, Option(help="Learning rate at the end of the cosine.")] = None
    warmup_epochs: Annotated[float | None, Option(help="Epochs of linear warm-up; at most half the run.")] = None
    warmup_steps: Annotated[int | None, Option(help="Steps of linear warm-up; in place of --warmup-epochs.")] = None
    warmup_lr: Annotated[float, Option(help="Learning rate at the first step.")] = 1e-6
    weight_decay: Annotated[float, Option(help="AdamW's.")] = 0.05
    drop_path: Annotated[float | None, Option(help="Stochastic depth of the last block.")] = None
    smoothing: Annotated[float | None, Option(help="Label smoothing.")] = None
    mixup: Annotated[float | None, Option(help="Mixup's alpha, 0: none.")] = None
    cutmix: Annotated[float | None, Option(help="CutMix's alpha, 0: none.")] = None
    repeats: Annotated[int | None, Option(help="Repeated augmentation: draws of an image, 1: none.")] = None
    hflip: Annotated[float, Option(help="Probability that an image is mirrored.")] = 0.5
    crop_padding: Annotated[int | None, Option(help="Random shifts in pixels (Fashion-MNIST).")] = None
    img_size: Annotated[int | None, Option(help="Side of an image in pixels (folders).")] = None
    auto_augment: Annotated[str | None, Option(help="timm's policy, '': none (folders).")] = None
    reprob: Annotated[float | None, Option(help="Probability of random erasing (folders).")] = None
    workers: Annotated[int | None, Option(help="Processes that read images (folders).")] = None
    ema_decay: Annotated[
        float, Option(help="Average of the weights, timm's ModelEmaV3; then evaluated and written. 0: none.")
    ] = 0.0

    sampling_ratio: Annotated[float, Option(help="Share of each class's training images that is used.")] = 1.0
    seed: Annotated[int, Option(help="Of initial weights, data order, augmentation and subset.")] = 0
    amp: Annotated[bool, Option("--amp", help="bfloat16 where torch.autocast takes it.")] = False
    device: Annotated[str, Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu"
    fsdp: Annotated[bool, Option("--fsdp", help="Shard parameters over the processes (FSDP2) instead of DDP.")] = False

    checkpoint_every: Annotated[int, Option(help="Steps between checkpoints; 0: at each evaluation only.")] = 0
    evaluate_every: Annotated[int, Option(help="Steps between evaluations; 0: one epoch. The last step always.")] = 0
    log_every: Annotated[int, Option(help="Steps between rows of the training log.")] = 10
    locality_images: Annotated[int, Option(help="Test images for non-locality at each evaluation; 0: none.")] = 64
    tensorboard: Annotated[bool, Option("--tensorboard", help="Log for TensorBoard as well.")] = False


# what may change when a run is resumed; anything else would make it another run
FREE_ON_RESUME = {
    "data",
    "output",
    "resume",
    "workers",
    "device",
    "checkpoint_every",
    "evaluate_every",
    "log_every",
    "locality_images",
    "tensorboard",
}
INSTEAD = (("epochs", "steps"), ("warmup_epochs", "warmup_steps"))  # of each pair one decides
ONLY_FOR: dict[datasets.Kind, Sequence[str]] = {
    "idx": ("crop_padding",),
    "folder": ("img_size", "auto_augment", "reprob", "workers"),
}


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The process group of torchrun, if it started this process."""
    if "LOCAL_RANK" not in os.environ:
        yield Processes(0, 1, torch.device(device))
        return
    on_gpu = device.startswith("cuda")
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device(device)
    if on_gpu:
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def resolve(config: Config) -> Config:
    """The config with every option set that concerns its data.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: an option is out of range, or has no meaning for these data; the text says what is allowed.
    """
    kind = datasets.kind_of(config.data)
    for other in RECIPES:
        given = [name for name in ONLY_FOR[other] if other != kind and getattr(config, name) is not None]
        if given:
            raise ValueError(f"{_option(given[0])} is not for the data in {config.data}")
    for epochs, steps in INSTEAD:
        if getattr(config, epochs) is not None and getattr(config, steps) is not None:
            raise ValueError(f"give {_option(epochs)} or {_option(steps)}, not both")
    recipe = RECIPES[kind]
    if config.model is not None:  # a size by name brings its own width and heads
        if config.model not in models.SIZES:
            raise ValueError(f"--model must be one of {', '.join(models.SIZES)}, but is {config.model!r}")
        architecture = RECIPES["folder"] | models.SIZES[config.model]
        recipe = recipe | {
            name: architecture[name] for name in ("embed_dim", "num_heads", "depth", "local_up_to_layer", "mlp_ratio")
        }
    else:
        recipe = models.SIZES[recipe["model"]] | recipe
    decided = {epochs for epochs, steps in INSTEAD if getattr(config, steps) is not None}
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None and name not in decided}
    config = dataclasses.replace(config, **missing)
    _check_ranges(config)
    return config


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


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


def _check_ranges(config: Config) -> None:
    if not 0 < config.sampling_ratio <= 1:
        raise ValueError(f"--sampling-ratio must be above 0 and at most 1, but is {config.sampling_ratio}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"--ema-decay must be at least 0 and below 1, but is {config.ema_decay}")
    for name in ("epochs", "steps", "batch_size", "repeats", "log_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{_option(name)} must be at least 1, but is {value}")
    for name in AT_LEAST_0:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{_option(name)} must be at least 0, but is {value}")
    for name in ("smoothing", "drop_path", "reprob", "hflip"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{_option(name)} must be from 0 to 1, but is {value}")
    if (config.mixup or config.cutmix) and config.batch_size is not None and config.batch_size % 2:
        raise ValueError(f"mixup and CutMix pair the images of a batch: --batch-size {config.batch_size} must be even")
    if config.fsdp and config.ema_decay:
        raise ValueError("--fsdp and --ema-decay do not go together: timm's average knows no sharded parameters")
    if config.fsdp and "LOCAL_RANK" not in os.environ:
        raise ValueError("--fsdp needs several processes: start it with torchrun")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}, but torch sees no GPU")


def load_data(config: Config) -> datasets.Data:
    """The data of a resolved config."""
    common = config.data, config.sampling_ratio, config.seed, config.hflip
    if datasets.kind_of(config.data) == "idx":
        return datasets.load_idx(*common, _given(config.crop_padding))
    return datasets.load_folder(
        *common,
        _given(config.img_size),
        _given(config.auto_augment),
        _given(config.reprob),
        _given(config.workers),
    )


def _given(value: T | None) -> T:
    """An option of a resolved config."""
    assert value is not None
    return value


def model_arguments(config: Config, data: datasets.Data) -> dict[str, Any]:
    """The arguments of `convit_kernels.models.ConViT` of a resolved config, fit for JSON."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "local_up_to_layer", "locality_strength")
    return {
        "img_size": list(data.img_size),
        "in_chans": data.in_chans,
        "num_classes": len(data.classes),
        "use_pos_embed": config.pos_embed,
        "drop_path_rate": config.drop_path,
        "stem": config.stem,
        **{name: getattr(config, name) for name in names},
        **models.ABLATIONS[config.ablation],
    }


@torch.no_grad()
def set_init_gain(model: nn.Module, gain: float) -> None:
    """Scales random initial projections; positions, and values that start as the identity, stay what they are."""
    kept: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GPSA):
            kept.update((module.pos_proj, module.v) if module.use_local_init else (module.pos_proj,))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight.mul_(gain / (0.02 * math.sqrt(module.in_features)))


def refusal(error: Exception, to: Console = console) -> Exit:
    """Tells what is wrong with a user's input, and ends the program where it is raised."""
    to.print(f"error: {error}", style="red", markup=False, soft_wrap=True, highlight=False)
    return Exit(2)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """The file as it was or as it shall be, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_weights(path: Path) -> tuple[models.ConViT, dict[str, Any]]:
    """The model of a weights.safetensors, in evaluation mode, and its metadata.

    The metadata: "model" the arguments, "mean" and "std" of the images it expects, "classes", "test_accuracy", "step".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    with file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        if "model" not in metadata:
            raise ValueError(f"{path} holds no weights of this script: its metadata lack the model's arguments")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    model = models.ConViT(**metadata["model"])
    model.load_state_dict(state)
    return model.eval(), metadata


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Trainer.checkpoint` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error!r:.200}") from error
    if not isinstance(state, dict) or not {"identity", "step", "model", "optimizer"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this script")
    return state


class CsvLog:
    """Rows by step, each in the file once `append` returns; rows after a resumed step are cut first."""

    def __init__(self, path: Path, columns: Sequence[str], resumed_step: int | None) -> None:
        kept: list[list[str]] = []
        if resumed_step is not None and path.is_file():
            with path.open(newline="") as file:
                header, *rows = list(csv.reader(file)) or [[]]
            if header and header != list(columns):
                raise ValueError(f"{path} has other columns than this run: move it away to resume")
            # a row that a kill cut short comes after the checkpoint, and may be the only one that is not whole
            kept = [row for row in rows if len(row) == len(columns) and int(row[0]) <= resumed_step]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                csv.writer(file).writerows([columns, *kept])

        write_atomically(path, write)
        self.file = path.open("a", newline="")
        self.columns = columns

    def append(self, row: dict[str, Any]) -> None:
        csv.writer(self.file).writerow([row.get(name, "") for name in self.columns])
        self.file.flush()

    def sync(self) -> None:
        os.fsync(self.file.fileno())


class Trainer:
    """One run. Making it checks everything and writes nothing.

    Raises:
        FileNotFoundError, ValueError: what was given cannot be trained; the text says what and why.
    """

    def __init__(self, config: Config, group: Processes) -> None:
        self.config = config = resolve(config)
        self.group = group
        self.data = data = load_data(config)
        self.checkpoint_path = config.output / CHECKPOINT

        self.batch_size = _given(config.batch_size)
        images = len(data.train.labels)
        self.steps_per_epoch = len(self._plan(0))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{images} training images do not fill one step of {self.batch_size} on {group.world} processes: "
                "choose a smaller --batch-size"
            )
        self.total_steps = config.steps or _given(config.epochs) * self.steps_per_epoch

        datasets.seed_all(config.seed)
        self.arguments = model_arguments(config, data)
        self.model = models.ConViT(**self.arguments, backend="reference" if config.reference else None)
        if config.init_gain is not None:
            set_init_gain(self.model, config.init_gain)
        self.model.to(group.device)
        self.average = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.parallel: nn.Module = self.model
        if config.fsdp:
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        elif group.world > 1:
            self.parallel = DistributedDataParallel(self.model)

        lr = _given(config.lr) * self.batch_size * group.world / 512
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=lr, weight_decay=config.weight_decay, fused=True)
        warmup = config.warmup_steps
        if warmup is None:
            warmup = round(_given(config.warmup_epochs) * self.steps_per_epoch)
        warmup = min(warmup, self.total_steps // 2)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps - warmup,
            lr_min=_given(config.min_lr),
            warmup_t=warmup,
            warmup_lr_init=config.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        mixing = {"mixup_alpha": _given(config.mixup), "cutmix_alpha": _given(config.cutmix)}
        self.mixup = (
            Mixup(**mixing, label_smoothing=_given(config.smoothing), num_classes=len(data.classes))
            if any(mixing.values())
            else None
        )
        self.step = 0
        self.resumed_step: int | None = None
        datasets.seed_all(datasets.mix_seeds(config.seed, group.rank))
        if config.resume is not None:
            path = self.checkpoint_path if config.resume == "auto" else Path(config.resume)
            if config.resume != "auto" or path.is_file():
                self._restore(read_checkpoint(path), path)
        elif self.checkpoint_path.is_file():
            raise ValueError(f"{config.output} holds a run: --resume auto goes on with it, or choose another --output")

    def _plan(self, epoch: int) -> list[datasets.Batch]:
        return datasets.epoch_plan(
            len(self.data.train.labels),
            self.batch_size,
            epoch=epoch,
            seed=self.config.seed,
            repeats=_given(self.config.repeats),
            rank=self.group.rank,
            world=self.group.world,
        )

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What makes this run the one it is."""
        options = {name: value for name, value in vars(self.config).items() if name not in FREE_ON_RESUME}
        return options | {"processes": self.group.world, "steps_per_epoch": self.steps_per_epoch}

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        mine, saved = self._identity(), state["identity"]
        changed = [
            f"{name} was {saved.get(name)} and is {value}" for name, value in mine.items() if saved.get(name) != value
        ]
        if changed:
            raise ValueError(f"{path} is of another run: {', '.join(changed)}")
        options = sharded.StateDictOptions(full_state_dict=True)
        sharded.set_model_state_dict(self.model, state["model"], options=options)
        sharded.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.step = self.resumed_step = state["step"]
        datasets.set_rng_state(state["rng"][self.group.rank])

    def checkpoint(self) -> None:
        """Writes all that the next step depends on; every process must call it."""
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "identity": self._identity(),
            "step": self.step,
            "model": sharded.get_model_state_dict(self.model, options=options),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": sharded.get_optimizer_state_dict(self.model, self.optimizer, options=options),
            "schedule": self.schedule.state_dict(),
            "rng": self.group.gather(datasets.rng_state()),
        }
        if self.group.first:
            for log in self.logs:
                log.sync()
            write_atomically(self.checkpoint_path, lambda temporary: torch.save(state, temporary))

    def _write_weights(self, accuracy: float) -> None:
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = sharded.get_model_state_dict(self.evaluated, options=options)
        if not self.group.first:
            return
        metadata = {
            "model": self.arguments,
            "mean": self.data.mean,
            "std": self.data.std,
            "classes": self.data.classes,
            "test_accuracy": accuracy,
            "step": self.step,
        }
        text = {name: json.dumps(value) for name, value in metadata.items()}
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        content = save(tensors, text)
        write_atomically(self.config.output / WEIGHTS, lambda temporary: temporary.write_bytes(content))

    # Training

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the average, if there is one."""
        model: nn.Module = self.model if self.average is None else self.average.module
        return model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.config.amp)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = (tensor.to(self.group.device, non_blocking=True) for tensor in (images, labels))
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with self._autocast():
            logits = self.parallel(images)
        if self.mixup is not None:
            return SoftTargetCrossEntropy()(logits.float(), labels)  # type: ignore[no-any-return]
        return F.cross_entropy(logits.float(), labels, label_smoothing=_given(self.config.smoothing))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy, as a share, on the whole test split."""
        model = self.evaluated.eval()
        plan = datasets.evaluation_plan(
            len(self.data.test.labels), EVALUATION_BATCH, rank=self.group.rank, world=self.group.world
        )
        total = torch.zeros(3, dtype=torch.float64, device=self.group.device)
        for images, labels in self.data.test.batches(plan):
            labels = labels.to(self.group.device)
            with self._autocast():
                logits = model(images.to(self.group.device)).float()
            loss = F.cross_entropy(logits, labels, ignore_index=datasets.PADDING, reduction="sum")
            total += torch.stack([loss, (logits.argmax(1) == labels).sum(), (labels != datasets.PADDING).sum()])
        loss_sum, correct, count = self.group.total(total).tolist()
        return {"test_loss": loss_sum / count, "test_accuracy": correct / count}

    def locality(self) -> dict[str, float]:
        """Non-locality of each layer, the mean over its heads, in patches; and the share of position of each head."""
        if self.config.locality_images == 0:
            return {}
        count = min(self.config.locality_images, len(self.data.test.labels))
        ((images, _),) = self.data.test.batches([datasets.Batch(list(range(count)), None)])
        found = locality.nonlocality(self.evaluated.eval(), images.to(self.group.device))
        values = {f"nonlocality_{index}": layer.nonlocality.mean().item() for index, layer in enumerate(found)}
        for index, layer in enumerate(found):
            for head, gate in enumerate([] if layer.gate is None else layer.gate.tolist()):
                values[f"gate_{index}_{head}"] = gate
        return values

    def _open_logs(self, more_columns: Iterable[str]) -> None:
        output = self.config.output
        output.mkdir(parents=True, exist_ok=True)
        step_columns = ("step", "epoch", "loss", "lr", "images_per_second")
        columns = ("step", "epoch", "test_loss", "test_accuracy", "lr", "images_per_second", *more_columns)
        self.logs = [
            CsvLog(output / STEPS_LOG, step_columns, self.resumed_step),
            CsvLog(output / EVALUATIONS_LOG, columns, self.resumed_step),
        ]
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=self.step + 1)

    def _log(self, log: int, row: dict[str, Any]) -> None:
        if not self.group.first:
            return
        row = {"step": self.step, "epoch": self.step / self.steps_per_epoch} | row
        self.logs[log].append(row)
        if self.config.tensorboard:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, self.step)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the steps that are left."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        while True:
            yield from self.data.train.batches(self._plan(epoch)[first:])
            epoch, first = epoch + 1, 0

    def train(self, progress: bool = True) -> dict[str, float]:
        """Trains to the last step, writes the weights and returns the last evaluation.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        untrained = self.locality()
        if self.group.first:
            self._open_logs(untrained)
        if self.step == 0:
            self._log(1, untrained)
        found: dict[str, float] = {}
        every = self.config.evaluate_every or self.steps_per_epoch
        images = self.batch_size * self.group.world
        since, seen = time.perf_counter(), 0
        with _bar(self, progress and self.group.first) as show:
            for batch in self._batches() if self.step < self.total_steps else ():
                self.schedule.step_update(self.step)
                self.parallel.train()
                loss = self._loss(*batch)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step += 1
                seen += images
                if self.average is not None:
                    self.average.update(self.model, step=self.step)
                last = self.step == self.total_steps
                evaluating = last or self.step % every == 0
                if evaluating or self.step % self.config.log_every == 0:
                    row = {
                        "loss": self.group.total(loss.detach().double()).item() / self.group.world,
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "images_per_second": seen / (time.perf_counter() - since),
                    }
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(
                            f"the loss is {row['loss']} at step {self.step}: a smaller --lr may help; the last "
                            f"checkpoint stays in {self.config.output}"
                        )
                    self._log(0, row)
                    show(row)
                    since, seen = time.perf_counter(), 0
                if evaluating:
                    found = self.evaluate()
                    speed = {name: row[name] for name in ("lr", "images_per_second")}
                    self._log(1, found | speed | self.locality())
                    show(found)
                if evaluating or (self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0):
                    self.checkpoint()
                    since, seen = time.perf_counter(), 0
                if last:
                    break
        found = found or self.evaluate()  # a run that was killed between its last checkpoint and its weights
        self._write_weights(found["test_accuracy"])
        return found


@contextmanager
def _bar(trainer: Trainer, shown: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar, and the function that puts new figures beside it."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    figures: dict[str, float] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task("", total=trainer.total_steps, completed=trainer.step)

        def show(row: dict[str, float]) -> None:
            figures.update(row)
            texts = {
                "loss": "loss {:.3f}",
                "test_accuracy": "test {:.2%}",
                "images_per_second": "{:.0f} images/s",
            }
            description = ", ".join(text.format(figures[name]) for name, text in texts.items() if name in figures)
            progress.update(task, completed=trainer.step, description=description)

        yield show


def train(config: Config, progress: bool = True) -> dict[str, float]:
    """Trains, in this process or as one of torchrun's, and returns the last evaluation: test_loss, test_accuracy."""
    with processes(config.device) as group:
        return Trainer(config, group).train(progress)


app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Trains a ConViT, or its DeiT twin, on Fashion-MNIST or on a folder of images.")
def main(**options: Any) -> None:
    config = Config(**options)
    with processes(config.device) as group:
        try:
            trainer = Trainer(config, group)
        except (FileNotFoundError, ValueError) as error:
            raise refusal(error) from error
        found = trainer.train()
        if group.first:
            accuracy = f"test accuracy {found['test_accuracy']:.2%}"
            console.print(f"{accuracy}, weights in {config.output / WEIGHTS}", highlight=False)


main.__signature__ = inspect.signature(Config)  # type: ignore[attr-defined]  # typer reads the options there

if __name__ == "__main__":
    app()
