"""examples/training/study.py: what is run, what is kept, and what the tables say of it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sample_efficiency
from training import files, study
from training.config import Options
from typer.testing import CliRunner

RUN = study.Run("a", 0.1, 0)
DOCS = Path(__file__).parent.parent / "docs"


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
    configs = [study.run_options(run, study.Study(), Path("data"), Path("out")) for run in study.runs(study.Study())]
    differ = {field.name for field in dataclasses.fields(Options) if len({getattr(c, field.name) for c in configs}) > 1}
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
def test_files_are_written(tmp_path: Path) -> None:
    study.write_results(results(), tmp_path)
    assert study.read_results(tmp_path / study.RESULTS, study.Study()) == results()
    assert "<svg" in (tmp_path / study.FIGURE).read_text()
    with pytest.raises(ValueError, match="has other runs than this study: give the --quick and --seeds"):
        study.read_results(tmp_path / study.RESULTS, study.QUICK)


def test_tables_come_into_the_place_that_a_page_has_for_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{study.BEGIN}\nold\n{study.END}\n\nText.\n")
    study.write_page(page, "| table |\n")
    assert page.read_text() == f"# Title\n\n{study.BEGIN}\n\n| table |\n\n{study.END}\n\nText.\n"
    page.write_text("# Title\n")
    arguments = ["--quick", "--page", str(page), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 2 and f"{page} has no place for the tables" in result.stderr
    assert page.read_text() == "# Title\n"


def test_the_page_has_what_the_committed_results_make(tmp_path: Path) -> None:
    """The command that publishes a study, on the results that are committed: it changes nothing."""
    page = tmp_path / "study.md"
    committed = (DOCS / "study.md").read_text()
    page.write_text(committed.replace("| a | ConViT |", "| a | changed by hand |"))
    arguments = ["--from", str(DOCS / "sample_efficiency" / study.RESULTS), "--page", str(page)]
    result = CliRunner().invoke(sample_efficiency.app, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert page.read_text() == committed
    assert (tmp_path / study.RESULTS).read_bytes() == (DOCS / "sample_efficiency" / study.RESULTS).read_bytes()


def test_a_finished_run_is_not_repeated(idx_data: Path, tmp_path: Path) -> None:
    options = study.run_options(RUN, study.Study(steps=2), idx_data, tmp_path)
    options = dataclasses.replace(options, sampling_ratio=1.0, batch_size=8)
    result = study.execute(options)
    assert study.finished(options) == result
    before = os.stat(options.output / files.WEIGHTS)
    assert study.run_all({RUN: options}, jobs=1) == {RUN: result}
    assert os.stat(options.output / files.WEIGHTS) == before
    assert not (options.output / files.CHECKPOINT).exists()
    with pytest.raises(ValueError, match="is of another study"):
        study.finished(dataclasses.replace(options, steps=3))


def test_bad_input(idx_data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 2 and "apt-get install dataset-fashion-mnist" in result.stderr
    result = CliRunner().invoke(sample_efficiency.app, [*arguments, "--from", str(tmp_path / "none.csv")])
    assert result.exit_code == 2 and "none.csv" in result.stderr and result.stderr.count("\n") == 1
    arguments[1] = str(idx_data)  # of its 96 images a hundredth is too few
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 2 and "3 training images do not fill one step of 16" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_whole_of_it(idx_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a study of one step, in another process."""
    monkeypatch.setattr(sample_efficiency, "QUICK", study.Study(ratios=(0.9, 1.0), seeds=1, steps=1))
    monkeypatch.setattr(study, "ABLATION_RATIO", 0.9)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    arguments = ["--data", str(idx_data), "--output", str(tmp_path), "--quick", "--jobs", "1"]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*/result.json"))) == 2 * 2 + 5
    settings = json.loads((tmp_path / "g-0.9-seed0" / "result.json").read_text())["settings"]
    assert settings["ablation"] == "g"
