"""docs/troubleshooting.md knows every message of the package's public modules, and none that no longer exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "convit_kernels"
PAGES = [ROOT / "docs" / name for name in ("troubleshooting.md", "drop-in.md", "gpu-kernels.md")]
PUBLIC = [PACKAGE / f"{name}.py" for name in ("attention", "extension", "foreign", "gpsa", "grid", "inputs", "linear")]
PUBLIC += [PACKAGE / f"{name}.py" for name in ("locality", "models", "ops", "parallel", "patches", "relpos", "replace")]
PUBLIC += [PACKAGE / "trial.py"]
for folder in ("convit_kernels/backends", "convit_kernels/bench", "convit_kernels/cli", "examples/training"):
    PUBLIC += sorted((ROOT / folder).glob("*.py"))
# what PyTorch and timm say, not this package
FOREIGN = {
    "LocalEntryNotFoundError",
    "No module named 'timm'",
    "performance drop",
    "must match the existing size",
}


def words(text: str) -> str:
    return " ".join(text.split())


def parts(message: str) -> list[str]:
    """What a listed message says around its values."""
    return [part for part in re.split(r"\W*…\W*|\s*:\s*$", message) if part]


def listed() -> list[str]:
    """The messages of the page's lists, and the reasons in the tables of the other pages."""
    found = re.findall(r"^- `([^`]+)`", PAGES[0].read_text(), re.MULTILINE)
    for page in PAGES[1:]:
        for table in re.split(r"^\| reason.*$", page.read_text(), flags=re.MULTILINE)[1:]:
            found += re.findall(r"^\| `([^`]+)` \|", table.partition("\n\n")[0], re.MULTILINE)
    return found


def strings(node: ast.AST) -> Iterator[str]:
    """The constant pieces of every text within a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield words(child.value)


def messages(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and pieces of each message that a module raises, warns of, ends a command with, or returns as a reason."""
    returns_reasons = path.parent.name == "backends" or path.stem in ("foreign", "trial")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text: ast.AST | None = node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "stop", "CannotRunError"):
            text = node.args[0]
        elif returns_reasons and isinstance(node, ast.Return):
            text = node.value
        else:
            continue
        if isinstance(text, (ast.JoinedStr, ast.Constant)):
            yield node.lineno, list(strings(text))


def said_somewhere() -> list[str]:
    """All text of the sources: Python's strings, and C++'s, joined where a line was broken."""
    files = [path for folder in ("convit_kernels", "examples") for path in (ROOT / folder).rglob("*.py")]
    texts = [text for path in (*files, ROOT / "setup.py") for text in strings(ast.parse(path.read_text()))]
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            texts.append(words(re.sub(r'"\s*"', "", path.read_text())))
    return texts


SAID = said_somewhere()


@pytest.mark.parametrize("message", sorted({message for message in listed() if message not in FOREIGN}))
def test_what_is_listed_is_said(message: str):
    for part in parts(message):
        assert any(part in text for text in SAID), f"no source says {part!r}"


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_said_is_listed(path: Path):
    known = [parts(message) for message in listed()]
    missing = [
        f"{path.name}:{line}: {' … '.join(texts)}"
        for line, texts in messages(path)
        if any(re.search(r"\w{3}", text) for text in texts)
        and not any(all(part in " … ".join(texts) for part in each) for each in known)
    ]
    assert not missing, "\n".join(missing)
