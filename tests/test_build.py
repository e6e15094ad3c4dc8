"""setup.py on machines that lack things: the install goes on, says what is missing, and fails only when told to."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists() or shutil.which("c++") is None, reason="needs the source tree and a C++ compiler"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "csrc", "convit_kernels"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            )
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONVIT_KERNELS_")}
    return subprocess.run(
        command, cwd=sources, env=inherited | environment, capture_output=True, text=True, check=False
    )


def libraries(sources: Path) -> set[str]:
    return {path.name for path in (sources / "convit_kernels").glob("*.so")}


def report(sources: Path) -> dict[str, dict[str, str]]:
    return json.loads((sources / "convit_kernels" / "_build.json").read_text())


def test_a_compiler_that_fails(sources):
    stale = sources / "convit_kernels" / "_C.abi3.so"
    stale.write_bytes(b"from an older build")
    done = build(sources, CC="false", CXX="false", CONVIT_KERNELS_CUDA="0")
    assert done.returncode == 0
    assert "not building convit_kernels._C: false cannot compile" in done.stderr
    assert libraries(sources) == set(), "a stale library must not survive a build that failed"


def test_no_compiler_is_told_apart_from_no_wish(sources):
    build(sources, CC="no-such-compiler", CXX="no-such-compiler", CONVIT_KERNELS_CUDA="0")
    assert report(sources) == {
        "failed": {"_C": "there is no no-such-compiler on PATH"},
        "skipped": {"_C_cuda": "CONVIT_KERNELS_CUDA=0"},
    }


def test_an_install_without_a_compiler_says_so_at_the_first_import(sources, tmp_path):
    """The package that pip makes, not the source tree, has the reason."""
    run = partial(subprocess.run, cwd=sources, capture_output=True, text=True, check=False)
    built = run(
        [sys.executable, "setup.py", "build", "--build-lib", "installed"],
        env=os.environ | {"CC": "false", "CXX": "false", "CONVIT_KERNELS_CPU": "auto", "CONVIT_KERNELS_CUDA": "0"},
    )
    assert built.returncode == 0, built.stderr
    done = run([sys.executable, "-c", "import convit_kernels"], cwd=sources / "installed")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "_C was not built: false cannot compile" in done.stderr
    assert "install the wheel" in done.stderr


def test_an_old_setuptools_ends_the_install_with_what_to_do(sources):
    (sources / "setuptools").mkdir()
    (sources / "setuptools" / "__init__.py").write_text("__version__ = '65.5.1'\nExtension = setup = None")
    (sources / "setuptools" / "command").mkdir()
    (sources / "setuptools" / "command" / "build_ext.py").write_text("build_ext = object")
    done = build(sources)
    assert done.returncode == 1
    assert "this is 65.5.1: pip install -U 'setuptools>=77'" in done.stderr


def test_told_to_build_it_fails_instead(sources):
    assert build(sources, CC="false", CXX="false", CONVIT_KERNELS_CPU="1", CONVIT_KERNELS_CUDA="0").returncode != 0


def test_without_nvcc_the_cpu_library_is_built(sources):
    for source in (sources / "csrc").rglob("*.cpp"):
        source.write_text("")  # the build that these tests run on compiles them
    done = build(sources, CUDA_HOME=str(sources / "nowhere"))
    assert done.returncode == 0, done.stderr
    assert "not building convit_kernels._C_cuda" in done.stderr
    assert libraries(sources) == {"_C.abi3.so"}


def test_without_torch(sources):
    (sources / "torch.py").write_text("raise ImportError('no torch')")
    done = build(sources, PYTHONPATH=str(sources))
    assert done.returncode == 0
    assert "install torch first" in done.stderr
    assert libraries(sources) == set()


def test_an_unknown_wish_is_refused(sources):
    done = build(sources, CONVIT_KERNELS_CPU="yes")
    assert done.returncode != 0
    assert "CONVIT_KERNELS_CPU=yes: allowed are auto, 0 and 1" in done.stderr


class TestArchitectures:
    @pytest.fixture
    def flags(self, tmp_path, monkeypatch):
        """The flags with an nvcc that knows what nvcc 12.4 knows."""
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 50 70 75 80 86 87 89 90\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        setup = runpy.run_path(str(ROOT / "setup.py"))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

        def call(names: str | None = None) -> list[str]:
            if names is not None:
                monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
            return setup["architecture_flags"](setup["architectures"](nvcc))

        call.error = setup["CannotBuildError"]
        return call

    def test_default_is_what_the_compiler_knows(self, flags):
        assert flags() == [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 86, 89, 90)]

    def test_torch_cuda_arch_list_is_obeyed(self, flags):
        assert flags("7.5;9.0+PTX") == [
            "-gencode=arch=compute_75,code=sm_75",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ]
        assert flags("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]

    def test_a_name_is_refused(self, flags):
        with pytest.raises(flags.error, match="'Hopper'"):
            flags("Hopper")
