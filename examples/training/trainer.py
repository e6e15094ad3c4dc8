"""One run of training: from the first step, or from a checkpoint, to the trained weights."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
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

from convit_kernels import GPSA, locality, models

from . import data as datasets
from .cnn import CNN
from .config import FREE_WITH_CHANGE_LR, Config, Options, identity, resolve
from .distributed import Processes, processes, usable_device
from .files import (
    CHECKPOINT,
    EVALUATIONS_LOG,
    STEPS_LOG,
    WEIGHTS,
    CsvLog,
    not_finite,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
    write_weights,
)
from .terminal import progress

EVALUATION_BATCH = 250  # images of one process


def load_data(config: Config) -> datasets.Data:
    """The data of a run; raises as `data.load` does."""
    augmentation = datasets.Augmentation(
        sampling_ratio=config.sampling_ratio,
        seed=config.seed,
        hflip=config.hflip,
        crop_padding=config.crop_padding,
        auto_augment=config.auto_augment,
        reprob=config.reprob,
    )
    return datasets.load(config.data, config.img_size, config.workers, augmentation)


def model_arguments(config: Config, data: datasets.Data) -> dict[str, Any]:
    """The arguments of `convit_kernels.models.ConViT`, or of `CNN`, fit for JSON."""
    if config.cnn:
        return {
            "in_chans": data.in_chans,
            "num_classes": len(data.classes),
            "patch_size": config.patch_size,
            "embed_dim": config.embed_dim,
            "depth": config.depth,
        }
    return {
        "img_size": list(data.img_size),
        "in_chans": data.in_chans,
        "num_classes": len(data.classes),
        "use_pos_embed": config.pos_embed,
        "drop_path_rate": config.drop_path,
        "stem": config.stem,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "local_up_to_layer": config.local_up_to_layer,
        "locality_strength": config.locality_strength,
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


def description(figures: Mapping[str, float]) -> str:
    """The figures of a row of a log that stand beside the progress."""
    texts = {"loss": "loss {:.3f}", "test_accuracy": "test {:.2%}", "images_per_second": "{:.0f} images/s"}
    return ", ".join(text.format(figures[name]) for name, text in texts.items() if name in figures)


class Trainer:
    """One run. Its construction checks everything and writes nothing.

    Raises:
        FileNotFoundError, ValueError: what was given cannot be trained; the text says what and why.
    """

    def __init__(self, config: Config, group: Processes) -> None:
        self.config = config
        self.group = group
        self.data = data = load_data(config)
        self.checkpoint_path = config.output / CHECKPOINT

        images = len(data.train.labels)
        self.steps_per_epoch = len(self._plan(0))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{images} training images do not fill one step of {config.batch_size * group.world}: choose a smaller "
                "--batch-size"
            )
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch

        datasets.seed_all(config.seed)
        self.arguments = model_arguments(config, data)
        self.model: nn.Module
        if config.cnn:
            self.model = CNN(**self.arguments)
        else:
            self.model = models.ConViT(**self.arguments, backend="reference" if config.reference else None)
            if config.init_gain:
                set_init_gain(self.model, config.init_gain)
        self.model.to(group.device)
        self.average = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.parallel: nn.Module = self.model
        if config.fsdp:
            blocks: Any = self.model.blocks
            for block in blocks:
                fully_shard(block)
            fully_shard(self.model)
        elif group.world > 1:
            self.parallel = DistributedDataParallel(self.model)

        lr = config.lr * config.batch_size * group.world / 512
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=lr, weight_decay=config.weight_decay, fused=True)
        warmup = config.warmup_steps or round(config.warmup_epochs * self.steps_per_epoch)
        warmup = min(warmup, self.total_steps // 2)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps - warmup,
            lr_min=config.min_lr,
            warmup_t=warmup,
            warmup_lr_init=config.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        mixing = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "label_smoothing": config.smoothing}
        self.mixup = Mixup(**mixing, num_classes=len(data.classes)) if config.mixup or config.cutmix else None
        self.step = 0
        self.resumed_step: int | None = None
        self.last_checkpoint: tuple[int, Path] | None = None
        datasets.seed_all(datasets.mix_seeds(config.seed, group.rank))
        if config.resume:
            path = self.checkpoint_path if config.resume == "auto" else Path(config.resume)
            if config.resume != "auto" or path.is_file():
                self._restore(read_checkpoint(path), path)
        elif self.checkpoint_path.is_file():
            raise ValueError(f"{config.output} holds a run: --resume auto goes on with it, or choose another --output")

    def _plan(self, epoch: int) -> list[datasets.Batch]:
        return datasets.epoch_plan(
            len(self.data.train.labels),
            self.config.batch_size,
            epoch=epoch,
            seed=self.config.seed,
            repeats=self.config.repeats,
            rank=self.group.rank,
            world=self.group.world,
        )

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        return identity(self.config) | {"processes": self.group.world, "steps_per_epoch": self.steps_per_epoch}

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        mine, saved = self._identity(), state["identity"]
        free = FREE_WITH_CHANGE_LR if self.config.change_lr else set()
        # a value that is none can be 0, "", None, or not there at all, by the version that wrote the checkpoint
        changed = [name for name in mine if name not in free and (saved.get(name) or None) != (mine[name] or None)]
        if changed:
            differences = ", ".join(f"{name} was {saved.get(name)} and is {mine[name]}" for name in changed)
            hint = ": --change-lr allows it" if FREE_WITH_CHANGE_LR.issuperset(changed) else ""
            raise ValueError(f"{path} is of another run: {differences}{hint}")
        options = sharded.StateDictOptions(full_state_dict=True)
        sharded.set_model_state_dict(self.model, state["model"], options=options)
        sharded.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.step = self.resumed_step = state["step"]
        self.last_checkpoint = self.step, path
        datasets.set_rng_state(state["rng"][self.group.rank])

    def checkpoint(self) -> None:
        """Writes all that the next step depends on; every process must call it.

        Raises:
            FloatingPointError: NaN or infinity is in it; the checkpoint from before stays.
            OSError: it cannot be written; likewise.
        """
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "identity": self._identity(),
            "step": self.step,
            "model": sharded.get_model_state_dict(self.model, options=options),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": sharded.get_optimizer_state_dict(self.model, self.optimizer, options=options),
            "rng": self.group.gather(datasets.rng_state()),
        }
        self._require_finite(state)
        if self.group.first:
            for log in self.logs:
                log.sync()
            write_checkpoint(self.checkpoint_path, state)
        self.last_checkpoint = self.step, self.checkpoint_path

    def _write_weights(self, accuracy: float) -> None:
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = sharded.get_model_state_dict(self.evaluated, options=options)
        self._require_finite(state)
        if self.group.first:
            metadata = {
                "cnn" if self.config.cnn else "model": self.arguments,
                "mean": self.data.mean,
                "std": self.data.std,
                "classes": self.data.classes,
                "test_accuracy": accuracy,
                "step": self.step,
            }
            write_weights(self.config.output / WEIGHTS, state, metadata)

    # What is not finite

    def _require_finite(self, state: Mapping[str, Any]) -> None:
        """Raises FloatingPointError in every process where the first one's state, the whole model's, is not finite."""
        names = self.group.gather(list(not_finite(state)))[0]
        if names:
            raise self._diverged(f"{names[0]} is not finite after step {self.step}")

    def _diverged(self, what: str) -> FloatingPointError:
        config = self.config
        ways = [f"a --lr below {config.lr:g}", *(["float32 (without --amp)"] if config.amp else [])]
        way = " or ".join(ways)
        if self.last_checkpoint is None:
            return FloatingPointError(f"{what}, and no checkpoint was written yet: start again with {way}")
        step, path = self.last_checkpoint
        resume = "auto" if path == self.checkpoint_path else path
        return FloatingPointError(
            f"{what}: the last good checkpoint, of step {step}, stays in {path}; go on from it with --resume {resume} "
            f"--change-lr and {way}"
        )

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
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.smoothing)

    def _take_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step; returns the loss before it, a scalar."""
        self.schedule.step_update(self.step)
        self.parallel.train()
        loss = self._loss(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.step)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, split: datasets.Split | None = None) -> dict[str, float]:
        """Loss and accuracy, as a share, on the whole test split, or on another: test_loss, test_accuracy."""
        split = split or self.data.test
        model = self.evaluated.eval()
        plan = datasets.evaluation_plan(
            len(split.labels), EVALUATION_BATCH, rank=self.group.rank, world=self.group.world
        )
        total = torch.zeros(3, dtype=torch.float64, device=self.group.device)
        for images, labels in split.batches(plan):
            labels = labels.to(self.group.device)
            with self._autocast():
                logits = model(images.to(self.group.device)).float()
            loss = F.cross_entropy(logits, labels, ignore_index=datasets.PADDING, reduction="sum")
            total += torch.stack([loss, (logits.argmax(1) == labels).sum(), (labels != datasets.PADDING).sum()])
        loss_sum, correct, count = self.group.total(total).tolist()
        return {"test_loss": loss_sum / count, "test_accuracy": correct / count}

    def locality(self) -> dict[str, float]:
        """Non-locality of each layer, the mean over its heads, in patches; and the share of position of each head."""
        if self.config.locality_images == 0 or self.config.cnn:
            return {}
        count = min(self.config.locality_images, len(self.data.test.labels))
        ((images, _),) = self.data.test.batches([datasets.Batch(list(range(count)), None)])
        layers = locality.nonlocality(self.evaluated.eval(), images.to(self.group.device))
        values = {f"nonlocality_{index}": layer.nonlocality.mean().item() for index, layer in enumerate(layers)}
        for index, layer in enumerate(layers):
            for head, gate in enumerate([] if layer.gate is None else layer.gate.tolist()):
                values[f"gate_{index}_{head}"] = gate
        return values

    def _open_logs(self, more_columns: Iterable[str]) -> None:
        output = self.config.output
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
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

    def train(self, show_progress: bool = True) -> dict[str, float]:
        """Trains to the last step, writes the weights and returns the last evaluation: test_loss, test_accuracy.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite.
            OSError: an image cannot be read, or a file cannot be written.
        """
        config = self.config
        untrained = self.locality()
        if self.group.first:
            self._open_logs(untrained)
        if self.step == 0:
            self._log(1, untrained)
        evaluation: dict[str, float] = {}
        every = config.evaluate_every or self.steps_per_epoch
        images = config.batch_size * self.group.world
        since, seen = time.perf_counter(), 0
        with progress(self.total_steps, self.step, shown=show_progress and self.group.first) as show:
            for batch in self._batches() if self.step < self.total_steps else ():
                step_loss = self._take_step(*batch)
                seen += images
                last = self.step == self.total_steps
                evaluating = last or self.step % every == 0
                if evaluating or self.step % config.log_every == 0:
                    loss = self.group.total(step_loss.double()).item() / self.group.world
                    if not math.isfinite(loss):
                        raise self._diverged(f"the loss is {loss} at step {self.step}")
                    rates = {
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "images_per_second": seen / (time.perf_counter() - since),
                    }
                    row = {"loss": loss} | rates
                    self._log(0, row)
                    if evaluating:
                        evaluation = self.evaluate()
                        self._log(1, evaluation | rates | self.locality())
                    show(self.step, description(row | evaluation), evaluating)
                    since, seen = time.perf_counter(), 0
                if evaluating or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.checkpoint()
                    since, seen = time.perf_counter(), 0
                if last:
                    break
        evaluation = evaluation or self.evaluate()  # a run that was killed between its last checkpoint and its weights
        self._write_weights(evaluation["test_accuracy"])
        return evaluation


def train(options: Options, show_progress: bool = True) -> dict[str, float]:
    """Trains, in this process or as one of torchrun's, and returns the last evaluation: test_loss, test_accuracy.

    Raises:
        FileNotFoundError, ValueError: what was given cannot be trained.
        FloatingPointError, OSError: as `Trainer.train`.
    """
    config = resolve(options, datasets.kind_of(options.data))
    with processes(usable_device(config.device)) as group:
        return Trainer(config, group).train(show_progress)
