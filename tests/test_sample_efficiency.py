"""examples/training/study.py and report.py: what is run, what is kept, and what tables and figures say of it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sample_efficiency
from training import files, report, study
from training.config import Options
from typer.testing import CliRunner

STUDY = study.Study(ratios=(0.1, 1.0), lrs=(1e-2, 2e-2))
LRS = {study.CONVIT: 1e-2, study.DEIT: 2e-2, study.CNN: 1e-2}
RUN = study.Run(study.PLAIN, "a", 0.1, 0, 1e-2)
DOCS = Path(__file__).parent.parent / "docs"


def results(seeds: int = 3) -> dict[study.Run, dict[str, Any]]:
    """Accuracies that are told by row, ratio and seed; as if those learning rates were the best."""
    of = dataclasses.replace(STUDY, seeds=seeds)
    found: dict[study.Run, dict[str, Any]] = {}
    for run in [*study.choosing(of), *study.runs(of, LRS)]:
        accuracy = 0.5 + 0.1 * run.ratio + 0.01 * run.seed + (0.05 if run.row == study.CONVIT else 0)
        accuracy += 0.01 if run.row == study.CNN and run.seed == 1 else 0
        accuracy -= abs(run.lr - LRS[study.family(run.row)])
        rate = {study.REFERENCE: 100.0, study.BFLOAT16: 500.0}.get(run.row, 250.0)
        found[run] = dict(zip(study.MEASURED, (accuracy, 1 - accuracy, 0.9, rate, 3600.0), strict=True))
        found[run]["machine"] = "a machine"
    return found


def curves(of: study.Results) -> dict[study.Run, study.Curve]:
    found = {}
    for run, result in of.items():
        if run.task != study.VALIDATION:
            points = [
                {"step": 0.0},
                *({"step": s, "test_accuracy": result["test_accuracy"] - 2 + s} for s in (1.0, 2.0)),
            ]
            layers = {} if run.row == study.CNN else {"nonlocality_0": 1.5, "gate_0": 0.7, "nonlocality_1": 2.5}
            found[run] = [point | layers for point in points]
    return found


def test_a_study_has_the_families_at_each_ratio_and_the_ablation_at_a_tenth() -> None:
    of = dataclasses.replace(STUDY, seeds=2)
    runs = study.runs(of, LRS)
    assert len(runs) == len(set(runs)) == 2 * (2 * 2 * 3 + 3) + 2 + 3
    assert {run.row for run in runs if run.task == study.CLUTTERED and run.ratio == 0.1} == {
        *"abcde",
        "cnn",
        "reference",
        "bfloat16",
    }
    assert {run.row for run in runs if run.task == study.PLAIN or run.ratio == 1.0} == {"a", "e", "cnn"}
    assert [(run.row, run.ratio) for run in runs if run.task == study.LONGER] == [("a", 1.0), ("e", 1.0), ("cnn", 1.0)]
    seeds = [run.seed for run in runs if run.row in (*study.ABLATION, study.CNN) and run.task != study.LONGER]
    assert seeds == sorted(seeds)


def test_learning_rates_are_chosen_with_the_same_budget_for_each_family() -> None:
    choosing = study.choosing(STUDY)
    assert {(run.task, run.ratio, run.seed) for run in choosing} == {(study.VALIDATION, 0.1, 0)}
    assert {row: sum(run.row == row for run in choosing) for row in study.FAMILIES} == dict.fromkeys(study.FAMILIES, 2)
    assert study.chosen(STUDY, results()) == LRS
    lrs = {run.row: run.lr for run in study.runs(STUDY, LRS)}
    assert lrs == {**dict.fromkeys([*"abcd", study.REFERENCE, study.BFLOAT16], 1e-2), study.DEIT: 2e-2, study.CNN: 1e-2}
    alone = dataclasses.replace(STUDY, lrs=(3e-2,))
    assert study.choosing(alone) == [] and set(study.chosen(alone, {}).values()) == {3e-2}


def test_runs_differ_in_what_makes_them_alone() -> None:
    runs = [*study.choosing(STUDY), *study.runs(STUDY, LRS)]
    configs = [study.run_options(run, STUDY, Path("out")) for run in runs]
    assert len({config.output for config in configs}) == len(runs)
    differ = {field.name for field in dataclasses.fields(Options) if len({getattr(c, field.name) for c in configs}) > 1}
    length = {"steps", "warmup_steps", "evaluate_every"}  # of the runs that choose, and of the longer ones
    assert differ == {"data", "output", "ablation", "cnn", "reference", "amp", "sampling_ratio", "seed", "lr", *length}
    of_seed = [study.run_options(run, STUDY, Path("out")) for run in runs if vars(run) | {"seed": 0} == vars(RUN)]
    assert [config.seed for config in of_seed] == [0, 1, 2] and len({config.lr for config in of_seed}) == 1


def test_tables_give_mean_spread_and_the_interval_of_the_pairs() -> None:
    found = report.scores(results())
    efficiency = report.efficiency_table(found, study.CLUTTERED).splitlines()
    assert len(efficiency) == 2 + 2
    # ConViT is 5, 4 and 5 points before the CNN; t is 4.30 for three pairs
    assert efficiency[-1] == "| 100% | 61.0 ± 1.0 | 66.0 ± 1.0 | +5.0 ± 0.0 | +1.5 | 61.3 ± 1.2 | +4.7 ± 1.4 |"
    ablation = report.ablation_table(found).splitlines()
    assert len(ablation) == 2 + 5
    assert ablation[2] == "| a | ConViT | 57.0 ± 1.0 |  | 59.7 |  |"
    assert ablation[-1] == "| e | DeiT twin | 52.0 ± 1.0 | -5.0 ± 0.0 | 47.8 | -11.9 |"
    alone = report.scores(results(seeds=1))
    assert "±" not in report.efficiency_table(alone, study.PLAIN) + report.ablation_table(alone)


def test_the_report_says_whether_training_was_long_enough_and_what_the_kernels_saved() -> None:
    found = results()
    text = report.report(STUDY, found, curves(found))
    assert "| cluttered | 10% | +100.0 | 90 | +100.0 | 90 | +100.0 | 90 |" in text
    assert "trained 100 images a second, the same with the fused layers in float32 250, 2.50 times as many" in text
    assert "Under bfloat16's autocast it trained 500 images" in text and "250, 0.50 times as many" in text
    assert "| 1 | 1.50 | 1.50 | 1.50 | 1.50 | 0.70 | 0.70 | 0.70 | 0.70 |\n| 2 | 2.50 |" in text
    assert "**4 times the steps**, 8, on the cluttered images" in text
    assert "ConViT 0.01, DeiT twin 0.02, CNN 0.01; each the best of 0.01, 0.02" in text
    assert f"{len(found)} runs, {len(found):.1f} hours of them all together, on a machine" in text


@pytest.mark.filterwarnings("error")
def test_files_are_written(tmp_path: Path) -> None:
    found = results()
    study.write_results(found, curves(found), tmp_path)
    assert study.read_results(tmp_path) == (found, curves(found))
    report.write_figures(found, curves(found), tmp_path)
    for name in (report.FIGURE, report.CURVES_FIGURE, report.LOCALITY_FIGURE):
        assert "<svg" in (tmp_path / name).read_text()


def test_tables_come_into_the_place_that_a_page_has_for_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nText.\n")
    report.write_page(page, "| table |\n")
    assert page.read_text() == f"# Title\n\n{report.BEGIN}\n\n| table |\n\n{report.END}\n\nText.\n"
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
    arguments = ["--from", str(DOCS / "sample_efficiency"), "--page", str(page), "--output", str(tmp_path)]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert page.read_text() == committed
    for name in (study.RESULTS, study.CURVES):
        assert (tmp_path / name).read_bytes() == (DOCS / "sample_efficiency" / name).read_bytes()


def test_a_finished_run_is_not_repeated(idx_data: Path, tmp_path: Path) -> None:
    options = study.run_options(RUN, study.Study(steps=2), tmp_path)
    options = dataclasses.replace(options, data=idx_data, sampling_ratio=1.0, batch_size=8)
    result = study.execute(options)
    assert set(study.MEASURED) <= result.keys()
    assert study.finished(options) == result
    before = os.stat(options.output / files.WEIGHTS)
    assert study.run_all({RUN: options}, jobs=1) == {RUN: result}
    assert os.stat(options.output / files.WEIGHTS) == before
    assert not (options.output / files.CHECKPOINT).exists()
    with pytest.raises(ValueError, match="is of another study"):
        study.finished(dataclasses.replace(options, steps=3))


def test_bad_input(idx_data: Path, tmp_path: Path, small_canvases: None) -> None:
    arguments = ["--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 2 and "apt-get install dataset-fashion-mnist" in result.stderr
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(sample_efficiency.app, [*arguments, "--from", str(tmp_path / "none")])
    assert result.exit_code == 2 and "none" in result.stderr and result.stderr.count("\n") == 1
    arguments[1] = str(idx_data)  # of 60 images a tenth is too few
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 2 and "6 training images do not fill one step of 16" in result.stderr


def test_the_whole_of_it(idx_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_canvases: None) -> None:
    """Every run of a study of a few steps, in another process, and what is written of it."""
    options = dataclasses.replace(study.SMALL, batch_size=8, embed_dim=16)
    tiny = study.Study(ratios=(0.5,), seeds=1, steps=2, lrs=(1e-2, 2e-2), options=options)
    monkeypatch.setattr(sample_efficiency, "QUICK", tiny)
    for module in (study, report):
        monkeypatch.setattr(module, "ABLATION_RATIO", 0.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    arguments = ["--data", str(idx_data), "--output", str(tmp_path), "--quick", "--jobs", "1"]
    result = CliRunner().invoke(sample_efficiency.app, arguments)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*/result.json"))) == 2 * 3 + 2 * 3 + 3 + 2 + 3
    (settings,) = (json.loads(path.read_text())["settings"] for path in tmp_path.glob("cluttered-d-*/result.json"))
    assert settings["ablation"] == "d" and settings["steps"] == 2
    found, of_runs = study.read_results(tmp_path)
    convit = next(run for run in of_runs if run.row == study.CONVIT)
    assert [point["step"] for point in of_runs[convit]] == [0, 1, 2]
    assert {"nonlocality_3", "gate_2"} <= of_runs[convit][0].keys()
    text = (tmp_path / sample_efficiency.TABLES).read_text()
    assert text == report.report(tiny, found, of_runs)
