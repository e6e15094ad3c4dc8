"""examples/train.py: what it learns is exact, a kill costs nothing, several processes agree, bad input is told."""

import csv
import dataclasses
import gzip
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data as datasets
import numpy as np
import pytest
import torch
import train
from PIL import Image
from timm.utils import ModelEmaV3
from tiny_images import SIZE, TEST, TRAIN, learnable_images, write_idx
from torch import Tensor
from typer.testing import CliRunner

EXAMPLES = Path(train.__file__).parent


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with two classes of small pictures."""
    folder = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


MODEL = {"embed_dim": 16, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "mlp_ratio": 2.0, "patch_size": 4}


@pytest.fixture
def config(idx_data: Path, tmp_path: Path) -> train.Config:
    """A run of three epochs of twelve steps with a tiny model."""
    return train.Config(
        data=idx_data,
        output=tmp_path / "run",
        batch_size=8,
        lr=0.2,
        crop_padding=1,
        epochs=3,
        warmup_epochs=0.2,
        log_every=1,
        locality_images=4,
        device="cpu",
        **MODEL,
    )


def trainer(config: train.Config) -> train.Trainer:
    return train.Trainer(config, train.Processes(0, 1, torch.device(config.device)))


def rows(output: Path, name: str = train.STEPS_LOG) -> list[dict[str, str]]:
    """A log without the only column that depends on time."""
    with (output / name).open(newline="") as file:
        return [{key: text for key, text in row.items() if key != "images_per_second"} for row in csv.DictReader(file)]


def losses(output: Path) -> Tensor:
    return torch.tensor([float(row["loss"]) for row in rows(output)])


def weights(output: Path) -> dict[str, Tensor]:
    return train.load_weights(output / train.WEIGHTS)[0].state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and logs, to the bit."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for log in (train.STEPS_LOG, train.EVALUATIONS_LOG):
        assert rows(one, log) == rows(other, log)


class TestTraining:
    def test_a_model_learns(self, config: train.Config) -> None:
        found = train.train(dataclasses.replace(config, epochs=12), progress=False)
        assert found["test_accuracy"] > 0.8

    def test_fused_and_reference_layers_give_the_same_loss_curve(self, config: train.Config, tmp_path: Path) -> None:
        """50 steps from one seed: what differs is rounding, far below what another seed makes of it."""
        config = dataclasses.replace(config, epochs=None, steps=50, depth=4, local_up_to_layer=3, drop_path=0.1)
        curves = []
        for name, change in (("fused", {}), ("reference", {"reference": True}), ("other", {"seed": 1})):
            run = trainer(dataclasses.replace(config, output=tmp_path / name, **change))
            assert {block.attn.backend for block in run.model.blocks[:3]} == {
                "reference" if name == "reference" else None
            }
            run.train(progress=False)
            curves.append(losses(tmp_path / name))
        fused, reference, other = curves
        assert len(fused) == 50
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)
        assert (fused - other).abs().mean() > 1e-2
        assert fused[-10:].mean() < 0.9 * fused[:10].mean()

    def test_the_weights_rebuild_the_model(self, config: train.Config) -> None:
        found = train.train(config, progress=False)
        model, metadata = train.load_weights(config.output / train.WEIGHTS)
        ((images, labels),) = trainer(dataclasses.replace(config, resume="auto")).data.test.batches(
            datasets.evaluation_plan(TEST, TEST)
        )
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
        assert accuracy == found["test_accuracy"] == metadata["test_accuracy"]
        assert metadata["model"]["embed_dim"] == MODEL["embed_dim"] and metadata["step"] == 36

    def test_learning_rate_warms_up_and_follows_a_cosine(self, config: train.Config) -> None:
        config = dataclasses.replace(config, epochs=None, steps=41, lr=0.064, min_lr=1e-5, warmup_epochs=1)
        train.train(config, progress=False)
        rates = [float(row["lr"]) for row in rows(config.output)]
        assert rates[0] == config.warmup_lr
        assert rates[12] == max(rates) == pytest.approx(0.064 * 8 / 512)
        assert rates[-1] < 1e-5 + 0.01 * rates[12]

    def test_bfloat16(self, config: train.Config) -> None:
        found = train.train(dataclasses.replace(config, amp=True, epochs=6), progress=False)
        assert found["test_accuracy"] > 0.5
        assert {tensor.dtype for tensor in weights(config.output).values()} == {torch.float32}

    def test_tensorboard_and_locality_logs(self, config: train.Config) -> None:
        train.train(dataclasses.replace(config, tensorboard=True), progress=False)
        assert list((config.output / "tensorboard").glob("events*"))
        evaluations = rows(config.output, train.EVALUATIONS_LOG)
        assert [row["step"] for row in evaluations] == ["0", "12", "24", "36"]
        assert evaluations[0]["test_accuracy"] == ""
        for row in evaluations:
            assert 0 < float(row["nonlocality_0"]) < SIZE / 4
            assert 0 < float(row["gate_0_3"]) < 1

    @pytest.mark.parametrize("ablation", ["b", "e", "g"])
    def test_ablations_leave_frozen_parameters_alone(self, config: train.Config, ablation: Any) -> None:
        run = trainer(dataclasses.replace(config, ablation=ablation))
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        run.train(progress=False)
        moved = {name for name, value in weights(config.output).items() if not torch.equal(before[name], value)}
        frozen = {name for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
        assert moved.isdisjoint(frozen)
        # a constant cancels in the softmax
        assert before.keys() - moved - frozen <= {"blocks.0.attn.pos_proj.bias"}
        assert bool(frozen) == (ablation != "e")

    def test_a_loss_that_is_not_finite_ends_the_run(self, config: train.Config) -> None:
        run = trainer(config)
        with torch.no_grad():
            run.model.head.bias.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="at step 1"):
            run.train(progress=False)
        assert not (config.output / train.WEIGHTS).exists()


def test_init_gain_scales_what_is_random_and_nothing_else(config: train.Config) -> None:
    run = trainer(dataclasses.replace(config, embed_dim=64, init_gain=0.5))
    attention, plain = (block.attn for block in run.model.blocks)
    for linear in (attention.qk, attention.proj, plain.qkv, run.model.blocks[0].mlp.fc2):
        assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(0.5, rel=0.05)
    assert torch.equal(attention.v.weight, torch.eye(64))
    assert attention.pos_proj.weight[0].tolist() == [-1.0, -1.0, -1.0]
    random_values = (
        trainer(dataclasses.replace(config, embed_dim=64, init_gain=0.5, ablation="c")).model.blocks[0].attn.v
    )
    assert random_values.weight.std().item() * 8 == pytest.approx(0.5, rel=0.05)


class StopError(Exception):
    """Stands for a kill."""


# everything that has a state or draws random numbers
EVERYTHING: dict[str, Any] = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.3,
    "ema_decay": 0.9,
    "repeats": 3,
    "checkpoint_every": 5,
    "batch_size": 4,
    "epochs": 2,
}


class TestResume:
    @pytest.mark.parametrize(
        "change", [{}, EVERYTHING, {"ablation": "f", "checkpoint_every": 5}], ids=["plain", "everything", "frozen"]
    )
    def test_in_the_middle_of_an_epoch(
        self, config: train.Config, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.stop_and_resume(dataclasses.replace(config, checkpoint_every=5), change, 9, tmp_path, monkeypatch)

    def test_with_a_folder_of_images(
        self, config: train.Config, folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = {"data": folder_data, "img_size": 16, "workers": 0, "checkpoint_every": 3, "crop_padding": None}
        self.stop_and_resume(config, EVERYTHING | images, 5, tmp_path, monkeypatch)

    def stop_and_resume(
        self, config: train.Config, change: dict[str, Any], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = dataclasses.replace(config, **change, output=tmp_path / "whole")
        train.train(whole, progress=False)
        stopped = dataclasses.replace(whole, output=tmp_path / "stopped")
        run = trainer(stopped)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            if run.step == steps:
                raise StopError
            return train.Trainer._loss(run, images, labels)

        monkeypatch.setattr(run, "_loss", loss)
        with pytest.raises(StopError):
            run.train(progress=False)
        assert len(losses(stopped.output)) == steps
        torch.randn(3), np.random.rand(3), random.random()  # noqa: NPY002, as another process would have
        resumed = trainer(dataclasses.replace(stopped, resume="auto"))
        assert 0 < resumed.step < steps
        resumed.train(progress=False)
        assert_same_run(whole.output, stopped.output)

    def test_after_ten_kills_at_random_moments(
        self, config: train.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGKILL, ten times; the weights and logs are those of a run that nobody disturbed."""
        config = dataclasses.replace(config, checkpoint_every=2, steps=60, epochs=None, drop_path=0.2, ema_decay=0.9)
        undisturbed = dataclasses.replace(config, output=tmp_path / "undisturbed")
        # processes are forked from one that has imported everything and computed nothing
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), *sys.path]))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])

        def start(run: train.Config) -> Any:
            process = context.Process(target=train.train, args=(run, False))
            process.start()
            return process

        process = start(undisturbed)
        process.join()
        assert process.exitcode == 0
        begun = time.perf_counter()
        start(dataclasses.replace(undisturbed, output=tmp_path / "timed")).join()
        duration = time.perf_counter() - begun
        moments = random.Random(0)
        kills, attempt = 0, 0
        while kills < 10:  # a run that ends before the tenth is followed by another
            attempt += 1
            output = tmp_path / f"killed{attempt}"
            process = start(dataclasses.replace(config, output=output, resume="auto"))
            while process.exitcode != 0:
                process.join(moments.uniform(0, 0.8 * duration) if kills < 10 else None)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    kills += 1
                    process = start(dataclasses.replace(config, output=output, resume="auto"))
                assert process.exitcode in (None, 0)
            assert_same_run(undisturbed.output, output)
            assert sorted(path.name for path in output.iterdir()) == sorted(
                path.name for path in undisturbed.output.iterdir()
            )

    def test_a_log_row_that_was_cut_short_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4,0")
        train.CsvLog(path, ("step", "loss"), resumed_step=2).append({"step": 3, "loss": 0.25})
        assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.4", "3,0.25"]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def fail(temporary: Path) -> None:
            temporary.write_text("half of the n")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            train.write_atomically(path, fail)
        assert path.read_text() == "old"


WORKER = """
import dataclasses, sys, torch, train
from pathlib import Path
torch.set_num_threads(1)
out = Path(sys.argv[1])
config = train.Config(data=Path(sys.argv[2]), output=out / "ddp", batch_size=4, epochs=2, lr=0.2,
    hflip=0.0, crop_padding=0, warmup_epochs=0.2, locality_images=4, log_every=1, checkpoint_every=5, device="cpu",
    **{model})
with train.processes("cpu") as group:
    run = train.Trainer(config, group)
    run.train(progress=False)
    torch.save(run.model.state_dict(), out / f"rank{{group.rank}}.pt")
    fsdp = dataclasses.replace(config, output=out / "fsdp", fsdp=True)
    train.Trainer(fsdp, group).train(progress=False)
    again = dataclasses.replace(fsdp, output=out / "again", resume=str(out / "fsdp" / train.CHECKPOINT))
    train.Trainer(again, group).train(progress=False)
"""


def test_two_processes_train_as_one(config: train.Config, tmp_path: Path) -> None:
    """Half the batch each, by DDP and by FSDP2: the weights of one process with all of it, and the same on both."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(model=MODEL))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
    }
    done = subprocess.run(
        [*launch, script, tmp_path, config.data], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []

    alone = dataclasses.replace(config, output=tmp_path / "alone", epochs=2, hflip=0.0, crop_padding=0)
    train.train(alone, progress=False)
    for output in ("ddp", "fsdp", "again"):
        for name, tensor in weights(tmp_path / output).items():
            torch.testing.assert_close(
                tensor, weights(alone.output)[name], rtol=1e-3, atol=1e-5, msg=f"{output} {name}"
            )
        ours, theirs = (rows(path, train.EVALUATIONS_LOG)[-1] for path in (tmp_path / "ddp", alone.output))
        assert ours["test_accuracy"] == theirs["test_accuracy"]
    torch.testing.assert_close(losses(tmp_path / "ddp"), losses(alone.output), rtol=1e-4, atol=1e-5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class TestBadInput:
    """A clear error, exit status 2, and the output folder as it was."""

    def fails(self, config: train.Config, **change: Any) -> str:
        config = dataclasses.replace(config, **change)
        arguments = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in vars(config).items()
            if value is not None and not isinstance(value, bool)
        ]
        before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
        existed = config.output.exists()
        result = CliRunner().invoke(train.app, arguments)
        assert result.exit_code == 2, result.output
        assert config.output.exists() == existed
        assert before == {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
        assert result.stderr.startswith("error: ")
        return result.stderr

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"patch_size": 5}, "12 x 12 pixels does not divide into patches of 5 x 5"),
            ({"local_up_to_layer": 3}, "must be from 0 to depth"),
            ({"sampling_ratio": 0.0}, "--sampling-ratio must be above 0 and at most 1, but is 0.0"),
            ({"sampling_ratio": 1.5}, "at most 1, but is 1.5"),
            ({"sampling_ratio": 0.05}, "do not fill one step of 8"),
            ({"epochs": 0}, "--epochs must be at least 1"),
            ({"steps": 5}, "--epochs or --steps, not both"),
            ({"mixup": 0.8, "batch_size": 7}, "must be even"),
            ({"model": "resnet50"}, "--model must be one of convit_tiny"),
            ({"reprob": 0.5}, "--reprob is not for the data in"),
            ({"resume": "nowhere.pt"}, "there is no checkpoint nowhere.pt"),
        ],
    )
    def test_options(self, config: train.Config, change: dict[str, Any], words: str) -> None:
        assert words in self.fails(config, **change)

    def test_missing_data_say_what_to_install(self, config: train.Config, tmp_path: Path) -> None:
        text = self.fails(config, data=tmp_path / "nothing")
        assert "apt-get install dataset-fashion-mnist" in text and str(tmp_path / "nothing") in text

    @pytest.mark.parametrize("split", [0, 1])
    def test_truncated_data(self, config: train.Config, idx_data: Path, tmp_path: Path, split: int) -> None:
        for path in idx_data.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        name = datasets.IDX_FILES["test"][split]
        truncate(tmp_path / name)
        text = self.fails(config, data=tmp_path)
        assert name in text and "may be truncated" in text
        (tmp_path / name).unlink()
        assert f"{name} is missing" in self.fails(config, data=tmp_path)

    def test_data_that_are_shorter_than_their_header_says(self, config: train.Config, tmp_path: Path) -> None:
        images, labels = learnable_images(TRAIN, 0)
        for split in ("train", "test"):
            write_idx(tmp_path / datasets.IDX_FILES[split][0], images)
            write_idx(tmp_path / datasets.IDX_FILES[split][1], labels)
        path = tmp_path / datasets.IDX_FILES["train"][0]
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
        assert "is damaged: its header tells of shape (96, 12, 12)" in self.fails(config, data=tmp_path)

    def test_folders_with_other_classes(self, config: train.Config, folder_data: Path, tmp_path: Path) -> None:
        for split, label in (("train", "cat"), ("val", "dog")):
            (tmp_path / split / label).mkdir(parents=True)
            source = next((folder_data / split / label).iterdir())
            (tmp_path / split / label / source.name).write_bytes(source.read_bytes())
        assert "must have the same classes, but differ in cat, dog" in self.fails(
            config, data=tmp_path, crop_padding=None
        )

    @pytest.mark.parametrize(
        "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: torch.save({}, path)]
    )
    def test_damaged_checkpoints(self, config: train.Config, damage: Callable[[Path], None]) -> None:
        train.train(config, progress=False)
        damage(config.output / train.CHECKPOINT)
        text = self.fails(config, resume="auto")
        assert "cannot be read, it may be truncated" in text or "is no checkpoint" in text

    def test_a_folder_that_holds_another_run(self, config: train.Config) -> None:
        train.train(config, progress=False)
        assert "--resume auto goes on with it" in self.fails(config)
        assert "of another run: seed was 0 and is 1" in self.fails(config, seed=1, resume="auto")


class TestData:
    def test_a_subset_keeps_the_share_of_each_class(self) -> None:
        labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153)]
        kept = datasets.subsample(labels, 0.1, seed=0)
        assert torch.bincount(labels[kept]).tolist() == [10, 5, 1]
        assert torch.equal(kept, datasets.subsample(labels, 0.1, seed=0))
        assert not torch.equal(kept, datasets.subsample(labels, 0.1, seed=1))
        assert torch.equal(datasets.subsample(labels, 1, seed=0), torch.arange(153))

    def test_an_epoch_draws_each_image_once_over_the_processes(self) -> None:
        plans = [datasets.epoch_plan(48, 8, epoch=1, seed=0, rank=rank, world=2) for rank in range(2)]
        assert sorted(index for plan in plans for batch in plan for index in batch.indices) == list(range(48))
        seeds = [batch.seed for plan in plans for batch in plan]
        assert len(set(seeds)) == len(seeds) == 6
        assert plans[0] == datasets.epoch_plan(48, 8, epoch=1, seed=0, rank=0, world=2)
        for other in ({"epoch": 2, "seed": 0}, {"epoch": 1, "seed": 1}):
            assert plans[0] != datasets.epoch_plan(48, 8, rank=0, world=2, **other)

    def test_repeated_augmentation_draws_fewer_images_more_often(self) -> None:
        plan = datasets.epoch_plan(48, 8, epoch=0, seed=0, repeats=3)
        drawn = [index for batch in plan for index in batch.indices]
        assert len(drawn) == 48 and len(set(drawn)) == 16

    def test_an_evaluation_counts_each_image_once_in_as_many_batches_for_all(self) -> None:
        plans = [datasets.evaluation_plan(TEST, 4, rank=rank, world=2) for rank in range(2)]
        assert len(plans[0]) == len(plans[1])
        indices = [index for plan in plans for batch in plan for index in batch.indices]
        assert sorted(index for index in indices if index >= 0) == list(range(TEST))

    def test_augmented_images_are_shifts_and_mirrors(self) -> None:
        images = torch.arange(1, 2 * 3 * 4 * 5 + 1).reshape(2, 3, 4, 5)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(datasets.shift_and_flip(images, 0, 0.0, generator), images)
        assert torch.equal(datasets.shift_and_flip(images, 0, 1.0, generator), images.flip(3))
        padded = torch.nn.functional.pad(images, (1,) * 4)
        shifts = [padded[:, :, down : down + 4, across : across + 5] for down in range(3) for across in range(3)]
        allowed = torch.stack([*shifts, *(shift.flip(3) for shift in shifts)])
        seen = set()
        for _ in range(100):
            found = datasets.shift_and_flip(images, 1, 0.5, generator)
            matches = (found == allowed).flatten(2).all(2)  # (18, 2)
            assert matches.sum(0).tolist() == [1, 1]
            seen.update(matches.nonzero()[:, 0].tolist())
        assert seen == set(range(18))

    def test_seeded_leaves_the_generators_as_they_were(self) -> None:
        def draw() -> tuple[float, float, float]:
            return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

        datasets.seed_all(3)
        expected = draw()
        datasets.seed_all(3)
        with datasets.seeded(5):
            inside = draw()
        assert draw() == expected
        with datasets.seeded(5):
            assert draw() == inside

    def test_options_of_a_folder_are_the_papers_unless_given(self, folder_data: Path) -> None:
        config = train.resolve(train.Config(data=folder_data, model="convit_small", mixup=0.1))
        assert (config.embed_dim, config.num_heads, config.local_up_to_layer) == (432, 9, 10)
        assert config.mixup == 0.1 and config.cutmix == train.RECIPES["folder"]["cutmix"]
        assert train.resolve(train.Config(data=folder_data, model="deit_small")).local_up_to_layer == 0


def test_the_average_of_the_weights_is_what_is_evaluated(config: train.Config) -> None:
    run = trainer(dataclasses.replace(config, ema_decay=0.99))
    run.train(progress=False)
    assert isinstance(run.average, ModelEmaV3)
    written, average = weights(config.output), run.average.module.state_dict()
    assert all(torch.equal(written[name], average[name]) for name in average)
    assert not torch.equal(written["head.weight"], run.model.head.weight)
