"""examples/training: what a run learns is exact, a kill costs nothing, several processes agree."""

import dataclasses
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from tiny_images import SIZE, TEST
from tiny_runs import EXAMPLES, MODEL, rows, trainer
from torch import Tensor
from training import files
from training.config import Options
from training.data import evaluation_plan
from training.trainer import Trainer, train


def losses(output: Path) -> Tensor:
    return torch.tensor([float(row["loss"]) for row in rows(output)])


def weights(output: Path) -> dict[str, Tensor]:
    return files.load_weights(output / files.WEIGHTS)[0].state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and logs, to the bit."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for log in (files.STEPS_LOG, files.EVALUATIONS_LOG):
        assert rows(one, log) == rows(other, log)


class TestTraining:
    def test_a_model_learns(self, options: Options) -> None:
        found = train(dataclasses.replace(options, epochs=12), show_progress=False)
        assert found["test_accuracy"] > 0.8

    def test_a_cnn_learns_in_a_convit_s_place(self, options: Options) -> None:
        options = dataclasses.replace(options, epochs=12, cnn=True)
        found = train(options, show_progress=False)
        assert found["test_accuracy"] > 0.8
        assert not any(name.startswith("nonlocality") for name in rows(options.output, files.EVALUATIONS_LOG)[0])
        with pytest.raises(ValueError, match="holds no weights of a ConViT"):
            files.load_weights(options.output / files.WEIGHTS)

    @pytest.mark.parametrize("change", [{"ablation": "b"}, {"reference": True}, {"stem": "conv"}], ids=str)
    def test_a_cnn_has_no_attention_to_set(self, options: Options, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="--cnn has no attention"):
            trainer(dataclasses.replace(options, cnn=True, **change))

    def test_fused_and_reference_layers_give_the_same_loss_curve(self, options: Options, tmp_path: Path) -> None:
        """50 steps from one seed: what differs is rounding, far below what another seed makes of it."""
        options = dataclasses.replace(options, epochs=None, steps=50, depth=4, local_up_to_layer=3, drop_path=0.1)
        curves = []
        for name, change in (("fused", {}), ("reference", {"reference": True}), ("other", {"seed": 1})):
            run = trainer(dataclasses.replace(options, output=tmp_path / name, **change))
            assert {block.attn.backend for block in run.model.blocks[:3]} == {
                "reference" if name == "reference" else None
            }
            run.train(show_progress=False)
            curves.append(losses(tmp_path / name))
        fused, reference, other = curves
        assert len(fused) == 50
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)
        assert (fused - other).abs().mean() > 1e-2
        assert fused[-10:].mean() < 0.9 * fused[:10].mean()

    def test_the_weights_rebuild_the_model(self, options: Options) -> None:
        found = train(options, show_progress=False)
        model, metadata = files.load_weights(options.output / files.WEIGHTS)
        ((images, labels),) = trainer(dataclasses.replace(options, resume="auto")).data.test.batches(
            evaluation_plan(TEST, TEST)
        )
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
        assert accuracy == found["test_accuracy"] == metadata["test_accuracy"]
        assert metadata["model"]["embed_dim"] == MODEL["embed_dim"] and metadata["step"] == 36

    def test_learning_rate_warms_up_and_follows_a_cosine(self, options: Options) -> None:
        options = dataclasses.replace(options, epochs=None, steps=41, lr=0.064, min_lr=1e-5, warmup_epochs=1)
        train(options, show_progress=False)
        rates = [float(row["lr"]) for row in rows(options.output)]
        assert rates[0] == options.warmup_lr
        assert rates[12] == max(rates) == pytest.approx(0.064 * 8 / 512)
        assert rates[-1] < 1e-5 + 0.01 * rates[12]

    def test_bfloat16(self, options: Options) -> None:
        found = train(dataclasses.replace(options, amp=True, epochs=6), show_progress=False)
        assert found["test_accuracy"] > 0.5
        assert {tensor.dtype for tensor in weights(options.output).values()} == {torch.float32}

    def test_tensorboard_and_locality_logs(self, options: Options) -> None:
        train(dataclasses.replace(options, tensorboard=True), show_progress=False)
        assert list((options.output / "tensorboard").glob("events*"))
        evaluations = rows(options.output, files.EVALUATIONS_LOG)
        assert [row["step"] for row in evaluations] == ["0", "12", "24", "36"]
        assert evaluations[0]["test_accuracy"] == ""
        for row in evaluations:
            assert 0 < float(row["nonlocality_0"]) < SIZE / 4
            assert 0 < float(row["gate_0_3"]) < 1

    @pytest.mark.parametrize("ablation", ["b", "e", "g"])
    def test_ablations_leave_frozen_parameters_alone(self, options: Options, ablation: Any) -> None:
        run = trainer(dataclasses.replace(options, ablation=ablation))
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        run.train(show_progress=False)
        moved = {name for name, value in weights(options.output).items() if not torch.equal(before[name], value)}
        frozen = {name for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
        assert moved.isdisjoint(frozen)
        # a constant cancels in the softmax
        assert before.keys() - moved - frozen <= {"blocks.0.attn.pos_proj.bias"}
        assert bool(frozen) == (ablation != "e")

    def test_a_loss_that_is_not_finite_ends_the_run(self, options: Options) -> None:
        run = trainer(options)
        with torch.no_grad():
            run.model.head.bias.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="at step 1"):
            run.train(show_progress=False)
        assert not (options.output / files.WEIGHTS).exists()


def test_init_gain_scales_what_is_random_and_nothing_else(options: Options) -> None:
    run = trainer(dataclasses.replace(options, embed_dim=64, init_gain=0.5))
    attention, plain = (block.attn for block in run.model.blocks)
    for linear in (attention.qk, attention.proj, plain.qkv, run.model.blocks[0].mlp.fc2):
        assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(0.5, rel=0.05)
    assert torch.equal(attention.v.weight, torch.eye(64))
    assert attention.pos_proj.weight[0].tolist() == [-1.0, -1.0, -1.0]
    random_values = (
        trainer(dataclasses.replace(options, embed_dim=64, init_gain=0.5, ablation="c")).model.blocks[0].attn.v
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
        self, options: Options, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.stop_and_resume(dataclasses.replace(options, checkpoint_every=5), change, 9, tmp_path, monkeypatch)

    def test_with_a_folder_of_images(
        self, options: Options, folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = {"data": folder_data, "img_size": 16, "workers": 0, "checkpoint_every": 3, "crop_padding": None}
        self.stop_and_resume(options, EVERYTHING | images, 5, tmp_path, monkeypatch)

    def stop_and_resume(
        self, options: Options, change: dict[str, Any], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = dataclasses.replace(options, **change, output=tmp_path / "whole")
        train(whole, show_progress=False)
        stopped = dataclasses.replace(whole, output=tmp_path / "stopped")
        run = trainer(stopped)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            if run.step == steps:
                raise StopError
            return Trainer._loss(run, images, labels)

        monkeypatch.setattr(run, "_loss", loss)
        with pytest.raises(StopError):
            run.train(show_progress=False)
        assert len(losses(stopped.output)) == steps
        torch.randn(3), np.random.rand(3), random.random()  # noqa: NPY002, as another process would have
        resumed = trainer(dataclasses.replace(stopped, resume="auto"))
        assert 0 < resumed.step < steps
        resumed.train(show_progress=False)
        assert_same_run(whole.output, stopped.output)

    def test_after_ten_kills_at_random_moments(
        self, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGKILL, ten times; the weights and logs are those of a run that nobody disturbed."""
        options = dataclasses.replace(options, checkpoint_every=2, steps=60, epochs=None, drop_path=0.2, ema_decay=0.9)
        undisturbed = dataclasses.replace(options, output=tmp_path / "undisturbed")
        # processes are forked from one that has imported everything and computed nothing
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), *sys.path]))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training.trainer"])

        def start(run: Options) -> Any:
            process = context.Process(target=train, args=(run, False))
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
            process = start(dataclasses.replace(options, output=output, resume="auto"))
            while process.exitcode != 0:
                process.join(moments.uniform(0, 0.8 * duration) if kills < 10 else None)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    kills += 1
                    process = start(dataclasses.replace(options, output=output, resume="auto"))
                assert process.exitcode in (None, 0)
            assert_same_run(undisturbed.output, output)
            assert sorted(path.name for path in output.iterdir()) == sorted(
                path.name for path in undisturbed.output.iterdir()
            )

    def test_a_checkpoint_of_an_older_version(self, options: Options) -> None:
        """It has None where there is 0 or "" now, and the state of the learning rate's schedule."""
        train(options, show_progress=False)
        path = options.output / files.CHECKPOINT
        state = files.read_checkpoint(path)
        assert state["identity"]["steps"] == 0 and state["identity"]["img_size"] == 0
        state["identity"] |= dict.fromkeys(("steps", "warmup_steps", "img_size", "auto_augment", "reprob"))
        torch.save(state | {"schedule": {}}, path)
        assert trainer(dataclasses.replace(options, resume="auto")).step == 36

    def test_a_log_row_that_was_cut_short_is_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "log.csv"
        path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4,0")
        files.CsvLog(path, ("step", "loss"), resumed_step=2).append({"step": 3, "loss": 0.25})
        assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.4", "3,0.25"]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def fail(temporary: Path) -> None:
            temporary.write_text("half of the n")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            files.write_atomically(path, fail)
        assert path.read_text() == "old"


WORKER = """
import dataclasses, sys, torch
from pathlib import Path
from training.config import Options, resolve
from training.distributed import processes
from training.trainer import Trainer
torch.set_num_threads(1)
out = Path(sys.argv[1])
options = Options(data=Path(sys.argv[2]), output=out / "ddp", batch_size=4, epochs=2, lr=0.2,
    hflip=0.0, crop_padding=0, warmup_epochs=0.2, locality_images=4, log_every=1, checkpoint_every=5, device="cpu",
    **{model})
with processes(torch.device("cpu")) as group:
    run = Trainer(resolve(options, "idx"), group)
    run.train(show_progress=False)
    torch.save(run.model.state_dict(), out / f"rank{{group.rank}}.pt")
    fsdp = resolve(dataclasses.replace(options, output=out / "fsdp", fsdp=True), "idx")
    Trainer(fsdp, group).train(show_progress=False)
    again = dataclasses.replace(fsdp, output=out / "again", resume=str(out / "fsdp" / "checkpoint.pt"))
    Trainer(again, group).train(show_progress=False)
"""


def test_two_processes_train_as_one(options: Options, tmp_path: Path) -> None:
    """Half the batch each, by DDP and by FSDP2: the weights of one process with all of it, and the same on both."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(model=MODEL))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
    }
    done = subprocess.run(
        [*launch, script, tmp_path, options.data], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []

    alone = dataclasses.replace(options, output=tmp_path / "alone", epochs=2, hflip=0.0, crop_padding=0)
    train(alone, show_progress=False)
    for output in ("ddp", "fsdp", "again"):
        for name, tensor in weights(tmp_path / output).items():
            torch.testing.assert_close(
                tensor, weights(alone.output)[name], rtol=1e-3, atol=1e-5, msg=f"{output} {name}"
            )
        ours, theirs = (rows(path, files.EVALUATIONS_LOG)[-1] for path in (tmp_path / "ddp", alone.output))
        assert ours["test_accuracy"] == theirs["test_accuracy"]
    torch.testing.assert_close(losses(tmp_path / "ddp"), losses(alone.output), rtol=1e-4, atol=1e-5)


def test_the_average_of_the_weights_is_what_is_evaluated(options: Options) -> None:
    run = trainer(dataclasses.replace(options, ema_decay=0.99))
    run.train(show_progress=False)
    assert isinstance(run.average, ModelEmaV3)
    written, average = weights(options.output), run.average.module.state_dict()
    assert all(torch.equal(written[name], average[name]) for name in average)
    assert not torch.equal(written["head.weight"], run.model.head.weight)
