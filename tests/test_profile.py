"""The profile command: operators by phase, the page, what is refused."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import convit_kernels as ck
from convit_kernels import attention
from convit_kernels.bench import phases, profile, profile_page
from convit_kernels.bench.accuracy import WrongResultsError
from convit_kernels.bench.compare import times_faster
from convit_kernels.bench.contenders import Task, build
from convit_kernels.bench.measure import spread
from convit_kernels.cli import app


@pytest.fixture(scope="module")
def layer():
    """Eager timm and two of ours on one layer, forward and backward."""
    task = Task("layer", "convit_tiny", 1, side=6, backward=True)
    return profile.run(task, ["eager", "composite", "reference"], rounds=2, step=lambda text: None)


def operators(found, contender, phase):
    (one,) = (one for one in found.contenders if one.name == contender)
    return set(one.operators.get(phase, {}))


class TestPhases:
    def test_of_eager_timm(self, layer):
        (eager, _, _) = layer.contenders
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
        for one in layer.contenders:
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
        contender = build(Task("layer", "convit_tiny", 1, side=4), "composite")
        with torch.profiler.profile() as recorded, phases.follow(contender.module) as layouts, torch.inference_mode():
            contender.forward()
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
        contender = build(Task("layer", "convit_tiny", 1, side=4, backward=True), "eager")
        plain = contender.results()
        with phases.follow(contender.module):
            followed = contender.results()
        assert all(torch.equal(a, b) for a, b in zip(plain, followed, strict=True) if a is not None)


class TestFigures:
    def test_shares_add_up(self, layer):
        for one in layer.contenders:
            assert sum(share.seconds for share in one.phases.values()) == pytest.approx(one.total)
            by_operator = sum(s.seconds for found in one.operators.values() for s in found.values())
            assert by_operator == pytest.approx(one.total)

    def test_memory_ends_near_where_it_began_and_peaks_in_between(self, layer):
        for one in layer.contenders:
            assert one.peak_memory == pytest.approx(max(held for _, held in one.memory), rel=0.01)
            assert sum(share.memory for share in one.phases.values()) >= one.peak_memory

    def test_eager_moves_more_bytes_than_ours(self, layer):
        traffic = {one.name: one.traffic for one in layer.contenders}
        assert traffic["eager"] > traffic["reference"] > 0

    def test_times_faster_is_the_benchmarks_rule(self, layer):
        eager = layer.contenders[0].seconds
        for one in layer.contenders:
            assert one.eager_ratio == times_faster(eager, one.seconds).times

    def test_a_wrong_contender_is_not_profiled(self, monkeypatch):
        monkeypatch.setattr(ck.GPSA, "gate", lambda self: self.gating_param + 0.01 * (self.backend == "composite"))
        with pytest.raises(WrongResultsError, match="ours: composite: out: error"):
            profile.run(Task("layer", "convit_tiny", 1, side=4), ["eager", "composite"], step=lambda text: None)

    def test_operators_get_readable_names(self):
        assert profile.operator_name("aten::mm") == "mm"
        assert profile.operator_name("convit_kernels::dense_position_table") == "convit_kernels::dense_position_table"
        assert profile.operator_name("## Call CompiledFxGraph fmtxlw6pizv5oq2qeg ##") == "compiled graph"

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


class TestPage:
    @pytest.fixture(scope="class")
    @classmethod
    def page(cls, layer):
        return profile_page.render(layer)

    def test_has_what_was_found(self, page, layer):
        text = re.sub(r"<[^>]+>", " ", page)
        assert str(layer.task) in text
        for word in ("timm, eager", "ours: composite", *layer.contenders[0].phases, "Roofline", "Memory over time"):
            assert word in text
        for one in layer.contenders:
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

    def test_follows_the_readers_colour_scheme_and_width(self, page):
        assert page.count("prefers-color-scheme: dark") == 4
        assert 'name="viewport"' in page


class TestCommand:
    def test_writes_page_json_and_traces(self, tmp_path):
        options = ("--model", "convit_tiny", "--batch", "1", "--layer", "--repeats", "1", "--compare", "eager,auto")
        files = ("--html", tmp_path / "p.html", "--json", tmp_path / "p.json", "--trace", tmp_path / "traces")
        result = CliRunner().invoke(app, ["profile", *options, *map(str, files)])
        assert result.exit_code == 0, result.output
        for word in ("Phases", "Operators", "position", "timm, eager", "ours, automatic"):
            assert word in result.output
        content = json.loads((tmp_path / "p.json").read_text())
        eager, ours = content["contenders"]
        assert ours["phases"]["position"]["calls"] > 0
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
