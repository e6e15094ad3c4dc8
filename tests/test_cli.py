"""The commands, as a user types them."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from typer.testing import CliRunner

import convit_kernels as ck
from convit_kernels import selfcheck
from convit_kernels.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_info_names_every_backend_and_library():
    result = run("info")
    assert result.exit_code == 0
    for name in ("triton", "cpu", "composite", "reference", "_C", "_C_cuda", torch.__version__):
        assert name in result.output


def test_info_as_json():
    report = json.loads(run("info", "--json").output)
    assert report["machine"]["torch"] == torch.__version__
    assert [backend["name"] for backend in report["backends"]] == [backend.name for backend in ck.backends()]
    assert set(report["native_libraries"]) == {"_C", "_C_cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and it would take minutes")
def test_tune_without_a_gpu_says_so():
    result = run("tune")
    assert result.exit_code == 1
    assert "torch sees none" in result.output


def test_tune_names_the_dtypes_it_takes():
    result = run("tune", "--dtype", "int8")
    assert result.exit_code == 2
    assert "float32, float16, bfloat16, not 'int8'" in result.output.replace("\n", " ")


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "convit_kernels", "--help"], capture_output=True, text=True, check=True
    )
    assert "info" in done.stdout
    assert "selfcheck" in done.stdout
    assert "demo" in done.stdout


def test_without_typer_it_says_what_to_install(tmp_path):
    (tmp_path / "block.py").write_text(
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a)\n"
        "from convit_kernels.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "block.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs typer: pip install 'convit_kernels[cli]'" in done.stderr


class TestSelfcheck:
    @pytest.fixture
    def few(self, monkeypatch):
        monkeypatch.setattr(selfcheck, "cases", lambda interpreted: [selfcheck.Case(torch.float32, (3, 5), 16)])

    def test_a_right_backend_passes_and_writes_json(self, few, tmp_path):
        result = run("selfcheck", "--backend", "composite", "--device", "cpu", "--json", str(tmp_path / "r.json"))
        assert result.exit_code == 0, result.output
        (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
        assert row["passed"]
        assert set(row["shares"]) == {"out", "dq", "dk", "dv", "d_pos_weight", "d_gate"}

    def test_a_wrong_one_fails(self, few, monkeypatch):
        right = selfcheck.gpsa_attention
        monkeypatch.setattr(selfcheck, "gpsa_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.02)
        result = run("selfcheck", "--backend", "composite", "--device", "cpu")
        assert result.exit_code == 1
        assert "FAIL" in result.output

    def test_one_that_raises_fails_and_is_named(self, few, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(selfcheck, "gpsa_attention", broken)
        result = run("selfcheck", "--backend", "cpu", "--device", "cpu")
        assert result.exit_code == 1
        assert "no such kernel" in result.output.replace("\n", " ")

    def test_without_a_gpu_the_kernels_are_interpreted(self):
        command = [sys.executable, "-m", "convit_kernels", "selfcheck", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "Triton's interpreter" in done.stdout


class TestDemo:
    def test_one_model_passes_and_writes_json(self, tmp_path):
        result = run(
            "demo", "--model", "convit_tiny", "--batch", "2", "--repeats", "1", "--json", str(tmp_path / "r.json")
        )
        assert result.exit_code == 0, result.output
        assert "tiny" in result.output
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

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("--model", "resnet50"), "timm has no ConViT named 'resnet50'"),
            (("--device", "tpu"), "the device must be cpu or cuda, but is 'tpu'"),
            (("--batch", "0"), "--batch"),
            (("--checkpoint", "/no/such/file.pth"), "--checkpoint"),
        ],
    )
    def test_bad_arguments(self, arguments, text):
        result = run("demo", *arguments)
        assert result.exit_code == 2
        assert text in result.output

    def test_a_checkpoint_is_for_one_model(self, tmp_path):
        (tmp_path / "w.pth").touch()
        result = run("demo", "--checkpoint", str(tmp_path / "w.pth"))
        assert result.exit_code == 2
        assert "one --model, not 3" in result.output

    def test_a_checkpoint_of_something_else_is_named(self, tmp_path):
        torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
        result = run("demo", "--model", "convit_tiny", "--checkpoint", str(tmp_path / "other.pth"))
        assert result.exit_code == 2
        assert "other.pth" in result.output.replace("\n", "")
