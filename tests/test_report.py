"""The report: speed-ups and their doubts, growth, and what became slower between two results."""

import ast
import json
import math
import random
import re
import sys
import time
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from convit_kernels import bench
from convit_kernels.bench import plots, report
from convit_kernels.bench.accuracy import WrongResultsError
from convit_kernels.bench.compare import MARK, changes, footnote, noise_of_run, speed_ups, times_faster
from convit_kernels.bench.contenders import ARCHITECTURES, Contender, Task, label
from convit_kernels.bench.measure import interleaved
from convit_kernels.bench.results import NotMeasured, Results, Row, load
from convit_kernels.cli import app, demo

ROOT = Path(__file__).parent.parent
MACHINE = {
    "gpu": None,
    "driver": None,
    "cuda": None,
    "cpu": "Abacus",
    "cpu_capability": "AVX2",
    "cores": 2,
    "load_1_minute": 2.5,
    "threads": 2,
    "cpu_clock_mhz": 1000.0,
    "torch": "2.14.1",
    "commit": "abc1234",
}


def row(contender="composite", seconds=0.010, rounds=15, noise=0.05, drift=1.0, seed=0, task=None) -> Row:
    """Times around `seconds`, eager's around 40 ms beside them; `drift` slows the whole machine."""
    task = task or Task("attention", "convit_small", 8)
    draw = random.Random(f"{seed} {contender} {task}")
    paces = [drift * draw.lognormvariate(0, noise) for _ in range(rounds)]
    return Row(
        group=str(task),
        contender=contender,
        seconds=[seconds * pace * draw.lognormvariate(0, noise) for pace in paces],
        eager_seconds=[0.040 * pace * draw.lognormvariate(0, noise) for pace in paces],
        error=1e-6,
        eager_error=2e-6,
        allowed_error=4.5e-6,
        peak_memory=int(1e3 * task.tokens),
        peak_memory_is="made up",
        peak_resident=None,
        gflops=task.flops() / seconds / 1e9,
        share_of_peak=0.5,
        bound="arithmetic",
        peak="made up",
        part=task.part,
        model=task.model,
        batch=task.batch,
        tokens=task.tokens,
        backward=task.backward,
        dtype="float32",
        device="cpu",
        machine=MACHINE,
    )


def results(*rows: Row, not_measured=()) -> Results:
    return Results(list(rows), list(not_measured), MACHINE, "2026-11-25")


def write(found: Results, path: Path) -> Path:
    """As pytest-benchmark writes it."""
    content = {
        "machine_info": {"convit_kernels": found.machine},
        "benchmarks": [{"extra_info": one.to_json()} for one in found.rows],
        "not_measured": [entry._asdict() for entry in found.not_measured],
        "datetime": f"{found.date}T12:00:00+00:00",
    }
    path.write_text(json.dumps(content))
    return path


def disturbed(one: Row, factor: float) -> Row:
    """As if something had run beside eager, each time before this contender's turn."""
    return replace(one, eager_seconds=[factor * time for time in one.eager_seconds])


def run(noise: float = 0.05, **seconds: float) -> list[Row]:
    """Three tasks by several contenders, eager first, which takes 40 ms."""
    tasks = [Task("attention", model, 8) for model in ("convit_tiny", "convit_small", "convit_base")]
    contenders = {"eager": 0.040, **seconds}
    return [row(name, time, noise=noise, task=task) for task in tasks for name, time in contenders.items()]


def disturbed_run() -> list[Row]:
    """Eager took 2.5 times as long beside the first task's composite, which is twice as fast as eager."""
    first, second, third, *rest = run(cpu=0.010, composite=0.020, reference=0.030)
    return [first, second, disturbed(third, 2.5), *rest]


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
        assert max(rows[:4], key=lambda row: ratios[row.key].times).contender == "cpu"
        assert ratios[rows[2].key].times == pytest.approx(2, rel=0.1)
        assert [key for key, ratio in ratios.items() if ratio.doubtful] == [rows[2].key]

    def test_nor_where_only_eager_stands_beside_it(self):
        eager, ours = row("eager", 0.040), row("cpu", 0.010)
        assert speed_ups([eager, disturbed(ours, 2)])[ours.key].times == pytest.approx(4, rel=0.1)

    def test_a_disturbed_contender_is_not_made_up_for(self):
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
        for path in [*ROOT.glob("convit_kernels/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]:
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
            return found["attention, forward: all 6 tasks"].verdict

        before = run(0.010, 100 + seed)
        assert kind(run(0.015, seed), before) == "slower"
        assert kind(run(0.010, seed), before) == "same"

    def test_eager_disturbed_beside_one_row_changes_nothing(self):
        names = [f"contender {index}" for index in range(8)]
        old, new = ([row(name, seed=seed) for name in names] for seed in (1, 2))
        new[2] = replace(new[2], eager_seconds=[1.6 * time for time in new[2].eager_seconds])
        assert verdicts(new, old) == ["same"] * 8

    def test_a_run_that_was_disturbed_says_so(self):
        """Eager's time beside one row is not that beside the next."""
        names = [f"contender {index}" for index in range(8)]
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
        assert "No contender became slower or faster" in result.output


class TestRealRuns:
    """Contenders that sleep, whose times a busy machine hardly changes, timed as the benchmarks time."""

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
        assert "Abacus (AVX2), 2 threads" in output

    def test_a_doubtful_ratio_is_marked_and_the_mark_explained(self, tmp_path):
        path = write(results(*disturbed_run()), tmp_path / "r.json")
        output = CliRunner().invoke(app, ["report", str(path)], env={"COLUMNS": "120"}).output
        lines = output.splitlines()
        assert [line.split()[:2] for line in lines if re.search(rf"\d{MARK} ", line)] == [["ours:", "composite"]]
        noise = math.exp(3 * noise_of_run(load(path).rows))
        assert f"{MARK}: the pairs, the group's pace" in output and f"more than {noise:.2f} times" in output

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
        written = report.write_figures(found, tmp_path)
        assert {path.name for path in written} == {
            f"{name}.{kind}" for name in ("speed-up", "growth-tokens") for kind in ("svg", "png")
        }
        text = (tmp_path / "growth-tokens.svg").read_text()
        assert "ours: cpu (2.00)" in text  # the fitted exponent of a quadratic
        assert "ConViT-S" in text

    def test_equal_results_make_equal_files(self, tmp_path):
        one, two = (report.write_figures(results(row()), tmp_path / name, ("svg",)) for name in "ab")
        assert one[0].read_bytes() == two[0].read_bytes()

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.delattr(bench, "plots")
        monkeypatch.delitem(sys.modules, "convit_kernels.bench.plots")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        path = write(results(row()), tmp_path / "r.json")
        result = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "figures")])
        assert result.exit_code == 1
        assert re.search(r"report needs matplotlib: pip install '?matplotlib", result.stderr)

    def test_the_speed_up_is_the_ratio_of_the_tables(self):
        rows = disturbed_run()
        (ax,) = plots.speed_up(rows, "").axes
        drawn = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in ax.containers}
        for place, name in enumerate(("cpu", "composite", "reference"), start=1):
            assert sorted(drawn[label(name)]) == sorted(speed_ups(rows)[one.key].times for one in rows[place::4])
        assert [text.get_text() for text in ax.texts].count(MARK) == 1

    def test_fit_is_the_power_law(self):
        fit = plots.fit([1, 2, 4], [3, 12, 48])
        assert fit == pytest.approx((2, 3))

    def test_contenders_differ_in_colour(self):
        names = ("eager", "compile", "sdpa", "cpu", "triton", "composite", "reference")
        assert len({plots.colour(name) for name in names}) == len(names)


class TestWholeModels:
    @pytest.fixture
    def against_deit(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        import against_deit

        return against_deit

    def test_section_is_what_the_committed_results_make(self, against_deit):
        found = against_deit.SECTION.search((ROOT / "README.md").read_text())
        assert found, "the README has no section of whole models"
        kept = json.loads((ROOT / found["source"]).read_text())
        assert found[0] == against_deit.section(kept, found["source"]), "run: python benchmarks/against_deit.py"

    def test_the_share_of_attention_is_that_of_its_kernels(self, against_deit):
        q = torch.randn(1, 4, 256, 32, requires_grad=True)
        image = torch.randn(1, 3, 512, 512)

        def attention():
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

        assert against_deit.share_of_attention(lambda: torch.autograd.grad(attention().sum(), q)) > 0.5
        assert against_deit.share_of_attention(lambda: torch.nn.functional.avg_pool2d(image, 7)) == 0
        assert 0 < against_deit.share_of_attention(lambda: (attention(), image.sin())) < 1

    @pytest.fixture(scope="class")
    @classmethod
    def right(cls):
        """The contenders of the smallest size, nothing compiled."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            import against_deit

            patch.setattr(against_deit, "frozen", lambda contender: contender)
            return against_deit.build(Task("model", "convit_tiny", 1))

    @pytest.mark.parametrize(
        "broken, text",
        [
            ("ConViT, replaced", "ours, automatic: out: error 1.0e-03"),
            ("ConViT, replaced, compiled and frozen", "compiled and frozen: out: error 1.0e-03"),
            ("DeiT, timm, compiled and frozen", "DeiT's out: error 1.0e-03"),
        ],
    )
    def test_a_wrong_one_is_refused_before_any_is_timed(self, against_deit, right, monkeypatch, broken, text):
        wrong = right[broken]._replace(forward=lambda: right[broken].forward() * 1.001)
        timed = []
        monkeypatch.setattr(against_deit, "SIZES", {"convit_tiny": ("deit_tiny_patch16_224", 1)})
        monkeypatch.setattr(against_deit, "build", lambda task: right | {broken: wrong})
        monkeypatch.setattr(against_deit, "interleaved", lambda *_: timed.append("a group"))
        with pytest.raises(WrongResultsError, match=text):
            against_deit.measure(1)
        assert timed == []

    def test_frozen_packs_the_weights_and_not_the_input(self, against_deit):
        layer, images = torch.nn.Linear(8, 4), torch.randn(2, 8)
        eager = Contender(lambda: layer(images), dict(layer.named_parameters()), torch.randn(2, 4), layer)
        call = against_deit.frozen(eager).call(backward=False)
        images.mul_(2)
        torch.testing.assert_close(call(), layer(images).detach())
        with torch.no_grad():
            layer.weight.zero_()
        assert not torch.equal(call(), layer(images))

    def test_what_it_says_of_deit_is_the_less_favourable(self, against_deit):
        names = (against_deit.EAGER, against_deit.REPLACED, against_deit.DEIT)
        seconds = ([1, 1, 1], [4, 1, 1], [4, 4, 1])  # of DeiT over replaced: 1 by pairs, 4 by medians
        rows = [
            {"size": size, "backward": backward, "contender": name, "batch": 1, "seconds": times, "attention": None}
            | {"parameters": 100}
            for size in against_deit.SIZES
            for backward in (False, True)
            for name, times in zip(names, seconds, strict=True)
        ]
        text = against_deit.section({"machine": MACHINE, "date": "2026-11-25", "rows": rows}, "x.json")
        assert "Ti forward 1.00, S forward 1.00" in text and "commit abc1234, 2026-11-25" in text


class TestReadme:
    @pytest.fixture
    def readme(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        import readme

        return readme

    def test_section_is_what_the_committed_results_make(self, readme):
        found = readme.SECTION.search((ROOT / "README.md").read_text())
        assert found, "the README has no performance section"
        path = ROOT / found["source"]
        growth = load(readme.growth_file(path))
        assert found[0] == readme.section(load(path), found["source"], growth), "run: make results"

    def test_no_ratio_is_beyond_the_noise_of_its_columns_without_a_mark(self, readme):
        section = readme.SECTION.search((ROOT / "README.md").read_text())
        noise = math.exp(3 * noise_of_run(load(ROOT / section["source"]).rows))
        details = section[0].partition("<details>")[2].splitlines()
        rows = [line.replace("*", "").split(" | ") for line in details if re.match(r"\| (timm|SDPA|ours)", line)]
        eager, compared = 0.0, 0
        for name, ratio, milliseconds, *_ in rows:
            median = float(milliseconds.split()[0])
            eager = median if name == "| timm, eager" else eager
            if MARK not in ratio:
                rounding = 1.01  # both are printed with three digits
                assert abs(math.log(eager / median / float(ratio))) < math.log(noise * rounding), (name, ratio)
                compared += 1
        assert 100 < compared < len(rows)

    def test_the_summary_is_of_the_rows_below_it(self, readme):
        summary, _, details = readme.SECTION.search((ROOT / "README.md").read_text())[0].partition("<details>")
        table = summary.partition("| times faster than eager timm |")[2].partition("\n\n")[0]
        ratios = re.findall(rf"(?<=\| )\d+\.\d\d{MARK}?(?= \|)", table)
        assert len(ratios) >= 36 and all(f"| **{ratio}** |" in details for ratio in ratios)

    @pytest.mark.parametrize("part", ["", "-growth"])
    def test_the_files_say_what_the_section_says(self, readme, part):
        source = ROOT / readme.SECTION.search((ROOT / "README.md").read_text())["source"]
        path = source.with_name(source.stem + part + ".json")
        ratios = {key: ratio.times for key, ratio in speed_ups(load(path).rows).items()}
        rows = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
        assert [row["ratio_to_eager"] for row in rows] == [ratios.get((row["group"], row["contender"])) for row in rows]

    def test_a_disturbed_neighbour_does_not_lead_the_table(self, readme):
        rows = disturbed_run()
        text = readme.section(results(*rows), "benchmarks/results/x.json")
        (line,) = (line for line in text.splitlines() if line.startswith("| attention, forward |"))
        assert [float(cell) for cell in line.split("|")[2:5]] == pytest.approx([4, 4, 4], rel=0.1)
        assert re.search(rf"^\| ours: composite \| \*\*(1\.9|2\.)\d+{MARK}\*\*", text, re.MULTILINE)
        assert f"\n{MARK}: " in text

    def test_its_figures_are_there(self, readme):
        figures = re.findall(r"\]\((benchmarks/results/\S*?svg)\)", (ROOT / "README.md").read_text())
        assert len(figures) >= 3
        assert all((ROOT / figure).exists() for figure in figures)

    def test_growth_names_what_ran_out_of_memory(self, readme):
        small, large = (Task("attention", "convit_small", 8, side) for side in (14, 64))
        lost = NotMeasured(str(large), "eager", "out of memory: 9 GB were asked for")
        swept = results(row("eager", 0.04, task=small), row(task=small), row(task=large), not_measured=[lost])
        text = readme.section(results(row("eager", 0.04), row()), "benchmarks/results/x.json", swept)
        (first,) = (line for line in text.splitlines() if line.startswith("| attention, forward | 196 "))
        (last,) = (line for line in text.splitlines() if line.startswith("| attention, forward | 4096 "))
        assert "out of memory" not in first and last.startswith("| attention, forward | 4096 | out of memory | ")

    def test_it_names_the_machine_and_what_was_not_measured(self, readme):
        text = readme.section(results(row("eager", 0.04), row()), "benchmarks/results/x.json")
        assert "Abacus (AVX2), 2 threads" in text
        assert "**Not measured: any GPU.**" in text
        assert "at a load of 2.5 to 2.5 on 2 cores" in text
        assert "| attention, forward | 4." in text or "| attention, forward | 3.9" in text
