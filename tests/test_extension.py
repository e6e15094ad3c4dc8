"""A native library that is missing, broken or stale: one clear warning, and the package works in PyTorch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_program

import convit_kernels
from convit_kernels import extension, ops

PACKAGE = Path(convit_kernels.__file__).parent
PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import convit_kernels as ck
from convit_kernels import extension, ops
ours = [str(w.message) for w in caught if "convit_kernels" in str(w.message)]
print(len(ours), "|", *ours, "|", extension.status["_C"])
layer = ck.GPSA(32, 4)
layer(torch.randn(2, 16, 32)).sum().backward()
assert layer.pos_proj.weight.grad is not None
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package without native libraries."""
    target = tmp_path / "convit_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    return target


def run(package: Path, *path: Path) -> list[str]:
    found = run_program(PROGRAM, package.parent, *path).stdout
    return [part.strip() for part in found.splitlines()[0].split("|")]


class TestMissing:
    def report(self, package: Path, **content: dict[str, str]) -> None:
        (package / "_build.json").write_text(json.dumps({"failed": {}, "skipped": {}} | content))

    def test_one_warning_has_the_reason_that_the_build_left(self, copied):
        self.report(copied, failed={"_C": "there is no compiler c++ on PATH"})
        count, warning, status = run(copied)
        assert count == "1"
        assert "_C was not built: there is no compiler c++ on PATH (install the wheel" in warning
        assert status in warning

    def test_what_was_left_out_on_purpose_is_silent(self, copied):
        self.report(copied, skipped={"_C": "CONVIT_KERNELS_CPU=0"})
        count, _, status = run(copied)
        assert count == "0"
        assert "not built: CONVIT_KERNELS_CPU=0" in status

    def test_a_source_tree_says_how_to_build_it(self, copied):
        (copied.parent / "setup.py").touch()
        count, warning, _ = run(copied)
        assert count == "1"
        assert f"run `python setup.py build_ext --inplace` in {copied.parent}" in warning
        assert "pip install" not in warning

    def test_a_source_tree_before_an_installed_copy_is_noticed(self, copied, tmp_path):
        (copied.parent / "setup.py").touch()
        installed = tmp_path / "site-packages" / "convit_kernels"
        installed.mkdir(parents=True)
        (installed / "_C.abi3.so").touch()
        _, warning, _ = run(copied, installed.parent)
        assert f"imports the source tree {copied.parent} instead of {installed}" in warning
        assert "start Python in another folder" in warning

    def test_a_gpu_kernel_is_missed_only_where_there_is_a_gpu(self, copied):
        self.report(copied, skipped={"_C": "CONVIT_KERNELS_CPU=0"}, failed={"_C_cuda": "no nvcc"})
        count, warning, _ = run(copied)
        assert (count, "no nvcc" in warning) == (("1", True) if torch.cuda.is_available() else ("0", False))


def test_a_broken_library_gives_one_warning(copied):
    (copied / "_C.abi3.so").write_bytes(
        b"\x7fELF garbage convit_kernels interface " + convit_kernels.schemas.INTERFACE.encode()
    )
    count, warning, status = run(copied)
    assert count == "1"
    assert "does not load" in warning
    assert "does not load" in status


def test_an_empty_library_gives_one_warning(copied):
    (copied / "_C.abi3.so").touch()
    count, warning, _ = run(copied)
    assert count == "1"
    assert "does not load" in warning


@pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it")
def test_a_library_for_other_schemas_is_refused_before_it_registers_anything(copied):
    stale = (PACKAGE / "_C.abi3.so").read_bytes().replace(convit_kernels.schemas.INTERFACE.encode(), b"0" * 16)
    (copied / "_C.abi3.so").write_bytes(stale)
    count, warning, status = run(copied)
    assert count == "1"
    assert "built from other sources" in warning
    assert "built from other sources" in status


@pytest.mark.skipif(extension.status["_C"] is not None, reason="needs the built library; the CI builds it")
def test_the_built_library_is_used_without_a_word(copied):
    shutil.copy(PACKAGE / "_C.abi3.so", copied)
    count, _, status = run(copied)
    assert (count, status) == ("0", "None")


def test_all_names_need_torch_alone():
    """`from convit_kernels import *` with no timm; models and locality stay attributes."""
    program = (
        "import sys; sys.modules['timm'] = None\n"
        "from convit_kernels import *\n"
        "import convit_kernels as ck\n"
        "assert GPSA is ck.GPSA and {'models', 'locality', '__version__'} <= set(dir(ck))"
    )
    run_program(program)


def test_importing_brings_no_compiler():
    """Each of these takes from a tenth of a second to two."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import convit_kernels\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before if not name.startswith('torch.')}\n"
        "assert not new & {'sympy', 'triton', 'timm', 'numpy', 'rich', 'matplotlib'}, new\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    )
    run_program(program)


def test_a_constant_is_marked_as_torch_marks_it():
    ours, torch_s = (mark(lambda: 0) for mark in (ops.constant_in_programs, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(torch_s) != {}
