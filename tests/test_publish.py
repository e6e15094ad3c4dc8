"""The README's table and the pages of docs/benchmarks: they say what the committed results say."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from invented_results import MACHINE, disturbed_run, results, row, write

from convit_kernels.bench.accuracy import WrongResultsError
from convit_kernels.bench.compare import MARK, noise_of_run
from convit_kernels.bench.implementations import Implementation, Task
from convit_kernels.bench.results import NotMeasured

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "benchmarks"
README = (ROOT / "README.md").read_text()


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import publish

    return publish


def links(text: str) -> list[str]:
    """Of a page, to files beside it."""
    return [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]


class TestCommitted:
    def test_the_readme_is_what_the_results_make(self, publish):
        assert publish.readme(README) == README, "run: python benchmarks/publish.py"

    def test_so_is_every_page_and_there_is_no_other(self, publish):
        pages = publish.pages()
        assert {path.name for path in PAGES.glob("*.md")} == pages.keys() | {"method.md"}
        for name, text in pages.items():
            assert (PAGES / name).read_text() == text, f"{name}: run: python benchmarks/publish.py"

    def test_pages_point_to_what_is_there_and_to_nothing_outside_the_site(self):
        for page in PAGES.glob("*.md"):
            for link in links(page.read_text()):
                target = (PAGES / link).resolve()
                assert target.is_file() and target.is_relative_to(ROOT / "docs"), (page.name, link)

    def test_so_does_the_readme(self, publish):
        targets = [ROOT / link for link in links(publish.SECTION.search(README)[0])]
        assert len(targets) >= 4 and all(target.is_file() for target in targets)

    def test_figures_are_there_once(self):
        figures = [path.read_bytes() for path in (*PAGES.rglob("*.svg"), *ROOT.glob("benchmarks/**/*.svg"))]
        assert len(figures) >= 3 and len(set(figures)) == len(figures)

    def test_the_readmes_table_is_short_and_of_the_rows_of_its_page(self, publish):
        section = publish.SECTION.search(README)
        page = publish.results_page(publish.run_of(Path(section["source"]).stem))
        lines = [line for line in section[0].splitlines() if line.startswith("| ")][2:]
        ratios = re.findall(rf"(?<=\| )\d+\.\d\d{MARK}?(?= \|)", "\n".join(lines))
        assert len(lines) <= 12 and len(ratios) == 3 * len(lines)  # six for each of two dtypes
        assert all(f"| **{ratio}** |" in page for ratio in ratios)

    def test_no_ratio_is_beyond_the_noise_of_its_columns_without_a_mark(self, publish):
        for run in publish.runs():
            if run.results is None:
                continue
            noise = math.exp(3 * noise_of_run(run.results.rows))
            details = publish.results_page(run).partition("## Every row")[2].splitlines()
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


class TestWholeModels:
    @pytest.fixture
    def against_deit(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        import against_deit

        return against_deit

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
        """The implementations of the smallest size, nothing compiled."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            import against_deit

            patch.setattr(against_deit, "frozen", lambda implementation: implementation)
            return against_deit.build(Task("model", "convit_tiny", 1))

    @pytest.mark.parametrize(
        "broken, text",
        [
            ("ConViT, replaced", "ours, automatic: out: error 1.0e-03"),
            ("ConViT, composite", "ours: composite: out: error 1.0e-03"),
            ("ConViT, replaced, compiled and frozen", "compiled and frozen: out: error 1.0e-03"),
            ("DeiT, timm, compiled and frozen", "DeiT's out: error 1.0e-03"),
        ],
    )
    def test_a_wrong_one_is_refused_before_any_is_timed(self, against_deit, right, monkeypatch, broken, text):
        wrong = right[broken]._replace(forward=lambda: right[broken].forward() * 1.001)
        timed = []
        monkeypatch.setattr(against_deit, "SIZES", {"convit_tiny": ("deit_tiny_patch16_224", 1)})
        monkeypatch.setattr(against_deit, "build", lambda task: right | {broken: wrong})
        monkeypatch.setattr(against_deit, "take_turns", lambda *_: timed.append("a group"))
        with pytest.raises(WrongResultsError, match=text):
            against_deit.measure(1, ["float32"])
        assert timed == []

    def test_frozen_packs_the_weights_and_not_the_input(self, against_deit):
        layer, images = torch.nn.Linear(8, 4), torch.randn(2, 8)
        eager = Implementation(lambda: layer(images), dict(layer.named_parameters()), torch.randn(2, 4), layer)
        call = against_deit.frozen(eager).call(backward=False)
        images.mul_(2)
        torch.testing.assert_close(call(), layer(images).detach())
        with torch.no_grad():
            layer.weight.zero_()
        assert not torch.equal(call(), layer(images))

    def rows(self, against_deit, dtype: str, **seconds: list[float]) -> list[dict]:
        """Of every size and mode: by the name of a constant in against_deit.py."""
        return [
            {"size": size, "backward": backward, "dtype": dtype, "batch": 1, "seconds": times, "attention": None}
            | {"implementation": getattr(against_deit, name), "parameters": 100 if name == "DEIT" else 150}
            for size in against_deit.SIZES
            for backward in (False, True)
            for name, times in seconds.items()
        ]

    def page(self, publish, rows: list[dict], not_measured=()) -> str:
        content = {"machine": MACHINE, "date": "2026-11-25", "rows": rows, "not_measured": not_measured}
        return publish.results_page(publish.Run("x", models=content))

    def test_what_it_says_of_deit_is_the_less_favourable(self, publish, against_deit):
        # of DeiT over replaced: 1 by pairs, 4 by medians
        seconds = {"EAGER_CONVIT": [1, 1, 1], "REPLACED": [4, 1, 1], "DEIT": [4, 4, 1]}
        page = self.page(publish, self.rows(against_deit, "float32", **seconds))
        assert "| ConViT-Ti, forward, float32 | 1.00 | 1.50 |" in page
        assert "| ConViT-B, forward + backward, float32 | 1.00 | 1.50 |" in page
        assert page.index("ConViT-B, forward, float32") < page.index("ConViT-Ti, forward + backward, float32")
        assert "commit abc1234, 2026-11-25" in page and f"| {against_deit.REPLACED} |" in page
        assert against_deit.COMPOSITE not in page  # earlier files lack it

    def test_each_dtype_is_held_against_deit_of_its_own(self, publish, against_deit):
        seconds = {"EAGER_CONVIT": [9], "REPLACED": [2], "COMPOSITE": [3], "DEIT": [1]}
        rows = self.rows(against_deit, "float32", **seconds)
        rows += self.rows(against_deit, "bfloat16", **seconds | {"COMPOSITE": [5]})
        page = self.page(publish, rows)
        assert "| ConViT-S, forward, float32 | 2.00 | 3.00 | 1.50 |" in page
        assert "| ConViT-S, forward, bfloat16 | 2.00 | 5.00 | 1.50 |" in page
        assert page.index("ConViT-B, forward + backward, float32") < page.index("ConViT-Ti, forward, bfloat16")

    def test_a_dtype_whose_products_are_slow_is_left_out_with_the_reason(self, publish, against_deit, monkeypatch):
        monkeypatch.setattr(against_deit, "why_slow", lambda device, dtype: "it takes an hour")
        left_out = against_deit.measure(1, ["bfloat16"])["not_measured"]
        assert left_out == [{"dtype": "bfloat16", "reason": "it takes an hour"}]
        seconds = {"EAGER_CONVIT": [1], "REPLACED": [1], "DEIT": [1]}
        page = self.page(publish, self.rows(against_deit, "float32", **seconds), left_out)
        assert "bfloat16 was not timed: it takes an hour." in page

    def test_deit_is_exact_of_the_rounded_values(self, against_deit):
        task = Task("model", "convit_tiny", 1, dtype=torch.bfloat16)
        rounded, exact = (against_deit.deit(task, exact) for exact in (False, True))
        for name, leaf in rounded.leaves.items():
            assert leaf.dtype == torch.bfloat16 and torch.equal(leaf.double(), exact.leaves[name])

    def test_earlier_files_are_read_too(self, against_deit, tmp_path):
        row = {"size": "convit_tiny", "backward": False, "batch": 8, "seconds": [1.0]}
        (tmp_path / "old.json").write_text(json.dumps({"rows": [row | {"contender": against_deit.DEIT}]}))
        found = against_deit.load(tmp_path / "old.json")
        assert found["rows"] == [row | {"implementation": against_deit.DEIT, "dtype": "float32"}]
        assert found["not_measured"] == []


class TestUnits:
    def content(self) -> dict:
        """SDPA takes 4 ms; the peak is so that the fast unit's forward in float32 reaches half of it."""
        dtypes, flops = ("float32", "bfloat16"), 4 * 8 * 4 * 196**2 * 48
        times = {"sdpa": 0.004, "fast_unit": 0.002, "composite": 0.008}
        rows = [
            {"images": 8, "heads": 4, "side": 14, "head_dim": 48, "dtype": dtype, "backward": backward}
            | {"implementation": name, "seconds": [time] * 3}
            for dtype in dtypes
            for backward in (False, True)
            for name, time in times.items()
        ]
        rows[-2] |= {"seconds": [0.001, 0.004, 0.004]}
        peaks = {
            dtype: {"rate": 2 * flops / 0.002, "how": f"a product in {dtype}"} for dtype in ("float32", "bfloat16")
        }
        serving = {"float32": "fast_unit", "bfloat16": "fast_unit"}
        return {"machine": MACHINE, "date": "2026-11-27", "serving": serving, "peaks": peaks, "rows": rows}

    def test_the_page_has_ratio_and_share_by_shape_and_dtype(self, publish):
        page = publish.results_page(publish.Run("x", units=self.content()))
        assert "Measured on Abacus (AVX2), 2 threads" in page and "2026-11-27" in page
        assert "a product in bfloat16" in page and "serve fast_unit (float32), fast_unit (bfloat16)" in page
        assert page.index("**forward, float32**") < page.index("**forward + backward, bfloat16**")
        assert "| images, heads, grid, head_dim | SDPA, content only | fast_unit | composite |" in page
        lines = [line for line in page.splitlines() if line.startswith("| 8, 4, 14x14, 48 |")]
        assert lines[0] == "| 8, 4, 14x14, 48 | 4.00 ms (25%) | 2.00 (50%) | 0.50 (12%) |"
        assert lines[1].startswith("| 8, 4, 14x14, 48 | 4.00 ms (88%) | 2.00 (175%) |")  # seven products, not two
        assert "| 1.00 (" in lines[3]  # by medians and by pairs, and not by the fastest call

    def test_the_share_is_of_float32_s_product_where_that_is_faster(self, publish):
        content = self.content()
        content["peaks"]["bfloat16"]["rate"] /= 100
        _, in_bfloat16 = publish.results_page(publish.Run("x", units=content)).split("**forward, bfloat16**")
        assert "| 4.00 ms (25%) |" in in_bfloat16
        del content["peaks"]["float32"]
        content["rows"] = [row for row in content["rows"] if row["dtype"] == "bfloat16"]
        assert "| 4.00 ms (2500%) |" in publish.results_page(publish.Run("x", units=content))

    def test_a_file_belongs_to_its_run(self, publish, monkeypatch, tmp_path):
        monkeypatch.setattr(publish, "RESULTS", tmp_path)
        (tmp_path / "x-abc1234-units.json").write_text(json.dumps(self.content()))
        (run,) = publish.runs()
        assert run.name == "x-abc1234" and run.units == self.content() and not run.on_gpu
        assert "| 2026-11-27 | CPU kernels by instruction set |" in publish.index_page([run])


class TestHostTime:
    def test_its_file_belongs_to_its_run_and_the_page_compares(self, publish, monkeypatch, tmp_path):
        rows = [
            {"what": "backward", "implementation": name, "seconds": seconds}
            for name, seconds in (("eager", [2e-4, 1e-4, 4e-4]), ("triton", [1e-4, 8e-5, 3e-4]))
        ]
        content = {"machine": MACHINE, "date": "2026-11-27", "rows": rows}
        monkeypatch.setattr(publish, "RESULTS", tmp_path)
        monkeypatch.setattr(publish, "ROOT", tmp_path.parent)
        (tmp_path / "x-abc1234-host.json").write_text(json.dumps(content))
        (run,) = publish.runs()
        assert run.name == "x-abc1234" and run.host == content and not run.on_gpu
        assert "| backward | 200.0 (100.0) | 100.0 (80.0) | 0.50 (0.80) |" in publish.results_page(run)
        assert "| 2026-11-27 | the host's time |" in publish.index_page([run])


class TestReadme:
    SOURCE = "benchmarks/results/x.json"

    def test_a_disturbed_neighbour_does_not_lead_the_table(self, publish):
        rows = results(*disturbed_run())
        section = publish.readme_section(self.SOURCE, rows, on_gpu=False)
        (line,) = (line for line in section.splitlines() if line.startswith("| attention, forward, float32 |"))
        assert [float(cell) for cell in line.split("|")[2:5]] == pytest.approx([4, 4, 4], rel=0.1)
        page = publish.results_page(publish.Run("x", rows, None, None))
        assert re.search(rf"^\| ours: composite \| \*\*(1\.9|2\.)\d+{MARK}\*\*", page, re.MULTILINE)
        assert f"\n{MARK}: " in page and MARK not in section

    def test_it_names_machine_commit_date_and_load(self, publish):
        section = publish.readme_section(self.SOURCE, results(row("eager", 0.04), row()), on_gpu=False)
        for text in ("Abacus (AVX2), 2 threads", "commit abc1234", "2026-11-25", "load 2.5 on 2 cores", "float32"):
            assert text in section

    def test_each_dtype_has_lines_of_its_own(self, publish):
        rows = []
        for dtype, ours in ((torch.float32, 0.010), (torch.bfloat16, 0.005)):
            task = Task("attention", "convit_small", 8, dtype=dtype)
            rows += [row(*one, noise=0, task=task) for one in (("eager", 0.04), ("sdpa", 0.02), ("cpu", ours))]
        section = publish.readme_section(self.SOURCE, results(*rows), on_gpu=False)
        assert "| attention, forward, float32 |  | 4.00 |  |" in section
        assert "| attention, forward, bfloat16 |  | 8.00 |  |" in section
        page = publish.results_page(publish.Run("x", results(*rows)))
        assert "| attention, forward, bfloat16 | 8.00 |" in page
        assert "| SDPA, content only, forward, bfloat16 | 2.00 |" in page

    def test_it_says_that_there_was_no_gpu_until_there_is_one(self, publish):
        rows = results(row("eager", 0.04), row())
        without, with_gpu = (publish.readme_section(self.SOURCE, rows, on_gpu) for on_gpu in (False, True))
        assert "No GPU was at hand" in without and "GPU" not in with_gpu
        cuda = results(replace(row(), device="cuda"))
        assert publish.Run("x", cuda, None, None).on_gpu and not publish.Run("x", rows, None, None).on_gpu
        assert "No GPU was measured" not in publish.results_page(publish.Run("x", cuda, None, None))

    def test_without_a_place_for_it_nothing_is_written(self, publish):
        with pytest.raises(ValueError, match="the README lacks the lines"):
            publish.readme("# A title\n")

    def test_what_stands_around_it_stays(self, publish):
        begin, end = publish.MARKERS
        source = publish.SECTION.search(README)["source"]
        text = publish.readme(f"before\n{begin.format(source=source)}\nold\n{end}\nafter\n")
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "\nold\n" not in text


class TestCommand:
    def test_results_go_by_machine_and_commit(self, publish, monkeypatch):
        here = MACHINE | {"cpu": "Abacus (R) 3"}
        monkeypatch.setattr(publish, "machine", lambda: here)
        assert publish.new_results() == publish.RESULTS / "abacus-r-3-avx2-2-threads-abc1234.json"
        monkeypatch.setattr(publish, "machine", lambda: here | {"gpu": "NVIDIA H100", "commit": None})
        assert publish.new_results().name == "nvidia-h100-avx2-2-threads-no-commit.json"

    def test_it_writes_table_pages_and_figures(self, publish, monkeypatch, tmp_path):
        (tmp_path / "benchmarks" / "results").mkdir(parents=True)
        source = write(results(row("eager", 0.04), row()), tmp_path / "benchmarks" / "results" / "x-abc1234.json")
        begin, end = publish.MARKERS
        (tmp_path / "README.md").write_text(f"{begin.format(source='benchmarks/results/older.json')}\nold\n{end}\n")
        for name, path in {"ROOT": "", "README": "README.md", "RESULTS": "benchmarks/results", "PAGES": "docs"}.items():
            monkeypatch.setattr(publish, name, tmp_path / path)
        monkeypatch.setattr(publish, "BUDGET", tmp_path / "budget.json")
        (tmp_path / "budget.json").write_text('{"triton": "3", "paper": {}, "matrix": {}}')
        monkeypatch.setattr(sys, "argv", ["publish.py", str(source)])
        publish.main()
        assert "(benchmarks/results/x-abc1234.json)" in (tmp_path / "README.md").read_text()
        pages = {path.relative_to(tmp_path / "docs").as_posix() for path in (tmp_path / "docs").rglob("*.*")}
        assert pages == {"index.md", "machine-code.md", "results-x-abc1234.md", "x-abc1234/speed-up.svg"}


class TestPages:
    def test_growth_names_what_ran_out_of_memory(self, publish):
        small, large = (Task("attention", "convit_small", 8, side) for side in (14, 64))
        lost = NotMeasured(str(large), "eager", "out of memory: 9 GB were asked for")
        swept = results(row("eager", 0.04, task=small), row(task=small), row(task=large), not_measured=[lost])
        text = publish.results_page(publish.Run("x", None, swept, None))
        start = "| attention, forward, float32 |"
        (first,) = (line for line in text.splitlines() if line.startswith(f"{start} 196 "))
        (last,) = (line for line in text.splitlines() if line.startswith(f"{start} 4096 "))
        assert "out of memory" not in first and last.startswith(f"{start} 4096 | out of memory | ")

    def test_growth_in_each_dtype_is_read_downwards(self, publish):
        tasks = [
            Task("attention", "convit_small", 8, side, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for side in (20, 14)
        ]
        swept = results(*(row(name, task=task) for task in tasks for name in ("eager", "cpu")))
        text = publish.results_page(publish.Run("x", growth=swept))
        found = re.findall(r"^\| attention, forward, (\w+) \| (\d+) \|", text, re.MULTILINE)
        assert found == [("float32", "196"), ("float32", "400"), ("bfloat16", "196"), ("bfloat16", "400")]

    def test_what_was_left_out_is_said_once_for_each_reason(self, publish):
        left_out = [NotMeasured(group, "compile", "it takes long") for group in ("a", "b")]
        left_out += [NotMeasured("c", name, "it tells little") for name in ("eager", "cpu")]
        text = publish.results_page(publish.Run("x", results(row(), not_measured=left_out), None, None))
        assert text.count("it takes long") == 1 and "- timm, torch.compile, 2 tasks: it takes long." in text
        assert "- timm, eager, ours: cpu, 1 tasks: it tells little." in text

    def test_every_kernel_of_the_budget_is_listed(self, publish):
        budget = json.loads(publish.BUDGET.read_text())
        page = (PAGES / "machine-code.md").read_text()
        for name, entry in budget["paper"].items():
            for kernel in entry["kernels"]:
                start = f"| {name.replace('/', ' | ')} | `{kernel['kernel']}` |"
                (line,) = (line for line in page.splitlines() if line.startswith(start))
                assert f"| {kernel['warps']} | {kernel['registers']} | {kernel['spill_bytes']} |" in line
        assert "| gfx942 | forward |" in page and "`backward_reduce_kernel`" in page

    def test_one_that_cannot_be_launched_shows(self, publish):
        kernel = {"kernel": "k", "tile": [16, 16], "warps": 4, "registers": 9, "spill_bytes": 0, "shared": 0}
        entry = {"kernels": [kernel | {"occupancy": 8, "issued": None}], "ratio": None}
        matrix = {"sm_80/forward/float32/16/dense": {"k": [10, 0, 1024, 8], "l": [255, 12, 2048, 0]}}
        text = publish.machine_code_page({"triton": "3", "paper": {"sm_80/forward": entry}, "matrix": matrix})
        assert "| sm_80 | 1 | 2 | 255 | 12 | 2.0 | 0 |" in text
