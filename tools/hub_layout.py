"""Puts the tree together that kernel-builder builds a hub's kernel from: `python -m tools.hub_layout FOLDER`.

It holds build.toml, the sources that it names, torch-ext/ with the few files that a hub's build has of its own, and
beside these every module of the package that they need, found by following the imports. `_ops.py` is left out: the
builder writes it.
"""

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "convit_kernels"
OWN = ROOT / "torch-ext" / "convit_kernels"
# imported, or started, by name at the first call on a GPU
BY_NAME = ("triton/attention.py", "triton/probe.py")


def relative_imports(path: Path, name: str) -> Iterator[str]:
    """The package's files that one imports. `path` is where it is read, `name` what it is called in the package."""
    folder = Path(name).parent
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = (folder if node.level == 1 else folder.parent) / (node.module or "").replace(".", "/")
        targets = [base / alias.name for alias in node.names] if node.module is None else [base]
        # `from . import x` may name a module or what __init__ holds; `from .x import y` a module or a package
        for target in [*targets, *(base / alias.name for alias in node.names)]:
            for file in (f"{target.as_posix()}.py", (target / "__init__.py").as_posix()):
                if (OWN / file).exists() or (PACKAGE / file).exists():
                    yield file


def modules() -> set[str]:
    """The files of the hub's package, as paths inside it."""
    reached: set[str] = set()
    waiting = [path.name for path in OWN.glob("*.py")] + list(BY_NAME)
    waiting += [(Path(name).parent / "__init__.py").as_posix() for name in BY_NAME]
    while waiting:
        name = waiting.pop()
        if name in reached or name == "_ops.py":
            continue
        reached.add(name)
        waiting += relative_imports(OWN / name if (OWN / name).exists() else PACKAGE / name, name)
    return reached


def write(folder: Path) -> None:
    """Writes the tree into an empty or absent folder."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "torch-ext", folder / "torch-ext", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("build.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    for name in modules():
        target = folder / "torch-ext" / "convit_kernels" / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(PACKAGE / name, target)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
