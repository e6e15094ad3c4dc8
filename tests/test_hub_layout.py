"""The package as a kernel of a hub: its tree is complete, names no package but torch, and runs under another name."""

import ast
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import kernel_units
import pytest
import torch
from processes import run_program

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "build.toml").exists(), reason="needs the source tree")

# what kernel-builder writes into the package: the namespace is unique to a build
OPS = """
import torch
ops = torch.ops._convit_kernels_cpu_0123abc
def add_op_namespace_prefix(name):
    return "_convit_kernels_cpu_0123abc::" + name
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tree"
    subprocess.run([sys.executable, "-m", "tools.hub_layout", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def build(tree) -> dict:
    return tomllib.loads((tree / "build.toml").read_text())


def sources(build: dict) -> list[str]:
    return build["torch"]["src"] + [source for kernel in build["kernel"].values() for source in kernel["src"]]


class TestTree:
    def test_every_source_that_build_toml_names_is_there(self, tree, build):
        assert [source for source in sources(build) if not (tree / source).exists()] == []

    def test_build_toml_names_every_source(self, build):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")} <= set(sources(build))

    def test_each_unit_has_the_flags_that_setup_gives_it(self, build):
        units = {
            source: [flag for flag in kernel.get("cxx-flags", []) if flag.startswith("-m")]
            for kernel in build["kernel"].values()
            for source in kernel["src"]
            if source in kernel_units.flags()
        }
        assert units == kernel_units.flags()

    def test_it_is_licensed(self, tree, build):
        assert build["general"]["license"] == "Apache-2.0"
        assert "Apache License" in (tree / "LICENSE").read_text()

    def test_its_python_imports_itself_relatively_and_else_torch_and_triton_alone(self, tree):
        foreign = set()
        for path in (tree / "torch-ext").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    foreign |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    foreign.add(node.module.split(".")[0])
        assert foreign - sys.stdlib_module_names <= {"torch", "triton"}

    def test_its_layer_is_a_forward_alone(self, tree):
        layers = ast.parse((tree / "torch-ext" / "convit_kernels" / "layers.py").read_text())
        (layer,) = [node for node in layers.body if isinstance(node, ast.ClassDef)]
        assert [node.name for node in layer.body if isinstance(node, ast.FunctionDef)] == ["forward"]
        assigned = {node.target.id for node in layer.body if isinstance(node, ast.AnnAssign) and node.value}
        assert assigned == {"has_backward", "can_torch_compile"}

    @pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
    @pytest.mark.parametrize("source", ["torch-ext/torch_binding.cpp", "csrc/tables/cpu.cpp"])
    def test_its_sources_take_the_namespace_of_the_build(self, tree, source):
        includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        macros = ["-DTORCH_EXTENSION_NAME=_convit_kernels_cpu_0123abc", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x030A0000"]
        macros += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command = ["c++", "-std=c++17", "-fsyntax-only", *macros, *includes, str(tree / source)]
        subprocess.run(command, check=True)


def test_it_runs_beside_the_package_under_another_name(tree, tmp_path):
    shutil.copytree(tree / "torch-ext" / "convit_kernels", tmp_path / "loaded_under_another_name")
    (tmp_path / "loaded_under_another_name" / "_ops.py").write_text(OPS)
    script = """
import convit_kernels as package, loaded_under_another_name as kernel, torch
from timm.models.convit import GPSA

assert not any(name.startswith("convit_kernels") for name in vars(kernel))
inputs = [torch.randn(2, 3, 12, 8) for _ in range(3)] + [torch.randn(3, 3), torch.randn(3)]
for backend in ("composite", "reference"):
    torch.testing.assert_close(
        kernel.gpsa_attention(*inputs, grid_size=(3, 4), backend=backend),
        package.gpsa_attention(*inputs, grid_size=(3, 4), backend=backend),
    )
own = torch.ops._convit_kernels_cpu_0123abc.relative_position_tables
torch.testing.assert_close(own(inputs[3], 3, 4), package.relative_position_tables(inputs[3], (3, 4)))
assert "no native library" in kernel.extension.status["_C"]

layer, x = GPSA(24, num_heads=3).eval(), torch.randn(2, 16, 24)
torch.testing.assert_close(kernel.layers.GPSA.forward(layer, x), layer(x))
"""
    run_program(script, ROOT, tmp_path)
