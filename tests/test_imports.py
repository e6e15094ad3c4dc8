"""Imports within the package go one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "convit_kernels"


def imported(path: Path, modules: set[str]) -> set[str]:
    """The package's modules that a file imports, anywhere in it: within functions, too."""
    package = ("convit_kernels", *path.parent.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found & modules


def test_no_module_imports_one_that_imports_it():
    # what stands above the layer is not asked here
    files = [path for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("backends/*.py")) if path.stem != "__init__"]
    names = {path: ".".join(("convit_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files}
    graph = {names[path]: imported(path, set(names.values())) for path in files}
    assert "convit_kernels.foreign" in graph["convit_kernels.gpsa"]
    assert graph["convit_kernels.foreign"] == set()
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
