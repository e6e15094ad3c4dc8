"""A native library that is missing, broken or stale: one clear warning, and the package works in PyTorch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convit_kernels
from convit_kernels import extension

PACKAGE = Path(convit_kernels.__file__).parent
PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import convit_kernels as ck
from convit_kernels import extension
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
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def run(package: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [part.strip() for part in done.stdout.splitlines()[0].split("|")]


def test_a_missing_library_is_silent_and_says_how_to_build_it(copied):
    count, _, status = run(copied)
    assert count == "0"
    assert "not built" in status
    assert "pip install" in status


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
