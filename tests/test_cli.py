"""The commands, as a user types them."""

import json
import math
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from processes import run_program
from typer.testing import CliRunner

import convit_kernels as ck
from convit_kernels import attention, extras
from convit_kernels.bench import profile
from convit_kernels.bench import selfcheck as checks
from convit_kernels.cli import app, demo, info, selfcheck
from convit_kernels.cli.output import whole

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def refuse(monkeypatch, backend: str, why_not) -> None:
    entry = attention._BACKENDS[backend]._replace(why_not=why_not)
    monkeypatch.setitem(attention._BACKENDS, backend, entry)


def assert_refused(result, text: str, code: int = 2) -> None:
    """One line on stderr, and nothing on stdout but what a command says of its progress."""
    assert result.exit_code == code, result.output
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_info_names_every_backend_and_library():
    result = run("info")
    assert result.exit_code == 0
    for name in ("triton", "cpu", "composite", "reference", "_C", "_C_cuda", torch.__version__):
        assert name in result.output


def test_info_as_json(monkeypatch):
    monkeypatch.setenv("CONVIT_KERNELS_ONEDNN", "0")
    report = json.loads(run("info", "--json").output)
    assert report["machine"]["torch"] == torch.__version__
    assert [backend["name"] for backend in report["backends"]] == [backend.name for backend in ck.backends()]
    assert set(report["native_libraries"]) == {"_C", "_C_cuda"}
    assert report["linear_layers"] == {"library": "PyTorch's own", "reason": "CONVIT_KERNELS_ONEDNN=0"}


def test_info_names_what_goes_to_the_composite_and_why(monkeypatch):
    monkeypatch.setenv("CONVIT_KERNELS_ONEDNN", "0")
    monkeypatch.setattr(
        info.cpu, "limit", lambda dtype: (32e3, "it has AMX") if dtype == torch.bfloat16 else (math.inf, "")
    )
    monkeypatch.setattr(info.extension, "units_by_dtype", lambda: {"float32": "avx2", "bfloat16": "avx2"})
    monkeypatch.setitem(info.extension.status, "_C", None)
    report = json.loads(run("info", "--json").output)
    assert report["composite_from"] == {"bfloat16": {"key_bytes": 32e3, "reason": "it has AMX"}}
    output = re.sub(r"[│\s]+", " ", run("info").output)  # without the table's lines
    assert "bfloat16 avx2; composite where a head's keys have 32 kB or more: it has AMX" in output


@NO_GPU
def test_tune_without_a_gpu_says_so():
    assert_refused(run("tune"), "torch sees none", code=1)


def test_tune_names_the_dtypes_it_takes():
    assert_refused(run("tune", "--dtype", "int8"), "float32, float16, bfloat16, not 'int8'")


def test_module_runs():
    program = "import runpy, sys; sys.argv = ['', '--help']\nrunpy.run_module('convit_kernels', run_name='__main__')"
    done = run_program(program)
    assert "info" in done.stdout
    assert "selfcheck" in done.stdout
    assert "demo" in done.stdout


def test_the_package_imports_nothing_of_the_command_line():
    program = "import sys, convit_kernels as ck; print({'typer', 'rich', 'convit_kernels.cli'} & set(sys.modules))"
    assert run_program(program).stdout.strip() == "set()"


def test_the_page_in_docs_is_what_the_commands_say():
    page = runpy.run_path(str(ROOT / "tools" / "cli_page.py"))["page"]
    assert (ROOT / "docs" / "cli.md").read_text() == page(), "run: python -m tools.cli_page"


class TestMissingPackages:
    """What is missing is named with a command that works: this package itself stands on no index."""

    METADATA = (
        "torch>=2.10",
        'rich>=13; extra == "cli"',
        'typer>=0.12; extra == "cli"',
        'absent-models>=1.0.16,<2; extra == "models"',
        "convit_kernels[cli,models]; extra == 'demo'",
        'scikit-learn>=1.4; extra == "demo"',
        'absent; extra == "demo"',
        'other; extra == "other"',
    )

    @pytest.fixture
    def installed(self, monkeypatch):
        monkeypatch.setattr(metadata, "requires", lambda name: list(self.METADATA))

    def test_an_extra_has_its_packages_and_those_of_the_extras_that_it_names(self, installed):
        assert extras.requirements("demo") == {
            "rich": "rich>=13",
            "typer": "typer>=0.12",
            "absent_models": "absent-models>=1.0.16,<2",
            "sklearn": "scikit-learn>=1.4",
            "absent": "absent",
        }

    def test_all_that_is_missing_of_the_extra_is_named_at_once(self, installed):
        hint = extras.needs("demo", "demo", ModuleNotFoundError(name="absent"))
        assert hint == "demo needs absent, absent_models: pip install absent 'absent-models>=1.0.16,<2'"

    def test_a_package_that_is_too_old_is_named_with_the_versions_that_do(self, installed):
        hint = extras.needs("demo", "demo", ImportError("cannot import name 'x'", name="sklearn.datasets"))
        assert "sklearn" in hint and "'scikit-learn>=1.4'" in hint

    def test_a_package_of_no_extra(self, installed):
        hint = extras.needs("tune", "cli", ModuleNotFoundError(name="triton"))
        assert hint == "tune needs triton: pip install triton"

    def test_from_a_source_tree_that_was_not_installed(self, monkeypatch):
        def unknown(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "requires", unknown)
        hint = extras.needs("demo", "demo", ModuleNotFoundError(name="timm.models"))
        assert hint == "demo needs timm: pip install timm"

    def test_an_import_that_fails_for_another_reason_says_it(self, installed):
        assert extras.needs("demo", "demo", ImportError("broken")) == "demo cannot be imported: broken"

    @pytest.mark.parametrize("extra", ["demo", "bench", "locality"])
    def test_the_extras_of_the_commands_are_understood(self, extra):
        assert {"typer", "timm"} <= extras.requirements(extra).keys()

    def test_without_typer(self):
        program = "import sys; sys.modules['typer'] = None; from convit_kernels.__main__ import main; main()"
        done = run_program(program, check=False)
        assert done.returncode == 1
        assert re.fullmatch(r"the command line needs typer: pip install '?typer\S*\n", done.stderr)

    def test_a_command_without_what_it_imports(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        result = run("demo", "--model", "convit_tiny", "--batch", "1")
        assert_refused(result, "demo needs sklearn: pip install", code=1)


class TestOutput:
    """A file that cannot be written is refused before the work; what is written is whole."""

    COMMANDS = (
        ("selfcheck", "--json"),
        ("demo", "--json"),
        ("profile", "--json"),
        ("profile", "--html"),
        ("profile", "--trace"),
        ("report", "results.json", "--out"),
        ("locality", "image.png", "--out"),
        ("locality", "image.png", "--out", "figure.png", "--json"),
    )

    @pytest.fixture(autouse=True)
    def files(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        for name in ("results.json", "image.png", "file"):
            Path(name).write_text("as it was")
        Path("folder").mkdir()

        def work(*args, **kwargs):
            raise AssertionError("the work has begun")

        for module, name in ((selfcheck, "run"), (demo, "compare"), (profile, "task")):
            monkeypatch.setattr(module, name, work)

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("missing/x.png", "there is no folder missing"),
            ("file/x.png", "file is no folder"),
            ("/dev/null", "it is no"),
        ],
    )
    def test_a_path_that_cannot_be_written(self, command, path, reason):
        before = set(Path().rglob("*"))
        assert_refused(run(*command, path), f"{command[-1]} {path} cannot be written: {reason}")
        assert set(Path().rglob("*")) == before
        assert Path("file").read_text() == "as it was"

    @pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] != "report"], ids=" ".join)
    def test_a_folder_where_a_file_is_meant_and_a_file_where_a_folder_is(self, command):
        trace = command[-1] == "--trace"
        path, reason = ("file", "it is no folder") if trace else ("folder", "it is a folder")
        assert_refused(run(*command, path), f"{command[-1]} {path} cannot be written: {reason}")

    def test_a_cache_of_configurations_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("CONVIT_KERNELS_CACHE_DIR", "file/cache")
        result = run("tune")
        assert_refused(result, "file/cache/triton_configs.json cannot be written: there is no folder file/cache")
        assert "CONVIT_KERNELS_CACHE_DIR" in result.stderr

    def test_what_is_written_replaces_a_file_at_the_end(self):
        with whole(Path("file")) as draft:
            draft.write_text("new")
            assert Path("file").read_text() == "as it was"
        assert Path("file").read_text() == "new"
        assert {path.name for path in Path().iterdir()} == {"results.json", "image.png", "file", "folder"}

    def test_an_error_leaves_the_file_as_it_was_and_nothing_beside_it(self):
        before = set(Path().rglob("*"))
        with pytest.raises(OSError, match="file could not be written: disk full"), whole(Path("file")) as draft:
            draft.write_text("ha")
            raise OSError("disk full")
        assert Path("file").read_text() == "as it was"
        assert set(Path().rglob("*")) == before

    def test_a_folder_keeps_its_other_files(self):
        Path("folder/other").touch()
        with whole(Path("folder")) as draft:
            draft.mkdir()
            (draft / "new").touch()
        assert {path.name for path in Path("folder").iterdir()} == {"other", "new"}

    def test_what_a_link_points_to_is_written(self):
        Path("link").symlink_to("file")
        with whole(Path("link")) as draft:
            draft.write_text("new")
        assert Path("link").is_symlink() and Path("file").read_text() == "new"

    def test_permissions_are_those_of_any_new_file(self):
        Path("usual").touch()
        with whole(Path("new")) as draft:
            draft.touch()
        assert Path("new").stat().st_mode == Path("usual").stat().st_mode


class TestDevice:
    @pytest.mark.parametrize(
        "command", [("selfcheck",), ("demo",), ("profile",), ("locality", __file__, "--out", "x.png")]
    )
    def test_one_that_is_unknown_is_refused_with_those_that_are_allowed(self, command):
        assert_refused(
            run(*command, "--device", "tpu"), "--device must be cpu or cuda (of several GPUs cuda:N), but is"
        )

    @NO_GPU
    def test_a_gpu_that_is_not_there(self):
        assert_refused(run("selfcheck", "--device", "cuda"), "--device cuda: torch sees no GPU here")

    def test_one_gpu_of_too_few(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert_refused(run("selfcheck", "--device", "cuda:2"), "--device cuda:2: torch sees 2 GPUs, from cuda:0 on")


class TestSelfcheck:
    @pytest.fixture
    def few(self, monkeypatch):
        cases = [checks.Case(torch.float32, (3, 5), 16), checks.Case(torch.bfloat16, (3, 5), 16)]
        monkeypatch.setattr(selfcheck, "cases", lambda device, interpreted: cases)

    def test_a_right_backend_passes_and_writes_json(self, few, tmp_path):
        result = run("selfcheck", "--backend", "composite", "--device", "cpu", "--json", str(tmp_path / "r.json"))
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "r.json").read_text())
        assert (report["backend"], report["device"]) == ("composite", "cpu")
        row, _ = report["results"]
        assert row["passed"]
        assert set(row["shares"]) == {"out", "dq", "dk", "dv", "d_pos_weight", "d_gate"}

    def test_a_wrong_one_fails(self, few, monkeypatch):
        right = checks.gpsa_attention
        monkeypatch.setattr(checks, "gpsa_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.02)
        result = run("selfcheck", "--backend", "composite", "--device", "cpu")
        assert result.exit_code == 1
        assert "FAIL" in result.output

    def test_one_that_raises_fails_and_is_named(self, few, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(checks, "gpsa_attention", broken)
        result = run("selfcheck", "--backend", "composite", "--device", "cpu")
        assert result.exit_code == 1
        assert "float32 3x5 D=16: RuntimeError: no such kernel\n" in result.output

    @pytest.mark.parametrize("without", [(), ("cpu",)])
    def test_checks_what_would_run(self, few, monkeypatch, tmp_path, without):
        for name in without:
            refuse(monkeypatch, name, lambda inputs: "not today")
        result = run("selfcheck", "--device", "cpu", "--json", str(tmp_path / "r.json"))
        assert result.exit_code == 0, result.output
        can_run = [backend.name for backend in ck.backends() if backend.available and backend.name != "triton"]
        assert json.loads((tmp_path / "r.json").read_text())["backend"] == can_run[0]

    def test_what_the_backend_refuses_is_no_failure(self, few, monkeypatch, tmp_path):
        def why_not(inputs):
            return "no bfloat16" if inputs is not None and inputs.q.dtype == torch.bfloat16 else ""

        refuse(monkeypatch, "composite", why_not)
        file = tmp_path / "r.json"
        result = run("selfcheck", "--backend", "composite", "--device", "cpu", "--json", str(file))
        assert result.exit_code == 0, result.output
        assert "bfloat16 3x5 D=16: cannot run here: no bfloat16\n" in result.output
        assert "FAIL" not in result.output
        ran, refused = json.loads(file.read_text())["results"]
        assert (ran["passed"], refused["passed"], refused["cannot_run"]) == (True, None, "no bfloat16")

    def test_a_backend_that_can_run_nothing_is_refused_in_one_line(self, few, monkeypatch, tmp_path):
        refuse(monkeypatch, "composite", lambda inputs: "it is not there")
        file = tmp_path / "r.json"
        result = run("selfcheck", "--backend", "composite", "--device", "cpu", "--json", str(file))
        assert_refused(result, "--backend composite cannot run on cpu here: it is not there. What can: ")
        assert "reference" in result.stderr
        assert "FAIL" not in result.output and not file.exists()

    def test_an_unknown_backend_is_refused_with_those_that_are_allowed(self):
        result = run("selfcheck", "--backend", "cudnn")
        assert_refused(result, "unknown --backend 'cudnn': allowed are auto, triton, cpu, composite, reference")

    TRITON = (
        "import runpy, sys; sys.argv = ['', 'selfcheck', '--backend', 'triton', '--device', 'cpu']\n"
        "runpy.run_module('convit_kernels', run_name='__main__')"
    )

    def test_on_a_cpu_triton_is_interpreted(self):
        done = run_program(self.TRITON)
        assert "Triton's interpreter" in done.stdout

    def test_without_triton_there_is_one_line(self, tmp_path):
        """In the child, too: the interpreter has a process of its own."""
        without = (
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *package: None if name == 'triton' else find(name, *package)\n"
        )
        (tmp_path / "sitecustomize.py").write_text(without)
        done = run_program(without + self.TRITON, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=False)
        assert done.returncode == 2, done.stderr
        assert "triton is not installed (pip install triton). What can: " in done.stderr
        assert done.stderr.count("\n") == 1


class TestProfile:
    @NO_GPU
    def test_a_backend_that_cannot_run_is_said_in_one_line(self):
        result = run("profile", "--compare", "triton", "--layer", "--batch", "1")
        assert_refused(result, "cannot be profiled on cpu: ours: triton: torch sees no GPU")
        assert "Phases" not in result.output

    def test_an_unknown_name_is_refused_with_those_that_are_allowed(self):
        result = run("profile", "--compare", "eager,fastest")
        assert_refused(result, "unknown backend 'fastest': allowed are eager, compile, auto, triton, cpu, composite")


class TestDemo:
    def test_one_model_passes_and_writes_json(self, tmp_path):
        result = run(
            "demo", "--model", "convit_tiny", "--batch", "2", "--repeats", "1", "--json", str(tmp_path / "r.json")
        )
        assert result.exit_code == 0, result.output
        assert "tiny" in result.output
        assert "Load of the machine before the run: " in result.output
        report = json.loads((tmp_path / "r.json").read_text())
        (row,) = report["models"]
        assert row["layers"] == 10
        assert row["passed"]
        assert row["error"] <= row["allowed_error"]
        assert row["top5_agreement"] > 0.9
        assert row["fused_peak_mb"] < row["eager_peak_mb"]

    def test_a_wrong_layer_turns_it_red(self, monkeypatch, tmp_path):
        monkeypatch.setattr(ck.GPSA, "gate", lambda self: self.gating_param + 0.01 * (self.backend is None))
        result = run("demo", "--model", "convit_tiny", "--batch", "1", "--repeats", "1")
        assert result.exit_code == 1
        assert "FAIL" in result.output

    def test_checkpoint(self, tmp_path):
        torch.manual_seed(3)
        torch.save(timm.create_model("convit_tiny").state_dict(), tmp_path / "weights.pth")
        options = ("--model", "convit_tiny", "--batch", "1", "--repeats", "1")
        result = run("demo", *options, "--checkpoint", str(tmp_path / "weights.pth"))
        assert result.exit_code == 0, result.output
        assert "weights.pth" in result.output.replace("\n", "")

    def test_a_model_that_timm_lacks(self):
        assert_refused(run("demo", "--model", "resnet50"), "timm has no ConViT named 'resnet50': allowed are convit_")

    @pytest.mark.parametrize(
        ("arguments", "text"), [(("--batch", "0"), "--batch"), (("--checkpoint", "/no/such/file.pth"), "--checkpoint")]
    )
    def test_bad_arguments(self, arguments, text):
        result = run("demo", *arguments)
        assert result.exit_code == 2
        assert text in result.stderr

    def test_a_checkpoint_is_for_one_model(self, tmp_path):
        (tmp_path / "w.pth").touch()
        assert_refused(run("demo", "--checkpoint", str(tmp_path / "w.pth")), "one --model, not 3")

    def test_a_checkpoint_of_something_else_is_named(self, tmp_path):
        torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
        result = run("demo", "--model", "convit_tiny", "--checkpoint", str(tmp_path / "other.pth"))
        assert_refused(result, "other.pth does not hold the weights of convit_tiny: ")
        assert "1 are unknown (weight)" in result.stderr
