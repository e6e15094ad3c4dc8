"""What is written beside the code and has to agree with it: versions, constraints, a table of environment variables."""

import re
from pathlib import Path

import pytest

import convit_kernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def test_the_version_is_the_changelogs_and_the_citations():
    (newest, *_) = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (cited,) = re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {newest, cited} == {convit_kernels.__version__}


def test_constraints_pin_all_that_is_asked_for():
    names = set(re.findall(r'"([A-Za-z][\w.-]*)(?:\[[^"]*\])?(?:>=[\d.]+)?"', asked_for())) - {"convit_kernels"}
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "timm", "pytest", "clang-format"} <= names
    assert names <= pinned


def asked_for() -> str:
    """The lines of pyproject.toml with the dependencies, optional ones included."""
    text = (ROOT / "pyproject.toml").read_text()
    (needed,) = re.findall(r"^dependencies = \[.*\]", text, re.MULTILINE)
    (optional,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    return needed + optional


class TestEnvironmentVariables:
    """docs/install.md has one table of them."""

    @pytest.fixture
    def documented(self) -> set[str]:
        table = (ROOT / "docs" / "install.md").read_text().partition("## Environment variables")[2]
        return set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))

    @pytest.fixture
    def read(self) -> set[str]:
        """Names that the sources ask the environment for, as literals there or as constants of the package's prefix."""
        folders = ("convit_kernels", "csrc", "examples")
        files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.[pch]*"))]
        sources = {path: path.read_text() for path in files if path.suffix in (".py", ".cpp", ".cu", ".h")}
        native = "".join(text for path, text in sources.items() if path.suffix != ".py")
        everything = "".join(sources.values())
        asked = set(re.findall(r'(?:environ(?:\.\w+)?|getenv)\s*[(\[]\s*"(\w+)"', everything))
        asked |= set(re.findall(r'"(\w+)" (?:not )?in os\.environ', everything))
        constants = set(re.findall(r'"(CONVIT_KERNELS_\w+)"', everything))
        macros = set(re.findall(r'(?<!["\w])CONVIT_KERNELS_\w+', native))
        return asked | (constants - macros)

    def test_the_table_has_all_that_the_sources_read(self, documented, read):
        assert {"CONVIT_KERNELS_CPU", "CONVIT_KERNELS_ISA", "CONVIT_KERNELS_ONEDNN", "TORCH_CUDA_ARCH_LIST"} <= read
        assert read <= documented

    def test_the_table_has_none_that_nothing_reads(self, documented, read):
        assert documented <= read
