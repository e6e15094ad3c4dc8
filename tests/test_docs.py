"""What tools/docs.py does with the pages before the site is built from them."""

import importlib.util
import re
from pathlib import Path

import pytest

from tools import situations

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
docs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(docs)


def moved(text: str, source: str = "docs/mathematics.md") -> tuple[str, list[str]]:
    problems: list[str] = []
    return docs.moved(text, ROOT / source, docs.pages(), problems, set()), problems


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("docs/mathematics.md", "see [Backends](backends.md#limits)", "see [Backends](backends.md#limits)"),
        ("docs/mathematics.md", "[Contributing](../CONTRIBUTING.md)", "[Contributing](contributing.md)"),
        ("CONTRIBUTING.md", "[Mathematics](docs/mathematics.md#backward)", "[Mathematics](mathematics.md#backward)"),
        ("docs/sample_efficiency/x.md", "[Backends](../backends.md)", None),
        ("docs/mathematics.md", "in [relpos.py](../convit_kernels/relpos.py).", "in `convit_kernels/relpos.py`."),
        ("docs/mathematics.md", "![figure](sample_efficiency/figure.svg)", "![figure](sample_efficiency/figure.svg)"),
        ("docs/mathematics.md", "`[a](b.md)` <https://arxiv.org> [x](https://arxiv.org)", None),
        ("docs/mathematics.md", "```\n[a](b.md)\n```\n[below](#forward)", None),
    ],
)
def test_links_in_their_new_place(source: str, text: str, expected: str | None):
    assert moved(text, source) == (expected or text, [])


def test_a_dead_link_is_named_with_its_line():
    assert moved("one\n\n[two](nowhere.md)")[1] == ["docs/mathematics.md:3: nowhere.md does not exist"]


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://unpkg.com/x"></script>', True),
        ('<link rel="preconnect" href="https://fonts.gstatic.com" crossorigin>', True),
        ("@font-face { src: url(//example.org/font.woff) }", True),
        ('<a href="https://arxiv.org/abs/2103.10697">the paper</a>', False),
        ('<script src="../assets/bundle.js"></script> <svg xmlns="http://www.w3.org/2000/svg">', False),
    ],
)
def test_what_a_page_loads_from_other_servers(text: str, loads: bool):
    assert bool(docs.fetched(text)) == loads


def test_the_readme_s_first_lines_run():
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(block[1], names)
    assert names["tokens"].shape == (8, 196, 432)
    assert names["out"].shape == (8, 9, 196, 48)


def test_the_table_of_situations_is_that_of_the_tests():
    page = situations.PAGE.read_text()
    assert situations.with_table(page) == page, "run python -m tools.situations"
