"""The profile command: operators by phase, the page, what is refused."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import convit_kernels as ck
from convit_kernels import attention
from convit_kernels.bench import phases, profile, profile_page, profile_tables
from convit_kernels.bench.accuracy import WrongResultsError
from convit_kernels.bench.compare import MARK, times_faster
from convit_kernels.bench.implementations import Task, build
from convit_kernels.bench.machine import machine
from convit_kernels.bench.measure import spread
from convit_kernels.cli import app


@pytest.fixture(scope="module")
def layer():
    """Eager timm and two of ours on one layer, forward and backward."""
    task = Task("layer", "convit_tiny", 1, side=6, backward=True)
    return profile.run(task, ["eager", "composite", "reference"], rounds=2, step=lambda text: None)


def operators(found, implementation, phase):
    (one,) = (one for one in found.implementations if one.name == implementation)
    return set(one.operators.get(phase, {}))


class TestPhases:
    def test_of_eager_timm(self, layer):
        (eager, _, _) = layer.implementations
        assert set(eager.phases) - {"rest"} == {"projections", "content", "position", "mix", "output"}
        assert "aten::bmm" in operators(layer, "eager", "content")  # q k^T
        assert "aten::_softmax" in operators(layer, "eager", "content")
        assert "aten::_softmax" in operators(layer, "eager", "position")
        assert "aten::sigmoid" in operators(layer, "eager", "mix")
        assert "aten::bmm" in operators(layer, "eager", "mix")  # the mixed map times v
        assert "aten::addmm" in operators(layer, "eager", "output")
        assert "aten::bmm" not in operators(layer, "eager", "position")

    def test_of_the_composite(self, layer):
        assert any("scaled_dot_product" in name for name in operators(layer, "composite", "content"))
        assert "convit_kernels::relative_position_tables" in operators(layer, "composite", "position")
        assert "aten::bmm" in operators(layer, "composite", "position")
        assert "aten::_softmax" not in operators(layer, "composite", "content")

    def test_a_copy_into_another_layout_belongs_to_what_reads_it(self, layer):
        assert "aten::copy_" in operators(layer, "composite", "position")  # values by column and by row
        assert "aten::copy_" not in operators(layer, "eager", "projections")

    def test_the_backward_of_an_operator_is_where_the_operator_is(self, layer):
        for phase in ("content", "position"):
            assert "aten::_softmax_backward_data" in operators(layer, "eager", phase)
        assert "aten::sigmoid_backward" in operators(layer, "eager", "mix")
        assert any("backward" in name for name in operators(layer, "composite", "position"))

    def test_a_layer_has_next_to_no_rest(self, layer):
        for one in layer.implementations:
            names = set(one.operators.get("rest", {}))
            assert not names & {"aten::mm", "aten::addmm", "aten::bmm", "aten::_softmax", "aten::mul"}, one.name

    def test_one_kernel_for_all_is_a_phase_of_its_own(self, monkeypatch):
        def fused(inputs):
            return opaque(*inputs[:5])

        library = torch.library.Library("phase_test", "DEF")
        library.define("opaque(Tensor q, Tensor k, Tensor v, Tensor w, Tensor g) -> Tensor")
        library.impl("opaque", lambda q, k, v, w, g: v + 0 * q, "CompositeExplicitAutograd")
        opaque = torch.ops.phase_test.opaque.default
        entry = attention._BACKENDS["composite"]._replace(attention=fused)
        monkeypatch.setitem(attention._BACKENDS, "composite", entry)
        implementation = build(Task("layer", "convit_tiny", 1, side=4), "composite")
        with (
            torch.profiler.profile() as recorded,
            phases.follow(implementation.module) as layouts,
            torch.inference_mode(),
        ):
            implementation.forward()
        _, by_phase, _, _ = profile.attribute(recorded.events(), "cpu", layouts, compiled=False)
        assert "phase_test::opaque" in by_phase["attention"]
        assert {"projections", "attention", "output"} <= set(by_phase)
        assert not {"content", "position"} & set(by_phase)

    @pytest.mark.parametrize(
        "marks, phase",
        [
            ({"make query"}, "projections"),
            ({"query"}, "content"),
            ({"attention"}, "attention"),
            ({"content", "value"}, "content"),
            ({"position"}, "position"),
            ({"position", "gate", "value"}, "position"),
            ({"gate"}, "mix"),
            ({"content", "gate"}, "mix"),
            ({"content", "position", "gate", "value"}, "mix"),
            ({"query", "value", "position", "gate"}, "attention"),
            ({"content", "make output"}, "output"),
            (set(), "rest"),
        ],
    )
    def test_rules(self, marks, phase):
        assert phases.phase_of(frozenset(marks)) == phase

    def test_following_changes_no_result(self):
        implementation = build(Task("layer", "convit_tiny", 1, side=4, backward=True), "eager")
        plain = implementation.results()
        with phases.follow(implementation.module):
            followed = implementation.results()
        assert all(torch.equal(a, b) for a, b in zip(plain, followed, strict=True) if a is not None)


class TestFigures:
    def test_shares_add_up(self, layer):
        for one in layer.implementations:
            assert sum(share.seconds for share in one.phases.values()) == pytest.approx(one.total)
            by_operator = sum(s.seconds for found in one.operators.values() for s in found.values())
            assert by_operator == pytest.approx(one.total)

    def test_memory_ends_near_where_it_began_and_peaks_in_between(self, layer):
        for one in layer.implementations:
            assert one.peak_memory == pytest.approx(max(held for _, held in one.memory), rel=0.01)
            assert sum(share.memory for share in one.phases.values()) >= one.peak_memory

    def test_eager_moves_more_bytes_than_ours(self, layer):
        traffic = {one.name: one.traffic for one in layer.implementations}
        assert traffic["eager"] > traffic["reference"] > 0

    def test_times_faster_is_the_benchmarks_rule(self, layer):
        eager = layer.implementations[0].seconds
        for one in layer.implementations:
            assert one.eager_ratio == times_faster(eager, one.seconds).times

    def test_a_wrong_implementation_is_not_profiled(self, monkeypatch):
        monkeypatch.setattr(ck.GPSA, "gate", lambda self: self.gating_param + 0.01 * (self.backend == "composite"))
        with pytest.raises(WrongResultsError, match="ours: composite: out: error"):
            profile.run(Task("layer", "convit_tiny", 1, side=4), ["eager", "composite"], step=lambda text: None)

    def test_operators_get_readable_names(self):
        assert profile_tables.operator_name("aten::mm") == "mm"
        assert (
            profile_tables.operator_name("convit_kernels::dense_position_table")
            == "convit_kernels::dense_position_table"
        )
        assert profile_tables.operator_name("## Call CompiledFxGraph fmtxlw6pizv5oq2qeg ##") == "compiled graph"

    @pytest.mark.parametrize(
        "kernel, name",
        [
            ("forward_kernel", "GPSA attention, forward (Triton)"),
            ("backward_kv_kernel", "GPSA attention, backward (Triton)"),
            ("void (anonymous namespace)::dense_kernel<float>(...)", "relative-position tables"),
            ("void pytorch_flash::flash_fwd_kernel<...>", "fused attention (PyTorch's SDPA)"),
            ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32>", "matrix product"),
            ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise or copy"),
            ("void (anonymous namespace)::softmax_warp_forward<float>", "softmax"),
            ("unheard_of<int>(float)", "unheard_of"),
        ],
    )
    def test_gpu_kernels_get_readable_names(self, kernel, name):
        assert profile.readable(kernel) == name


class TestDisturbances:
    """On a machine that does other things too."""

    TASK = Task("layer", "convit_tiny", 1, side=4)
    CALM, BUSY = [0.2, 0.2, 0.21], [0.2, 0.2, 1.927]

    def run(self, monkeypatch, *samples: list[float], profiled: float = 0.2):
        """Profiles one implementation whose timed calls take this long, in turn; what it did, and the profile."""
        steps, attempts = [], iter(samples)
        monkeypatch.setattr(profile, "interleaved", lambda *_: {"composite": next(attempts)})
        recording = profile.Recording({"rest": profile.Share(seconds=profiled)}, {}, {}, [(0.0, 1), (0.1, 2)], None)
        monkeypatch.setattr(profile, "_record", lambda *_: recording)
        return steps, profile.run(self.TASK, ["composite"], step=steps.append)

    def test_a_calm_profile_is_measured_once(self, monkeypatch):
        steps, profiled = self.run(monkeypatch, self.CALM)
        assert not any("again:" in step for step in steps)
        assert profiled.warnings == [] and MARK not in profile_page.render(profiled)

    def test_a_disturbed_call_is_timed_again(self, monkeypatch):
        steps, profiled = self.run(monkeypatch, self.BUSY, self.CALM)
        assert steps.count("timing again: something disturbed it") == 1
        assert profiled.implementations[0].seconds == self.CALM and profiled.warnings == []

    def test_one_that_stays_disturbed_is_marked(self, monkeypatch):
        _, profiled = self.run(monkeypatch, *[self.BUSY] * 3)
        (warning,) = profiled.warnings
        assert warning.startswith(f"ours: composite{MARK}: the slowest timed call took 1927 ms, the median")
        page = profile_page.render(profiled)
        assert f"ours: composite{MARK}</td>" in page and warning in page
        assert profiled.to_json()["implementations"][0]["disturbances"] != []
        assert warning in profile_tables.tables(profiled)

    def test_so_is_a_profiled_call_far_from_the_timed_ones(self, monkeypatch):
        steps, profiled = self.run(monkeypatch, self.CALM, profiled=1.927)
        assert steps.count("profiling again: something disturbed it") == 2
        assert "the profiled call took 1927 ms, the median of the timed calls is 200 ms" in profiled.warnings[0]

    def test_the_load_before_it_began_is_shown(self, monkeypatch):
        monkeypatch.setattr(profile, "machine", lambda: machine() | {"load_1_minute": 1.25, "cores": 2})
        _, profiled = self.run(monkeypatch, self.CALM)
        assert profiled.where.endswith("load 1.25 on 2 cores")
        assert profiled.where in profile_page.render(profiled) and profiled.where in profile_tables.tables(profiled)


class TestWhatCannotRun:
    @pytest.mark.parametrize("names", [["triton"], ["eager", "triton"]])
    def test_is_refused_with_its_reason_before_any_work(self, monkeypatch, names):
        monkeypatch.setattr(profile, "build", lambda *_: pytest.fail("something was built"))
        with pytest.raises(ValueError, match=r"cannot be profiled on cpu: ours: triton: .*GPU"):
            profile.run(Task("layer", "convit_tiny", 1, side=4), names, step=lambda text: None)

    def test_the_command_says_so_in_a_line(self):
        result = CliRunner().invoke(app, ["profile", "--layer", "--device", "cpu", "--compare", "triton"])
        assert result.exit_code == 2
        assert "ours: triton: " in result.output and "Phases" not in result.output


class TestPage:
    @pytest.fixture(scope="class")
    @classmethod
    def page(cls, layer):
        return profile_page.render(layer)

    def test_has_what_was_found(self, page, layer):
        text = re.sub(r"<[^>]+>", " ", page)
        assert str(layer.task) in text
        names = ("timm, eager", "ours: composite", *layer.implementations[0].phases)
        for word in (*names, "Roofline", "Memory over time", layer.where):
            assert word in text
        for one in layer.implementations:
            assert f"{one.eager_ratio:.2f}\N{MULTIPLICATION SIGN}" in text

    def test_asks_for_nothing_from_outside(self, page):
        addresses = []

        class Addresses(HTMLParser):
            def handle_starttag(self, tag, attributes):
                assert tag not in ("script", "link", "iframe")
                addresses.extend(value for name, value in attributes if name in ("src", "srcset", "href"))

        Addresses().feed(page)
        assert len(addresses) == 6  # three figures, light and dark
        assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
        assert "url(" not in page and "@import" not in page and "http" not in page

    def test_follows_the_readers_colour_scheme(self, page):
        assert page.count("prefers-color-scheme: dark") == 4

    def test_on_a_narrow_screen_each_number_has_its_columns_name(self, page):
        """There the tables with many columns lose their headings, and each cell shows its own."""
        assert 'name="viewport"' in page and "content: attr(data-label)" in page
        tables = re.findall(r'<table class="[^"]*stacked">.*?</table>', page, re.DOTALL)
        assert len(tables) == 2
        for table in tables:
            headings = set(re.findall(r"<th[^>]*>([^<]+)</th>", table))
            cells = re.findall(r"<td(?! class=\"name\")([^>]*)>(?!</td>)", table)
            labels = [re.search('data-label="([^"]+)"', cell)[1] for cell in cells]
            assert len(labels) > 5 and set(labels) < headings

    def test_what_scrolls_shows_that_it_does(self, page):
        (rule,) = re.findall(r"\.scroll \{(.*?)\}", page, re.DOTALL)
        assert "overflow-x: auto" in rule and "var(--shadow)" in rule and "local" in rule
        assert page.count("overflow-x") == 1  # nothing else scrolls


class TestCommand:
    def test_writes_page_json_and_traces(self, tmp_path):
        options = ("--model", "convit_tiny", "--batch", "1", "--layer", "--repeats", "1", "--compare", "eager,auto")
        files = ("--html", tmp_path / "p.html", "--json", tmp_path / "p.json", "--trace", tmp_path / "traces")
        result = CliRunner().invoke(app, ["profile", *options, *map(str, files)])
        assert result.exit_code == 0, result.output
        for word in ("Phases", "Operators", "position", "timm, eager", "ours, automatic"):
            assert word in result.output
        content = json.loads((tmp_path / "p.json").read_text())
        eager, ours = content["implementations"]
        assert eager["phases"]["position"]["calls"] > 0
        assert ours["phases"]["attention"]["calls"] > 0
        assert len(eager["seconds"]) == 1
        assert spread(eager["seconds"]).p50 > 0
        assert "<html" in (tmp_path / "p.html").read_text()
        assert json.loads((tmp_path / "traces" / "eager.json").read_text())["traceEvents"]

    @pytest.mark.parametrize(
        "arguments, text",
        [
            (("--model", "resnet50"), "unknown model 'resnet50'"),
            (("--dtype", "int8"), "unknown dtype 'int8'"),
            (("--device", "tpu"), "must be cpu or cuda"),
            (("--compare", "eager,fastest"), "unknown backend 'fastest'"),
        ],
    )
    def test_bad_arguments(self, arguments, text):
        result = CliRunner().invoke(app, ["profile", "--batch", "1", "--layer", *arguments])
        assert result.exit_code == 2
        assert text in result.output.replace("\n", " ")
