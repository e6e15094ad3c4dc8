"""The report: speed-ups and their doubts, growth, and what became slower between two results."""

import ast
import json
import math
import re
import sys
import time
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import timm
import torch
from invented_results import MACHINE, disturbed, disturbed_run, results, row, run, write
from typer.testing import CliRunner

from convit_kernels import bench
from convit_kernels.bench import figures
from convit_kernels.bench.compare import MARK, changes, footnote, noise_of_run, speed_ups, times_faster
from convit_kernels.bench.implementations import ARCHITECTURES, Task, is_ours, label
from convit_kernels.bench.machine import describe
from convit_kernels.bench.measure import interleaved
from convit_kernels.bench.results import NotMeasured, Row, load
from convit_kernels.cli import app, demo

ROOT = Path(__file__).parent.parent
OTHERS = ("-models", "-units", "-host")  # files of another kind
COMMITTED = [path for path in sorted(ROOT.glob("benchmarks/results/*.json")) if not path.stem.endswith(OTHERS)]


class TestTimesFaster:
    def test_is_the_smaller_of_pairs_and_pace(self):
        assert times_faster([4, 4, 1], [4, 1, 1]).times == 1  # pairs 1, 4, 1; medians 4 and 1
        assert times_faster([3, 4, 5], [3, 1, 2]).times == 2  # pairs 1, 4, 2.5; medians 4 and 2

    def test_below_one_too(self):
        assert times_faster([1, 1, 4], [2, 1, 8]).times == 0.5  # pairs 0.5, 1, 0.5; medians 1 and 2
        slow = times_faster([1, 1, 1], [2, 2, 2], pace=1.6)
        assert (slow.paired, slow.by_pace, slow.times) == (0.5, 0.8, 0.5)

    def test_a_disturbed_neighbour_does_not_lead(self):
        rows = disturbed_run()
        ratios = speed_ups(rows)
        assert max(rows[:4], key=lambda row: ratios[row.key].times).implementation == "cpu"
        assert ratios[rows[2].key].times == pytest.approx(2, rel=0.1)
        assert [key for key, ratio in ratios.items() if ratio.doubtful] == [rows[2].key]

    def test_nor_where_only_eager_stands_beside_it(self):
        eager, ours = row("eager", 0.040), row("cpu", 0.010)
        assert speed_ups([eager, disturbed(ours, 2)])[ours.key].times == pytest.approx(4, rel=0.1)

    def test_a_disturbed_implementation_is_not_made_up_for(self):
        rows = run(cpu=0.010, composite=0.020)
        rows[1] = replace(rows[1], seconds=[2 * time for time in rows[1].seconds])
        assert speed_ups(rows)[rows[1].key].times == pytest.approx(2, rel=0.1)

    def test_eager_goes_the_same_way(self):
        rows = run(cpu=0.010, composite=0.020)
        rows[0] = replace(rows[0], seconds=[1.5 * time for time in rows[0].seconds])
        ratio = speed_ups(rows)[rows[0].key]
        assert ratio.times == pytest.approx(1 / 1.5, rel=0.1) and ratio.doubtful

    def test_there_is_none_where_eager_had_no_memory(self):
        assert speed_ups([replace(row(), eager_seconds=[]), row("cpu")]).keys() == {row("cpu").key}
        assert speed_ups([replace(row(), eager_seconds=[])]) == {}

    def test_what_counts_as_noise_is_the_runs_own(self):
        """Eager took a third longer beside one row: told from a quiet machine's noise, not from a busy one's."""
        quiet, busy = (run(noise, cpu=0.010, composite=0.020, reference=0.030) for noise in (0.01, 0.4))
        assert noise_of_run(quiet) < 0.02 and noise_of_run(busy) > 0.1
        assert not any(ratio.doubtful for ratio in speed_ups(quiet).values())
        for rows, told in ((quiet, True), (busy, False)):
            rows[1] = disturbed(rows[1], 4 / 3)
            assert speed_ups(rows)[rows[1].key].doubtful is told

    def test_without_repeated_measurements_nothing_is_doubted(self):
        (ratio,) = speed_ups([row()]).values()
        assert noise_of_run([row()]) is None and not ratio.doubtful and footnote([ratio, None]) == ""

    def test_the_demo_goes_by_it(self, monkeypatch):
        small = timm.create_model("convit_tiny", depth=2, local_up_to_layer=1).eval()
        monkeypatch.setattr(demo, "build", lambda *_: small)
        monkeypatch.setattr(demo, "interleaved", lambda *_: {"eager": [4, 4, 1], "replaced": [4, 1, 1]})
        assert demo.compare("convit_tiny", None, 1, 3, "cpu", lambda: None)["speedup"] == 1

    def test_nothing_else_divides_eager_by_ours(self):
        found = []
        for path in [
            *ROOT.glob("convit_kernels/**/*.py"),
            *ROOT.glob("benchmarks/*.py"),
            *ROOT.glob("examples/**/*.py"),
        ]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                    dividend = ast.unparse(node.left)
                    if re.search(r"eager|median|deit|slowest", dividend, re.IGNORECASE):
                        found.append((path.name, dividend))
        assert [entry for entry in found if entry[0] != "compare.py"] == []


def verdicts(new: list[Row], old: list[Row]) -> list[str]:
    return [change.verdict for change in changes(new, old)]


def test_imports_within_bench_go_one_way():
    imports = {}
    for path in (ROOT / "convit_kernels" / "bench").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {name for node in nodes if node.level == 1 for name in [node.module, *(one.name for one in node.names)]}
        imports[path.stem] = names - {None, path.stem}
    order = TopologicalSorter({name: found & imports.keys() for name, found in imports.items()})
    assert {"compare", "report"} <= set(order.static_order())  # raises CycleError


class TestRegressions:
    @pytest.mark.parametrize("seed", range(20))
    def test_a_slowdown_of_one_and_a_half_shows(self, seed):
        assert verdicts([row(seconds=0.015, seed=seed)], [row(seed=100 + seed)]) == ["slower"]

    @pytest.mark.parametrize("noise", [0.005, 0.05, 0.2])
    @pytest.mark.parametrize("seed", range(20))
    def test_two_runs_of_the_same_code_do_not(self, noise, seed):
        found = verdicts([row(noise=noise, seed=seed)], [row(noise=noise, seed=100 + seed)])
        assert found[0] in ("same", "unclear")

    @pytest.mark.parametrize("seed", range(5))
    def test_a_slower_day_is_no_regression(self, seed):
        assert verdicts([row(drift=1.7, seed=seed)], [row(seed=100 + seed)]) == ["same"]

    def test_but_a_slowdown_on_a_slower_day_is_one(self):
        assert verdicts([row(drift=1.7, seconds=0.015)], [row(seed=1)]) == ["slower"]

    def test_an_improvement_shows(self):
        assert verdicts([row(seconds=0.007)], [row(seed=1)]) == ["faster"]

    def test_noise_that_would_hide_it_is_admitted(self):
        assert verdicts([row(noise=0.5)], [row(noise=0.5, seed=1)]) == ["unclear"]

    @pytest.mark.parametrize("seed", range(10))
    def test_six_tasks_show_what_one_may_hide(self, seed):
        def run(seconds: float, seed: int) -> list[Row]:
            tasks = [Task("attention", model, 8) for model in ARCHITECTURES]
            return [row(seconds=seconds, noise=0.07, rounds=7, seed=seed, task=task) for task in tasks]

        def kind(new: list[Row], old: list[Row]) -> str:
            found = {change.task: change for change in changes(new, old)}
            assert len(found) == 7
            return found["attention, forward, float32: all 6 tasks"].verdict

        before = run(0.010, 100 + seed)
        assert kind(run(0.015, seed), before) == "slower"
        assert kind(run(0.010, seed), before) == "same"

    def test_dtypes_are_judged_apart(self):
        def run(seconds_in_bfloat16: float, seed: int) -> list[Row]:
            seconds = {torch.float32: 0.010, torch.bfloat16: seconds_in_bfloat16}
            tasks = [Task("attention", model, 8, dtype=dtype) for dtype in seconds for model in ARCHITECTURES]
            return [row(seconds=seconds[task.dtype], noise=0.02, seed=seed, task=task) for task in tasks]

        found = {change.task: change.verdict for change in changes(run(0.015, 1), run(0.010, 2))}
        assert found["attention, forward, float32: all 6 tasks"] == "same"
        assert found["attention, forward, bfloat16: all 6 tasks"] == "slower"

    def test_eager_disturbed_beside_one_row_changes_nothing(self):
        names = [f"implementation {index}" for index in range(8)]
        old, new = ([row(name, seed=seed) for name in names] for seed in (1, 2))
        new[2] = replace(new[2], eager_seconds=[1.6 * time for time in new[2].eager_seconds])
        assert verdicts(new, old) == ["same"] * 8

    def test_a_run_that_was_disturbed_says_so(self):
        """Eager's time beside one row is not that beside the next."""
        names = [f"implementation {index}" for index in range(8)]
        calm = [row(name, seed=1) for name in names]
        disturbed = [row(name, drift=1 + index % 2, seed=2) for index, name in enumerate(names)]
        assert verdicts(calm, calm) == ["same"] * 8
        assert set(verdicts(disturbed, calm)) == {"unclear"}

    def test_without_eager_times_count_as_they_are(self):
        new, old = row(seconds=0.015), row(seed=1)
        alone = [replace(one, eager_seconds=[]) for one in (new, old)]
        assert verdicts(alone[:1], alone[1:]) == ["slower"]

    def test_the_command_names_it_and_fails(self, tmp_path):
        old = write(results(row(), row("cpu", 0.004)), tmp_path / "old.json")
        new = write(results(row(seed=1), row("cpu", 0.006, seed=1)), tmp_path / "new.json")
        result = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
        assert result.exit_code == 1
        (line,) = (line for line in result.output.splitlines() if line.strip().startswith("slower"))
        assert "ours: cpu" in line
        assert "1 slower, 0 faster, 1 the same" in result.output

    def test_the_command_is_content_with_the_same_code(self, tmp_path):
        old = write(results(row()), tmp_path / "old.json")
        new = write(results(row(seed=1)), tmp_path / "new.json")
        result = CliRunner().invoke(app, ["report", str(new), "--against", str(old)])
        assert result.exit_code == 0
        assert "No implementation became slower or faster" in result.output


class TestRealRuns:
    """Implementations that sleep, whose times a busy machine hardly changes, timed as the benchmarks time."""

    def measure(self, milliseconds: int) -> list[Row]:
        functions = {"eager": lambda: time.sleep(0.03), "ours": lambda: time.sleep(milliseconds / 1e3)}
        times = interleaved(functions, "cpu", rounds=7)
        return [replace(row(), seconds=times["ours"], eager_seconds=times["eager"])]

    def test_a_planted_slowdown_shows_and_a_second_run_does_not(self):
        first = self.measure(40)
        assert verdicts(self.measure(40), first) == ["same"]
        assert verdicts(self.measure(60), first) == ["slower"]


class TestTables:
    def test_ratio_first_then_time_error_memory(self, tmp_path):
        path = write(results(row("eager", 0.040), row()), tmp_path / "r.json")
        output = CliRunner().invoke(app, ["report", str(path)], env={"COLUMNS": "120"}).output
        assert str(Task("attention", "convit_small", 8)) in output
        assert output.index("timm, eager") < output.index("ours: composite")
        assert "1.0e-06 / 4.5e-06" in output
        assert MARK not in output
        assert "Abacus (AVX2), 2 threads" in output and "load 2.5 on 2 cores" in " ".join(output.split())

    def test_a_doubtful_ratio_is_marked_and_the_mark_explained(self, tmp_path):
        path = write(results(*disturbed_run()), tmp_path / "r.json")
        output = CliRunner().invoke(app, ["report", str(path)], env={"COLUMNS": "120"}).output
        lines = output.splitlines()
        assert [line.split()[:2] for line in lines if re.search(rf"\d{MARK} ", line)] == [["ours:", "composite"]]
        noise = math.exp(3 * noise_of_run(load(path).rows))
        assert f"{MARK}: unreliable" in output
        assert f"more than {noise:.2f} times" in " ".join(output.split())

    def test_what_is_missing_is_said_once(self, tmp_path):
        missing = [NotMeasured(group, "compile", "no compiler") for group in ("a", "b")]
        path = write(results(row(), not_measured=missing), tmp_path / "r.json")
        output = CliRunner().invoke(app, ["report", str(path)]).output
        assert "not measured: timm, torch.compile (2 rows): no compiler" in output

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "other.json").write_text('{"benchmarks": [{}]}')
        result = CliRunner().invoke(app, ["report", str(tmp_path / "other.json")])
        assert result.exit_code == 2
        assert "holds no results" in result.output


class TestFigures:
    def test_written_for_what_there_is(self, tmp_path):
        sweep = [
            row(name, seconds * (side / 14) ** 4, noise=0, task=Task("attention", "convit_small", 8, side=side))
            for side in (14, 20, 28)
            for name, seconds in (("eager", 0.04), ("cpu", 0.01))
        ]
        lost = [NotMeasured(sweep[-1].group, "eager", "out of memory: 5 GB")]
        found = results(*sweep[:-2], sweep[-1], not_measured=lost)
        written = figures.write_figures(found, tmp_path)
        assert {path.name for path in written} == {
            f"{name}.{kind}" for name in ("speed-up", "growth-tokens") for kind in ("svg", "png")
        }
        text = (tmp_path / "growth-tokens.svg").read_text()
        assert "ours: cpu (2.00)" in text  # the fitted exponent of a quadratic
        assert "ConViT-S" in text

    def test_equal_results_make_equal_files(self, tmp_path):
        one, two = (figures.write_figures(results(row()), tmp_path / name, ("svg",)) for name in "ab")
        assert one[0].read_bytes() == two[0].read_bytes()

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.delattr(bench, "figures")
        monkeypatch.delitem(sys.modules, "convit_kernels.bench.figures")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        path = write(results(row()), tmp_path / "r.json")
        result = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "figures")])
        assert result.exit_code == 1
        assert re.search(r"report needs matplotlib: pip install '?matplotlib", result.stderr)

    def test_the_speed_up_is_the_ratio_of_the_tables(self):
        rows = disturbed_run()
        (ax,) = figures.speed_up(rows, "").axes
        drawn = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in ax.containers}
        for place, name in enumerate(("cpu", "composite", "reference"), start=1):
            assert sorted(drawn[label(name)]) == sorted(speed_ups(rows)[one.key].times for one in rows[place::4])
        assert [text.get_text() for text in ax.texts].count(MARK) == 1

    def test_each_dtype_has_panels_of_its_own(self):
        tasks = [
            Task("attention", "convit_small", 8, side, backward, dtype)
            for side in (14, 20, 28)
            for backward in (False, True)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        rows = [row("cpu", seconds=0.010 * task.dtype.itemsize, noise=0, task=task) for task in tasks]
        panels = {ax.get_title(): [bar.get_height() for bar in ax.patches] for ax in figures.speed_up(rows, "").axes}
        expected = {
            "attention, forward, float32": [1.0],
            "attention, forward + backward, float32": [1.0],
            "attention, forward, bfloat16": [2.0],
            "attention, forward + backward, bfloat16": [2.0],
        }
        assert list(panels) == list(expected)  # forward and training side by side
        assert {title: pytest.approx(heights) for title, heights in panels.items()} == expected
        titles = [ax.get_title() for ax in figures.growth(rows, [], "tokens").axes]
        assert len(titles) == 8 and "attention, forward, bfloat16, ConViT-S, batch 8: time" in titles

    def test_fit_is_the_power_law(self):
        fit = figures.fit([1, 2, 4], [3, 12, 48])
        assert fit == pytest.approx((2, 3))

    def test_implementations_differ_in_colour(self):
        names = ("eager", "compile", "sdpa", "cpu", "triton", "composite", "reference")
        assert len({figures.colour(name) for name in names}) == len(names)


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path):
        written = results(row("eager", 0.04), row(), not_measured=[NotMeasured("a task", "triton", "no GPU")])
        assert load(write(written, tmp_path / "r.json")) == written

    def test_earlier_files_are_read_too(self, tmp_path):
        """They say "contender", and have the whole machine and a constant sentence in each row."""
        written = results(row(), not_measured=[NotMeasured("a task", "triton", "no GPU")])
        content = json.loads(write(written, tmp_path / "new.json").read_text())
        for entry in [content["benchmarks"][0]["extra_info"], *content["not_measured"]]:
            entry["contender"] = entry.pop("implementation")
        extra = content["benchmarks"][0]["extra_info"]
        del extra["load_1_minute"]
        extra |= {"machine": MACHINE, "peak_memory_is": "most bytes held"}
        (tmp_path / "old.json").write_text(json.dumps(content))
        assert load(tmp_path / "old.json") == written

    def test_a_row_has_nothing_of_the_machine_but_its_load(self):
        entry = row().to_json()
        assert entry["load_1_minute"] == 2.5
        assert not any(isinstance(value, dict) for value in entry.values()) and "cpu_capability" not in str(entry)

    @pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
    def test_the_committed_ones_say_what_the_rule_says(self, path):
        ratios = speed_ups(load(path).rows)
        entries = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
        assert entries
        for entry in entries:
            key = entry["group"], entry.get("implementation") or entry["contender"]
            assert entry["ratio_to_eager"] == (ratios[key].times if key in ratios else None)


def test_a_machine_and_what_was_seen_of_its_load():
    assert describe(MACHINE) == "Abacus (AVX2), 2 threads, 1000 MHz, torch 2.14.1, commit abc1234"
    assert describe(MACHINE, [2.5]).endswith(", load 2.5 on 2 cores")
    assert describe(MACHINE, [2.5, 0.5, 1]).endswith(", load 0.5 to 2.5 on 2 cores")


def test_what_is_not_ours():
    assert [is_ours(name) for name in ("eager", "compile", "sdpa", "auto", "cpu")] == [False] * 3 + [True] * 2
