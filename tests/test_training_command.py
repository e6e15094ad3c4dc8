"""examples/train.py: whatever goes wrong ends in one line, loses nothing, and the run resumes; what a person sees."""

import dataclasses
import gzip
import io
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import train as command
from rich.console import Console
from tiny_images import TRAIN, learnable_images, write_folder
from tiny_runs import rows, tiny_options, trainer
from torch import Tensor
from training import files, terminal
from training.config import RECIPES, Options
from training.data import IDX_FILES, write_idx
from training.trainer import Trainer, train
from typer import Exit
from typer.testing import CliRunner, Result


def invoke(options: Options) -> Result:
    arguments = []
    for name, value in vars(options).items():
        option = f"--{name.replace('_', '-')}"
        if value is True and name != "pos_embed":
            arguments.append(option)
        elif value is not None and not isinstance(value, bool):
            arguments.append(f"{option}={value}")
    return CliRunner().invoke(command.app, arguments)


def error(result: Result) -> str:
    """The one line that a command ended with, after lines of progress."""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    assert isinstance(result.exception, SystemExit)
    return line


def resumed(options: Options, **change: Any) -> Result:
    return invoke(dataclasses.replace(options, resume="auto", **change))


def checkpoint(options: Options) -> dict[str, Any]:
    return files.read_checkpoint(options.output / files.CHECKPOINT)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Trainer], None]) -> None:
    """Has something happen in a run once so many steps have been taken."""
    take_step = Trainer._take_step

    def with_action(run: Trainer, *batch: Tensor) -> Tensor:
        if run.step == step:
            action(run)
        return take_step(run, *batch)

    monkeypatch.setattr(Trainer, "_take_step", with_action)


class TestBadInput:
    """One line on stderr, exit status 2, and the output folder as it was."""

    def fails(self, options: Options, **change: Any) -> str:
        options = dataclasses.replace(options, **change)
        before = {path: path.read_bytes() for path in options.output.rglob("*") if path.is_file()}
        existed = options.output.exists()
        result = invoke(options)
        assert result.exit_code == 2, result.output
        assert options.output.exists() == existed
        assert before == {path: path.read_bytes() for path in options.output.rglob("*") if path.is_file()}
        assert result.stderr.count("\n") == 1
        return error(result)

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"patch_size": 5}, "12 x 12 pixels does not divide into patches of 5 x 5"),
            ({"local_up_to_layer": 3}, "must be from 0 to depth"),
            ({"sampling_ratio": 0.0}, "--sampling-ratio must be above 0 and at most 1, but is 0.0"),
            ({"sampling_ratio": 1.5}, "at most 1, but is 1.5"),
            ({"sampling_ratio": 0.05}, "do not fill one step of 8"),
            ({"epochs": 0}, "--epochs must be at least 1"),
            ({"lr": math.nan}, "--lr must be at least 0, but is nan"),
            ({"steps": 5}, "--epochs or --steps, not both"),
            ({"mixup": 0.8, "batch_size": 7}, "must be even"),
            ({"model": "resnet50"}, "--model must be one of convit_tiny"),
            ({"reprob": 0.5}, "--reprob is not for the data in"),
            ({"resume": "nowhere.pt"}, "there is no checkpoint nowhere.pt"),
            ({"change_lr": True}, "--change-lr is for a run that goes on: give --resume, too"),
            ({"device": "graphics"}, "--device graphics cannot be used here, but cpu"),
            ({"device": "meta"}, "--device meta cannot be used here, but cpu"),
            ({"device": "cuda:99"}, "--device cuda:99 cannot be used here, but cpu"),
        ],
    )
    def test_options(self, options: Options, change: dict[str, Any], words: str) -> None:
        assert words in self.fails(options, **change)

    def test_an_output_that_cannot_be_a_folder(self, options: Options, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        assert "is no folder, or not yours to write" in self.fails(options, output=tmp_path / "file" / "run")
        assert "is no folder, or not yours to write" in self.fails(options, output=tmp_path / "file")
        assert (tmp_path / "file").read_text() == "kept"

    def test_missing_data_say_what_to_install(self, options: Options, tmp_path: Path) -> None:
        text = self.fails(options, data=tmp_path / "nothing")
        assert "apt-get install dataset-fashion-mnist" in text and str(tmp_path / "nothing") in text

    @pytest.mark.parametrize("split", [0, 1])
    def test_truncated_data(self, options: Options, idx_data: Path, tmp_path: Path, split: int) -> None:
        for path in idx_data.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        name = IDX_FILES["test"][split]
        truncate(tmp_path / name)
        text = self.fails(options, data=tmp_path)
        assert name in text and "may be truncated" in text
        (tmp_path / name).unlink()
        assert f"{name} is missing" in self.fails(options, data=tmp_path)

    def test_data_that_are_shorter_than_their_header_says(self, options: Options, tmp_path: Path) -> None:
        images, labels = learnable_images(TRAIN, 0)
        for split in ("train", "test"):
            write_idx(tmp_path / IDX_FILES[split][0], images)
            write_idx(tmp_path / IDX_FILES[split][1], labels)
        path = tmp_path / IDX_FILES["train"][0]
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
        assert "is damaged: its header tells of shape (96, 12, 12)" in self.fails(options, data=tmp_path)

    def test_folders_with_other_classes(self, options: Options, folder_data: Path, tmp_path: Path) -> None:
        for split, label in (("train", "cat"), ("val", "dog")):
            (tmp_path / split / label).mkdir(parents=True)
            source = next((folder_data / split / label).iterdir())
            (tmp_path / split / label / source.name).write_bytes(source.read_bytes())
        assert "must have the same classes, but differ in cat, dog" in self.fails(
            options, data=tmp_path, crop_padding=None
        )

    @pytest.mark.parametrize(
        "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: torch.save({}, path)]
    )
    def test_damaged_checkpoints(self, options: Options, damage: Callable[[Path], None]) -> None:
        train(options, show_progress=False)
        damage(options.output / files.CHECKPOINT)
        text = self.fails(options, resume="auto")
        assert "cannot be read, it may be truncated" in text or "is no checkpoint" in text

    def test_a_folder_that_holds_another_run(self, options: Options) -> None:
        train(options, show_progress=False)
        assert "--resume auto goes on with it" in self.fails(options)
        assert "of another run: seed was 0 and is 1" in self.fails(options, seed=1, resume="auto")
        assert "lr was 0.2 and is 0.1: --change-lr allows it" in self.fails(options, lr=0.1, resume="auto")
        assert "--change-lr" not in self.fails(options, lr=0.1, seed=1, resume="auto").split("lr was")[1]


def poison(run: Trainer) -> None:
    with torch.no_grad():
        run.model.head.bias.fill_(math.nan)


class TestNotFinite:
    """NaN and infinity end the run with exit status 1, and never reach a checkpoint or the weights."""

    def test_a_loss(self, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            before_step(patch, 12, poison)
            result = invoke(options)
        assert result.exit_code == 1
        assert error(result) == (
            f"error: the loss is nan at step 13: the last good checkpoint, of step 12, stays in {options.output}/"
            "checkpoint.pt; go on from it with --resume auto --change-lr and a --lr below 0.2"
        )
        assert checkpoint(options)["step"] == 12
        assert not (options.output / files.WEIGHTS).exists()
        assert resumed(options).exit_code == 0

    @pytest.mark.parametrize("average", [0.0, 0.9])
    def test_weights_between_two_rows_of_the_log(
        self, options: Options, average: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = dataclasses.replace(options, checkpoint_every=2, log_every=1000, ema_decay=average)
        with monkeypatch.context() as patch:
            before_step(patch, 5, poison)
            result = invoke(options)
        assert result.exit_code == 1
        text = error(result)
        assert "is not finite after step 6: the last good checkpoint, of step 4" in text
        state = checkpoint(options)
        assert state["step"] == 4 and list(files.not_finite(state)) == []
        assert resumed(options).exit_code == 0

    def test_before_the_first_checkpoint(self, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
        before_step(monkeypatch, 0, poison)
        result = invoke(dataclasses.replace(options, amp=True))
        assert result.exit_code == 1
        assert error(result).endswith(
            "and no checkpoint was written yet: start again with a --lr below 0.2 or float32 (without --amp)"
        )

    def test_a_checkpoint_that_is_not_finite_makes_no_weights(self, options: Options) -> None:
        train(options, show_progress=False)
        path = options.output / files.CHECKPOINT
        state = files.read_checkpoint(path)
        state["model"]["head.bias"].fill_(math.inf)
        torch.save(state, path)
        good = (options.output / files.WEIGHTS).read_bytes()
        result = resumed(options)
        assert result.exit_code == 1 and "head.bias is not finite after step 36" in error(result)
        assert (options.output / files.WEIGHTS).read_bytes() == good

    def test_another_learning_rate_goes_on_where_the_first_diverged(self, options: Options) -> None:
        good = dataclasses.replace(options, evaluate_every=12)
        run = trainer(good)
        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, 12, poison)
            with pytest.raises(FloatingPointError):
                run.train(show_progress=False)
        result = resumed(good, lr=0.1, change_lr=True)
        assert result.exit_code == 0, result.output
        rates = [float(row["lr"]) for row in rows(options.output)]
        assert len(rates) == 36
        alone = dataclasses.replace(good, lr=0.1, output=options.output / "alone")
        train(alone, show_progress=False)
        expected = [float(row["lr"]) for row in rows(alone.output)]
        assert rates[12:] == expected[12:] and rates[11] == pytest.approx(2 * expected[11], rel=0.01)
        assert checkpoint(options)["identity"]["lr"] == 0.1


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: as on a full disk, writing fails with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisk:
    @pytest.mark.parametrize("size, name", [(20_000, files.CHECKPOINT), (400, files.STEPS_LOG)])
    def test_ends_the_run_and_keeps_its_files(
        self, options: Options, size: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = dataclasses.replace(options, output=tmp_path / "whole", checkpoint_every=5)
        options = dataclasses.replace(options, checkpoint_every=5)
        train(whole, show_progress=False)
        with room(2**30), monkeypatch.context() as patch:  # `room` restores the limit, which the run lowers
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            before_step(patch, 7, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
            result = invoke(options)
        assert result.exit_code == 1
        assert f"{name} cannot be written: File too large" in error(result)
        assert checkpoint(options)["step"] == 5
        assert list(options.output.glob("*.tmp")) == []
        assert resumed(options).exit_code == 0
        assert rows(options.output) == rows(whole.output)
        ours, theirs = (files.load_weights(run.output / files.WEIGHTS)[0].state_dict() for run in (options, whole))
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []

    def test_what_a_kill_left_behind_is_freed_before_anything_is_written(
        self, options: Options, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(dataclasses.replace(options, epochs=1, steps=None), show_progress=False)
        leftovers = [options.output / f"{name}.tmp" for name in (files.CHECKPOINT, files.WEIGHTS)]
        for path in leftovers:
            path.write_bytes(b"half")
        present: list[bool] = []
        write = files.write_atomically

        def writing(path: Path, content: Callable[[Path], Any]) -> None:
            present.extend(leftover.exists() for leftover in leftovers)
            write(path, content)

        monkeypatch.setattr(files, "write_atomically", writing)
        train(dataclasses.replace(options, epochs=1, resume="auto"), show_progress=False)
        assert present and not any(present)

    def test_a_row_that_does_not_fit_is_not_written_again_later(self, tmp_path: Path) -> None:
        log = files.CsvLog(tmp_path / "log.csv", ("step", "loss"), None)
        log.append({"step": 1, "loss": 0.5})
        with room(25), pytest.raises(OSError, match=r"log.csv cannot be written: File too large"):
            log.append({"step": 2, "loss": 0.123456789})
        log.file.close()
        files.CsvLog(tmp_path / "log.csv", ("step", "loss"), resumed_step=1).append({"step": 2, "loss": 0.4})
        assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.5", "2,0.4"]


def test_a_log_with_other_columns_is_kept(options: Options) -> None:
    options = dataclasses.replace(options, epochs=1)
    train(options, show_progress=False)
    log = options.output / files.EVALUATIONS_LOG
    before = log.read_bytes()
    result = resumed(options, locality_images=0)
    assert result.exit_code == 1
    assert error(result) == f"error: {log} has other columns than this run: move it away to resume"
    assert log.read_bytes() == before


class TestDamagedImage:
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_is_named_and_the_run_resumes_with_a_whole_one(self, tmp_path: Path, split: str, workers: int) -> None:
        folder = write_folder(tmp_path / "images", "jpg")
        path = folder / split / "dog" / "1.jpg"
        whole = path.read_bytes()
        truncate(path)
        change = {"img_size": 16, "crop_padding": None, "epochs": 1, "batch_size": 4, "repeats": 1, "workers": workers}
        options = tiny_options(folder, tmp_path / "run", **change)
        result = invoke(options)
        assert result.exit_code == 1
        assert f"{path} cannot be read as an image: " in error(result)
        path.write_bytes(whole)
        assert resumed(options).exit_code == 0


class TestWhatAPersonSees:
    def test_help_has_the_defaults_of_each_recipe(self) -> None:
        result = CliRunner().invoke(command.app, ["--help"], env={"COLUMNS": "200"})
        text = " ".join(result.stdout.replace("│", " ").split())
        assert "--epochs <int> Passes over the training images. [default: (Fashion-MNIST 10, folder 300)]" in text
        assert f"folder {RECIPES['folder']['auto_augment']}" in text
        assert "Label smoothing. [default: (0.1)]" in text

    def test_without_a_terminal_progress_is_lines(self, options: Options) -> None:
        result = invoke(options)
        lines = result.stderr.splitlines()
        assert [line.split(",")[0] for line in lines[:3]] == ["step 12 of 36", "step 24 of 36", "step 36 of 36"]
        assert "loss " in lines[0] and "images/s" in lines[0] and " left" in lines[0]
        assert "test accuracy" in lines[-1]
        assert "\x1b" not in result.stderr and "\r" not in result.stderr

    def test_lines_come_at_intervals(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        clock = iter(range(0, 1000, 10))
        monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
        with terminal.progress(100, unit="run") as show:
            for done in range(1, 8):
                show(done, "fine", done == 7)
        assert capsys.readouterr().err.splitlines() == [
            "run 3 of 100, fine, 16 min left",
            "run 6 of 100, fine, 16 min left",
            "run 7 of 100, fine, 16 min left",
        ]

    def test_on_a_terminal_it_is_a_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.StringIO()
        monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=True, width=100))
        with terminal.progress(10) as show:
            show(4, "loss 1.5", False)
        assert "4/10" in screen.getvalue() and "loss 1.5" in screen.getvalue() and "\x1b" in screen.getvalue()

    def test_errors_are_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        for context, raised, code in (
            (terminal.wrong_input, ValueError("this\nvalue"), 2),
            (terminal.failures, FloatingPointError("this\nvalue"), 1),
        ):
            with pytest.raises(Exit) as ended, context():
                raise raised
            assert ended.value.exit_code == code
            assert capsys.readouterr().err == "error: this value\n"
