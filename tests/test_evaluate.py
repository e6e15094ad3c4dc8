"""examples/evaluate.py: what it compares, that a wrong kernel is told, and the model that comes with the project."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import data as datasets
import evaluate
import pytest
import torch
import train
from timm.models.convit import ConVit
from tiny_images import TEST
from typer.testing import CliRunner

from convit_kernels import models

BOX = evaluate.IN_THE_BOX


CONFIG = train.Config(
    embed_dim=16, num_heads=4, depth=3, local_up_to_layer=2, patch_size=4, batch_size=8, steps=20, lr=0.2, device="cpu"
)


@pytest.fixture(scope="session")
def trained(idx_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The weights of a small model after some steps, and its accuracy."""
    output = tmp_path_factory.mktemp("run")
    found = train.train(dataclasses.replace(CONFIG, data=idx_data, output=output), progress=False)
    return output / train.WEIGHTS, found["test_accuracy"]


def run(*arguments: object) -> "tuple[int, str]":
    result = CliRunner().invoke(evaluate.app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_eager_is_timms_model_with_the_same_weights(trained: tuple[Path, float]) -> None:
    fused, metadata = train.load_weights(trained[0])
    twin = evaluate.timm_twin(metadata["model"], fused.state_dict())
    assert type(twin) is ConVit and type(fused) is models.ConViT
    images = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(twin(images), fused(images))


@pytest.mark.parametrize("batch", [10, 100])
def test_both_reach_the_accuracy_of_the_training(
    trained: tuple[Path, float], idx_data: Path, tmp_path: Path, batch: int
) -> None:
    path, accuracy = trained
    code, output = run("--weights", path, "--data", idx_data, "--batch", batch, "--json", tmp_path / "found.json")
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == TEST and found["differing_predictions"] == 0
    assert list(found["accuracy"].values()) == [pytest.approx(accuracy)] * 2
    assert found["checked_images"] == min(TEST, batch * evaluate.CHECKED_BATCHES)
    assert "plain attention" in output and "non-locality" in output


def test_times_faster_is_the_benchmarks_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager takes 4, 4 and 1 seconds, ours 4, 1 and 1: four times faster by the medians, not at all by the pairs."""
    taken = [1, 4, 4, 4, 1, 1, 1]  # before the first batch is over, which only warms up; then of both in turn
    clock = itertools.accumulate(step for seconds in taken for step in (0, seconds))
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    images, labels = torch.randn(2, 8), torch.zeros(2)
    test = SimpleNamespace(labels=torch.zeros(6), batches=lambda plan: [(images, labels)] * len(plan))
    models = {"eager": torch.nn.Linear(8, 3), "fused": torch.nn.Linear(8, 3)}
    found = evaluate.compare(models, test, 2, "cpu", lambda: None)
    assert found.times_faster == {"eager": 1, "fused": 1}
    assert found.images_per_second == {"eager": 6 / 9, "fused": 1}


def test_a_wrong_model_is_told(trained: tuple[Path, float], idx_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = train.load_weights

    def wrong(path: Path) -> tuple[models.ConViT, dict]:
        model, metadata = right(path)
        twin = evaluate.timm_twin(metadata["model"], model.state_dict())
        monkeypatch.setattr(evaluate, "timm_twin", lambda *_: twin)
        with torch.no_grad():
            model.blocks[0].attn.gating_param += 1e-2
        return model, metadata

    monkeypatch.setattr(train, "load_weights", wrong)
    code, output = run("--weights", trained[0], "--data", idx_data)
    assert code == 1 and "FAIL" in output


def test_bad_input(trained: tuple[Path, float], idx_data: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    code, output = run("--weights", nothing, "--data", idx_data)
    assert code == 2 and "nothing" in output
    (tmp_path / "half").write_bytes(trained[0].read_bytes()[:-100])
    code, output = run("--weights", tmp_path / "half", "--data", idx_data)
    assert code == 2 and "truncated" in output
    code, output = run("--weights", trained[0], "--data", nothing)
    assert code == 2 and "apt-get install dataset-fashion-mnist" in output
    code, output = run("--weights", trained[0], "--data", nothing, "--skip-without-data")
    assert code == 0 and "apt-get install dataset-fashion-mnist" in output
    code, output = run("--weights", BOX, "--data", idx_data)
    assert code == 2 and "img_size [12, 12], not [28, 28]" in output
    code, output = run("--weights", nothing, "--data", nothing, "--skip-without-data")
    assert code == 2 and "No such file" in output


class TestTheModelInTheBox:
    def test_is_small_and_its_log_tells_the_same(self) -> None:
        assert BOX.stat().st_size < 2e6
        model, metadata = train.load_weights(BOX)
        assert sum(parameter.isfinite().all().item() for parameter in model.parameters()) == len([*model.parameters()])
        with (BOX.parent / train.EVALUATIONS_LOG).open(newline="") as file:
            last = list(csv.DictReader(file))[-1]
        assert float(last["test_accuracy"]) == pytest.approx(metadata["test_accuracy"])
        assert int(last["step"]) == metadata["step"]
        assert f"{100 * metadata['test_accuracy']:.2f} %" in (BOX.parent / "README.md").read_text()

    def test_is_as_accurate_as_it_says(self) -> None:
        if not (datasets.FASHION_MNIST / datasets.IDX_FILES["test"][0]).is_file():
            pytest.skip(f"no Fashion-MNIST in {datasets.FASHION_MNIST}; the log's accuracy is checked above")
        model, metadata = train.load_weights(BOX)
        test = train.load_data(train.resolve(train.Config(device="cpu"))).test
        correct = 0
        with torch.inference_mode():
            for images, labels in test.batches(datasets.evaluation_plan(len(test.labels), 500)):
                correct += int((model(images).argmax(1) == labels).sum())
        assert correct / len(test.labels) == pytest.approx(metadata["test_accuracy"], abs=2e-4)
