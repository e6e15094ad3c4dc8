"""examples/sample_efficiency.py: what is run, what is kept, and what the tables say of it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sample_efficiency as study
import train
from typer.testing import CliRunner

RUN = study.Run("a", 0.1, 0)
DOCS = Path(__file__).parent.parent / "docs" / "sample_efficiency"


def results(seeds: int = 3) -> dict[study.Run, dict[str, Any]]:
    """Accuracies that are told by row, ratio and seed."""
    found = {}
    for run in study.runs(study.Study(seeds=seeds)):
        accuracy = 0.5 + 0.1 * run.ratio + 0.01 * run.seed + (0.05 if run.row == study.CONVIT else 0)
        found[run] = {"test_accuracy": accuracy, "test_loss": 1 - accuracy, "seconds": 60.0}
    return found


def test_a_study_has_both_models_at_each_ratio_and_every_row_at_a_tenth() -> None:
    runs = study.runs(study.Study(ratios=(0.1, 1.0), seeds=2))
    assert len(runs) == len(set(runs)) == 2 * (2 * 2 + 5)
    assert {run.row for run in runs if run.ratio == 1.0} == {"a", "e"}
    assert {run.row for run in runs if run.ratio == 0.1} == set("abcdefg")
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_runs_differ_in_row_share_and_seed_alone() -> None:
    configs = [study.run_config(run, study.Study(), Path("data"), Path("out")) for run in study.runs(study.Study())]
    differ = {
        field.name for field in dataclasses.fields(train.Config) if len({getattr(c, field.name) for c in configs}) > 1
    }
    assert differ == {"output", "ablation", "sampling_ratio", "seed"}


def test_tables_give_mean_and_spread() -> None:
    found = study.accuracies(results())
    efficiency = study.efficiency_table(found).splitlines()
    assert len(efficiency) == 2 + 5
    assert efficiency[-1] == "| 100% | 61.0 ± 1.0 | 66.0 ± 1.0 | +5.0 ± 0.0 | +8.2 % | +1.9 % |"
    ablation = study.ablation_table(found).splitlines()
    assert len(ablation) == 2 + 7
    assert ablation[2] == "| a | ConViT | 57.0 ± 1.0 | 59.7 |"
    assert "±" not in study.efficiency_table(study.accuracies(results(seeds=1)))


@pytest.mark.filterwarnings("error")
def test_files_are_written(idx_data: Path, tmp_path: Path) -> None:
    config = study.run_config(RUN, study.Study(), idx_data, tmp_path)
    text = study.write_results(study.Study(), results(), config, tmp_path)
    assert (tmp_path / "tables.md").read_text() == text
    assert study.read_results(tmp_path / study.RESULTS) == results()
    assert (tmp_path / "figure.svg").stat().st_size > 0 and (tmp_path / "figure.png").stat().st_size > 0


def test_the_committed_tables_are_what_the_committed_results_make(idx_data: Path) -> None:
    found = study.read_results(DOCS / study.RESULTS)
    assert set(found) == set(study.runs(study.Study()))
    config = study.run_config(RUN, study.Study(), idx_data, Path("out"))
    assert (DOCS / study.TABLES).read_text() == study.report(study.Study(), found, config)


def test_a_finished_run_is_not_repeated(idx_data: Path, tmp_path: Path) -> None:
    config = study.run_config(RUN, study.Study(steps=2), idx_data, tmp_path)
    config = dataclasses.replace(config, sampling_ratio=1.0, batch_size=8)
    result = study.execute(config)
    assert study.finished(config) == result
    before = os.stat(config.output / train.WEIGHTS)
    assert study.run_all({RUN: config}, jobs=1) == {RUN: result}
    assert os.stat(config.output / train.WEIGHTS) == before
    assert not (config.output / train.CHECKPOINT).exists()
    with pytest.raises(ValueError, match="is of another study"):
        study.finished(dataclasses.replace(config, steps=3))


def test_bad_input(tmp_path: Path) -> None:
    result = CliRunner().invoke(study.app, ["--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "apt-get install dataset-fashion-mnist" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_whole_of_it(idx_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a study of one step, in another process."""
    monkeypatch.setattr(study, "QUICK", study.Study(ratios=(0.9, 1.0), seeds=1, steps=1))
    monkeypatch.setattr(study, "ABLATION_RATIO", 0.9)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    arguments = ["--data", str(idx_data), "--output", str(tmp_path), "--quick", "--jobs", "1"]
    result = CliRunner().invoke(study.app, arguments)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*/result.json"))) == 2 * 2 + 5
    settings = json.loads((tmp_path / "g-0.9-seed0" / "result.json").read_text())["settings"]
    assert settings["ablation"] == "g"
