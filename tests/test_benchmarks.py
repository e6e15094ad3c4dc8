"""The benchmarks: what is measured, and that a wrong kernel is not timed. No test judges a time."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convit_kernels as ck
from convit_kernels.attention import why_not as why_not_backend
from convit_kernels.bench import implementations, measure
from convit_kernels.bench.accuracy import WrongResultsError, judge, require_right
from convit_kernels.bench.compare import speed_ups
from convit_kernels.bench.implementations import (
    ARCHITECTURES,
    COMPILED,
    EAGER,
    GRAPH,
    PARTS,
    SDPA,
    CannotRunError,
    Task,
    build,
    convit,
    implementation_names,
)
from convit_kernels.bench.results import Row

ROOT = Path(__file__).parent.parent
ONE_GROUP = ("-k", "attention and tiny and forward and not plus", "--dtype", "float32")
QUICK = ("--row-seconds", "0.01", "--implementations", "eager,sdpa,composite")


def run_benchmarks(*arguments: str, plugin: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The suite in a process of its own, where a plugin may have changed a kernel."""
    extra = ["-p", plugin.stem, "-o", f"pythonpath={plugin.parent}"] if plugin else []
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *QUICK, *extra, *arguments]
    # where several processes take these tests, that suite would take itself for one of them, and time nothing
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one group prints, and its JSON."""
    path = tmp_path_factory.mktemp("results") / "results.json"
    done = run_benchmarks(*ONE_GROUP, f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads(path.read_text())


class TestSuite:
    def test_the_table_names_task_and_implementations_and_puts_the_ratio_first(self, results):
        text, _ = results
        summary = text[text.index("\nattention, ConViT-Ti, forward, batch 8, 14x14 patches, float32, cpu") :]
        header, *lines = [
            line.split()
            for line in summary.splitlines()
            if line.startswith((" implementation", " timm", " ours", " SDPA"))
        ]
        assert header[:2] == ["implementation", "faster"]
        assert [line[0] for line in lines] == ["timm,", "SDPA,", "ours:"]  # eager first, ours last

    def test_each_row_carries_what_is_needed_to_judge_it(self, results):
        _, content = results
        rows = {entry["extra_info"]["implementation"]: entry["extra_info"] for entry in content["benchmarks"]}
        assert set(rows) == {EAGER, SDPA, "composite"}
        row = rows["composite"]
        assert list(row)[:4] == ["ratio_to_eager", "p20_ms", "p50_ms", "p80_ms"]
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert len(row["eager_seconds"]) == len(row["seconds"])  # interleaved: one of eager before each
        ratios = speed_ups([Row.from_json(one) for one in rows.values()])
        assert all(one["ratio_to_eager"] == ratios[one["group"], name].times for name, one in rows.items())
        assert 0 < row["error"] <= row["allowed_error"]
        assert row["allowed_error"] >= 2 * row["eager_error"]
        assert 0 < row["peak_memory"] < rows[EAGER]["peak_memory"]  # no N x N map
        assert row["gflops"] > 0 and row["share_of_peak"] > 0 and row["bound"] in ("arithmetic", "memory")
        assert row["load_1_minute"] is None or row["load_1_minute"] >= 0
        assert {"cpu", "gpu", "cpu_clock_mhz", "threads", "torch", "triton", "cuda", "driver", "commit"} <= set(
            content["machine_info"]["convit_kernels"]
        )
        assert rows[SDPA]["error"] is None  # it computes something else

    def test_what_was_not_measured_is_kept_with_the_reason(self, results):
        _, content = results
        assert all(entry["reason"] for entry in content["not_measured"])

    def test_a_planted_error_turns_the_check_red_and_nothing_is_timed(self, tmp_path):
        (tmp_path / "planted.py").write_text(
            "from convit_kernels import attention\n"
            "entry = attention._BACKENDS['composite']\n"
            "wrong = lambda inputs: entry.attention(inputs) * 1.001\n"
            "attention._BACKENDS['composite'] = entry._replace(attention=wrong)\n"
        )
        done = run_benchmarks(*ONE_GROUP, plugin=tmp_path / "planted.py")
        assert done.returncode == 1
        assert "wrong results, so nothing is timed here. ours: composite: out: error 1.0e-03" in done.stdout
        assert "3 failed" in done.stdout  # the whole group
        assert "faster" not in done.stdout
        assert "GFLOP/s" not in done.stdout

    def test_where_eager_runs_out_of_memory_the_others_are_still_measured(self, tmp_path):
        (tmp_path / "short.py").write_text(
            "import torch\n"
            "from convit_kernels.bench import implementations\n"
            "eager, calls = implementations.eager_attention, []\n"
            "def short_of_memory(q, *rest):\n"
            "    calls.append(q.dtype)\n"
            "    if calls.count(torch.float32) > 1:  # the check's call is the first\n"
            '        raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 1 TB")\n'
            "    return eager(q, *rest)\n"
            "implementations.eager_attention = short_of_memory\n"
        )
        path = tmp_path / "results.json"
        done = run_benchmarks(*ONE_GROUP, f"--benchmark-json={path}", plugin=tmp_path / "short.py")
        assert "2 passed, 1 skipped" in done.stdout, done.stdout
        content = json.loads(path.read_text())
        assert [entry["extra_info"]["implementation"] for entry in content["benchmarks"]] == [SDPA, "composite"]
        assert all(entry["extra_info"]["ratio_to_eager"] is None for entry in content["benchmarks"])
        measured = content["benchmarks"][0]["extra_info"]["group"]
        (lost,) = (entry for entry in content["not_measured"] if entry["group"] == measured)
        assert lost["implementation"] == EAGER and "out of memory" in lost["reason"]

    def test_both_dtypes_are_timed_unless_one_is_named(self, results):
        done = run_benchmarks("-k", "attention and small and forward", "--collect-only", "-q")
        assert set(re.findall(r"-(\w+)-composite\]", done.stdout)) == {"float32", "bfloat16"}, done.stdout
        _, content = results
        assert {entry["extra_info"]["dtype"] for entry in content["benchmarks"]} == {"float32"}


class TestDefaultSet:
    @pytest.fixture
    def tasks(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("tasks")

    @pytest.fixture
    def products(self, tasks, monkeypatch):
        """What the machine does in each dtype: FLOP/s."""
        rates = {torch.float32: 1e11, torch.bfloat16: 2e11, torch.float16: 1e9}
        monkeypatch.setattr(tasks, "matrix_product", lambda device, dtype, side: measure.Peak(rates[dtype], "made up"))
        return rates

    def included(self, tasks, name: str) -> set:
        found = tasks.default_tasks("cpu", (torch.float32, torch.bfloat16))
        assert {task.side for task in found} == {14} and len(found) == len(set(found))
        return {
            (task.part, task.model, task.backward, task.dtype) for task in found if not tasks.why_left_out(task, name)
        }

    def test_eager_and_the_composite_are_in_every_part_mode_and_dtype(self, tasks, products):
        dtypes, modes = (torch.float32, torch.bfloat16), (False, True)
        sizes = ("convit_tiny", "convit_small", "convit_base")
        wanted = set(itertools.product(PARTS, sizes, modes, dtypes))
        wanted |= set(itertools.product(["attention"], ARCHITECTURES, modes, dtypes))
        for name in (EAGER, "composite", "cpu"):
            assert self.included(tasks, name) == wanted

    def test_it_leaves_out_what_is_slow_or_tells_little(self, tasks, products):
        assert self.included(tasks, "reference") == set()
        compiled = self.included(tasks, COMPILED)
        assert {(model, dtype) for _, model, _, dtype in compiled} == {("convit_small", torch.float32)}
        everything = self.included(tasks, "composite")
        products[torch.bfloat16] = 1e10
        assert self.included(tasks, "composite") == everything
        products[torch.bfloat16] = 9e9
        parts = {part for part, _, _, dtype in self.included(tasks, "composite") if dtype == torch.bfloat16}
        assert parts == {"attention"}
        reason = tasks.why_left_out(Task("layer", "convit_tiny", 8, dtype=torch.bfloat16), EAGER)
        assert "a matrix product in bfloat16 takes more than 10 times as long as in float32 here" in reason

    def test_the_sweep_has_grids_and_batches_of_each_dtype(self, tasks):
        sweep = tasks.sweep_tasks("cpu", (torch.float32, torch.bfloat16))
        for dtype in (torch.float32, torch.bfloat16):
            assert {task.side for task in sweep if task.dtype == dtype} >= {14, 64}
            assert {task.batch for task in sweep if task.dtype == dtype} >= {1, 64}


needs_kernels = pytest.mark.skipif(bool(why_not_backend("cpu")), reason="the CPU kernels were not built")


class TestHostTime:
    @pytest.fixture
    def host_time(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("host_time")

    def test_ours_goes_all_the_way_to_the_launch_of_its_kernels(self, host_time):
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("interpreted kernels cannot be recorded")
        from tools.machine_code.compiled import recorded_launches

        launched = {}
        with host_time.launch_to_stub(), recorded_launches() as recorded:
            for what, call in host_time.calls(host_time.OURS).items():
                recorded.clear()
                call()
                launched[what] = [each.name for each in recorded]
            assert set(host_time.calls(EAGER)) == set(launched)
        forward, for_backward, backward = launched.values()
        assert forward == for_backward == ["forward_kernel"] and len(backward) == 4
        with pytest.raises(RuntimeError, match="'triton' cannot"):  # all is as it was
            host_time.calls(host_time.OURS)

    def test_both_are_timed_as_often_and_compared(self, host_time, monkeypatch):
        made = []
        monkeypatch.setattr(host_time, "CALLS", 2)
        monkeypatch.setattr(host_time, "calls", lambda name: {"a call": lambda: made.append(name)})
        (eager, ours) = host_time.measure(rounds=3)
        assert eager["what"] == ours["what"] == "a call" and len(eager["seconds"]) == len(ours["seconds"]) == 3
        assert made == 5 * [*2 * [EAGER], *2 * [host_time.OURS]]  # the first two rounds do not count
        eager["seconds"], ours["seconds"] = [4e-5, 2e-5, 8e-5], [1e-5, 2e-5, 5e-5]
        assert list(host_time.lines([eager, ours])) == [["a call", "40.0 (20.0)", "20.0 (10.0)", "0.50 (0.50)"]]

    def test_without_triton_it_says_so(self, host_time, monkeypatch, capsys):
        monkeypatch.setattr(host_time, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "argv", ["host_time.py"])
        with pytest.raises(SystemExit):
            host_time.main()
        assert "there is nothing to measure: triton is not installed" in capsys.readouterr().err


class TestUnits:
    SHAPES = ((2, 3, 4, 8), (1, 2, 5, 4))

    @pytest.fixture
    def units(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("units")

    @pytest.fixture
    def invented(self, units, monkeypatch):
        """Three sets: the fastest has kernels for bfloat16 alone, and the last is emulated."""
        own = {"one": {"bfloat16": "one", "float32": "two"}, "two": dict.fromkeys(("bfloat16", "float32"), "two")}
        own["one_emulated"] = {"bfloat16": "one_emulated", "float32": "two"}
        monkeypatch.setattr(units.extension, "instruction_sets", lambda: list(own))
        monkeypatch.setattr(units.extension, "units_by_dtype", lambda: own[os.environ[units.VARIABLE]])

    def test_a_unit_is_timed_where_it_has_a_kernel_of_its_own(self, units, invented, monkeypatch):
        monkeypatch.setenv(units.VARIABLE, "two")
        assert units.units("bfloat16") == ["one", "two"] and units.units("float32") == ["two"]
        assert os.environ[units.VARIABLE] == "two"

    @needs_kernels
    def test_each_runs_its_own_kernels_forward_and_backward(self, units, monkeypatch):
        monkeypatch.setenv(units.VARIABLE, "no such set")
        served = []
        with units.variable_kept():
            names = units.units("float32")
            task = Task("attention", "2x8", 1, side=3, backward=True)
            for implementation in units.implementations(task, names).values():
                implementation.leaves["q"].register_hook(lambda _: served.append(os.environ.get(units.VARIABLE)))
                implementation.call(backward=True)()
        assert served[1 : 1 + len(names)] == names and len(names) >= 1
        assert os.environ[units.VARIABLE] == "no such set"

    @needs_kernels
    def test_rows_name_shape_dtype_and_unit(self, units, monkeypatch):
        monkeypatch.setattr(units, "arithmetic_peak", lambda device, dtype: measure.Peak(1e9, str(dtype)))
        monkeypatch.setattr(units, "TRAINED_SIDE", 4)
        monkeypatch.delenv(units.VARIABLE, raising=False)
        content = units.measure(0.001, ["float32", "bfloat16"], self.SHAPES)
        sizes = ("dtype", "backward", "images", "heads", "side", "head_dim")
        groups = {tuple(row[key] for key in sizes) for row in content["rows"]}
        small, large = self.SHAPES  # the large one is timed forward alone
        modes = [(False, small), (True, small), (False, large)]
        assert groups == {(dtype, backward, *shape) for dtype in ("float32", "bfloat16") for backward, shape in modes}
        names = [row["implementation"] for row in content["rows"] if row["dtype"] == "bfloat16"]
        assert names[: len(names) // 3] == [SDPA, *units.units("bfloat16"), "composite"]
        assert all(len(row["seconds"]) >= 5 for row in content["rows"])
        assert content["peaks"]["bfloat16"] == {"rate": 1e9, "how": "torch.bfloat16"}
        assert content["serving"]["bfloat16"] in names and content["machine"]["cpu"]

    @needs_kernels
    def test_a_wrong_unit_is_refused_before_any_is_timed(self, units, monkeypatch):
        right, timed = units.by_unit, []

        def wrong(name, implementation):
            return right(name, implementation._replace(forward=lambda: implementation.forward() * 1.001))

        monkeypatch.setattr(units, "by_unit", wrong)
        monkeypatch.setattr(units, "take_turns", lambda *_: timed.append("a group"))
        with pytest.raises(WrongResultsError, match=f"ours: {units.units('float32')[0]}: out: error 1.0e-03"):
            units.measure(0.001, ["float32"], self.SHAPES)
        assert timed == []

    def test_large_grids_are_checked_with_one_head_of_one_image(self, units):
        small, large = Task("attention", "4x48", 8, side=32), Task("attention", "4x48", 8, side=64)
        assert units.as_checked(small) == small
        assert units.as_checked(large) == large._replace(model="1x48", batch=1)

    @pytest.mark.parametrize(
        "arguments, text",
        [
            (["--out", "{folder}"], "cannot be written: it is a folder"),
            (["--out", "{folder}/missing/x.json"], "there is no folder"),
            (["--out", "{folder}/x.json", "--seconds", "-1"], "argument --seconds: '-1' is no number above 0"),
            (["--out", "{folder}/x.json", "--dtype", "float64"], "choose from 'float32', 'bfloat16', 'float16'"),
            ([], "required: --out"),
        ],
    )
    def test_bad_input_ends_it_before_any_work(self, units, monkeypatch, capsys, tmp_path, arguments, text):
        monkeypatch.setattr(units, "measure", lambda *_: pytest.fail("it has begun"))
        monkeypatch.setattr(sys, "argv", ["units.py", *(text.format(folder=tmp_path) for text in arguments)])
        with pytest.raises(SystemExit) as ended:
            units.main()
        assert ended.value.code == 2 and text in capsys.readouterr().err

    def test_without_kernels_it_says_why(self, units, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(units, "why_not", lambda name: "it was never built here")
        monkeypatch.setattr(sys, "argv", ["units.py", "--out", str(tmp_path / "x.json")])
        with pytest.raises(SystemExit):
            units.main()
        assert "there are no units to time: it was never built here" in capsys.readouterr().err


class TestCheck:
    @pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
    @pytest.mark.parametrize("part", ["attention", "layer"])
    def test_right_implementations_pass(self, part, backward):
        task = Task(part, "convit_tiny", 1, side=5, backward=backward)
        judged = judge(task, {name: build(task, name) for name in (EAGER, "composite", "reference")})
        require_right(judged)
        assert all(0 < accuracy.error <= accuracy.allowed < 1e-3 for accuracy in judged.values())

    @pytest.mark.parametrize("part", ["attention", "layer"])
    def test_so_they_do_in_bfloat16_where_an_error_of_a_tenth_does_not(self, part):
        task = Task(part, "convit_tiny", 1, side=14, dtype=torch.bfloat16)
        right = {name: build(task, name) for name in (EAGER, "composite", "reference")}
        require_right(judge(task, right))
        wrong = right["composite"]._replace(forward=lambda: right["composite"].forward() * 1.1)
        with pytest.raises(WrongResultsError, match="ours: composite: out"):
            require_right(judge(task, {"composite": wrong}))

    def test_exact_positions_are_not_rounded(self):
        """bfloat16 has no 313, the square of a distance that a grid of 14 x 14 patches has."""
        task = Task("attention", "convit_tiny", 1, side=14, dtype=torch.bfloat16)
        eager = build(task, EAGER, exact=True)
        q, k, v, pos_weight, gate = eager.leaves.values()
        pos_weight.fill_(0.1)  # the farthest patches count most
        scale = q.shape[-1] ** -0.5
        exact = ck.gpsa_attention(q, k, v, pos_weight, gate, scale=scale, backend="reference")
        torch.testing.assert_close(eager.forward(), exact, rtol=1e-10, atol=1e-10)

    def test_all_are_held_to_the_same(self):
        task = Task("attention", "convit_tiny", 1, side=5)
        right, broken = build(task, EAGER), build(task, EAGER)
        broken = broken._replace(forward=lambda: right.forward() * 1.0001)
        judged = judge(task, {EAGER: right, COMPILED: broken})
        assert judged[EAGER].allowed == judged[COMPILED].allowed
        with pytest.raises(WrongResultsError, match=r"torch\.compile: out: error"):
            require_right(judged)

    @pytest.mark.parametrize("result", ["d q", "d v", "d gate"])
    def test_an_error_in_one_gradient_is_named(self, result):
        task = Task("attention", "convit_tiny", 1, side=5, backward=True)
        implementation = build(task, "composite")
        implementation.leaves[result.removeprefix("d ")].register_hook(lambda gradient: gradient * 1.001)
        judged = judge(task, {EAGER: build(task, EAGER), "composite": implementation})
        with pytest.raises(WrongResultsError, match=f"ours: composite: {result}: error"):
            require_right(judged)

    def test_nan_is_wrong(self):
        task = Task("attention", "convit_tiny", 1, side=3)
        implementation = build(task, "composite")
        broken = implementation._replace(forward=lambda: implementation.forward() * torch.nan)
        with pytest.raises(WrongResultsError, match="error inf"):
            require_right(judge(task, {"composite": broken}))


class TestTasks:
    # multiply-adds of the paper's table 1, without what is no matrix product
    @pytest.mark.parametrize("model, billions", list(zip(ARCHITECTURES, (1, 2, 5.4, 10, 17, 30), strict=True)))
    def test_arithmetic_is_the_papers(self, model, billions):
        assert Task("model", model, 1).flops() / 2e9 == pytest.approx(billions, rel=0.25)
        assert Task("model", model, 3, backward=True).flops() == 9 * Task("model", model, 1).flops()

    def test_models_have_the_papers_parameters(self):
        assert sum(p.numel() for p in convit("convit_tiny_plus").parameters()) / 1e6 == pytest.approx(10, rel=0.05)

    def test_every_available_backend_takes_part(self):
        available = [backend.name for backend in ck.backends() if backend.available]
        assert implementation_names(Task("layer", "convit_tiny", 1)) == [EAGER, COMPILED, *available]
        assert implementation_names(Task("attention", "convit_tiny", 1)) == [EAGER, COMPILED, SDPA, *available]
        assert implementation_names(Task("layer", "convit_tiny", 1, device="cuda"))[-1] == GRAPH

    @pytest.mark.parametrize("part", ["attention", "layer", "model"])
    def test_a_cuda_graph_is_recorded_of_ours(self, part, monkeypatch):
        task = Task(part, "convit_tiny", 1, side=4, backward=True)
        with pytest.raises(CannotRunError, match="CUDA graphs are of GPUs"):
            build(task, GRAPH)
        recorded = []
        monkeypatch.setattr(implementations, "why_not", lambda *_: "")
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *what: recorded.append(what) or what[0])
        results = [build(task, name).results() for name in (GRAPH, "auto")]
        assert len(recorded) == 1
        assert recorded[0][0](*recorded[0][1]).shape == results[0][0].shape
        torch.testing.assert_close(*results)

    def test_implementations_get_the_same_values(self):
        task = Task("layer", "convit_tiny", 1, side=4)
        torch.manual_seed(5)
        outputs = [build(task, name).forward() for name in (EAGER, "composite")]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "name, reason", [("triton", "torch sees no GPU|run on GPUs"), (SDPA, "part of a layer")], ids=["gpu", "sdpa"]
    )
    def test_one_that_cannot_run_says_why(self, name, reason):
        with pytest.raises(CannotRunError, match=reason):
            build(Task("layer", "convit_tiny", 1), name)

    def test_attention_alone_may_have_any_heads(self):
        task = Task("attention", "6x64", 2, side=3)
        assert str(task).startswith("attention, 6 heads of 64, forward, batch 2")
        assert build(task, "composite").forward().shape == (2, 6, 9, 64)
        assert task.flops() == 4 * 2 * 6 * 81 * 64

    @pytest.mark.parametrize("model", ["convit_huge", "6x", "0x64"])
    def test_an_unknown_model_is_an_error(self, model):
        with pytest.raises(
            ValueError, match=f"unknown model '{model}': allowed are .*convit_base_plus.*HEADSxHEAD_DIM"
        ):
            build(Task("attention", model, 1), EAGER)

    def test_an_unknown_one_is_an_error(self):
        with pytest.raises(ValueError, match="unknown backend 'fastest'"):
            build(Task("layer", "convit_tiny", 1), "fastest")


class TestMeasure:
    def test_implementations_take_turns(self):
        order = []
        functions = {name: lambda name=name: order.append(name) for name in "ab"}
        samples = measure.interleaved(functions, "cpu", rounds=3)
        assert order == list("ababab")
        assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}

    def test_percentiles(self):
        assert measure.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
        assert measure.spread([7.0]) == (7.0, 7.0, 7.0)

    def test_peak_memory_counts_what_torch_allocates(self):
        assert measure.peak_memory(lambda: torch.ones(1_000_000).add(1).sum(), "cpu") == pytest.approx(8e6, rel=0.01)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
    def test_peak_resident_counts_other_memory_too(self):
        size = 64_000_000
        assert measure.peak_resident(lambda: bytearray(b"1") * size) == pytest.approx(size, rel=0.1)

    @pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
    def test_more_memory_than_there_is_raises(self):
        with pytest.raises(measure.DoesNotFitError, match="allocate"), measure.memory_limit("cpu"):
            torch.empty(1 << 50, dtype=torch.uint8)
        torch.ones(1)  # and the limit is gone

    def test_peaks_say_how_they_were_found(self):
        peak = measure.arithmetic_peak("cpu", torch.float32)
        assert peak.rate > 1e9
        assert "matrix product" in peak.how
