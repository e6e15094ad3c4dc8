"""Which file of the package may import which: down the layers of its core, never in a circle, never out of it."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "convit_kernels"

# The core, from the top down. What is in no layer (the command line, benchmarks, tuning, equivalence) stands above it.
LAYERS = [
    ("models", "locality", "parallel", "replace"),
    ("gpsa", "patches"),
    ("trial",),
    ("attention", "foreign", "linear"),
    ("backends.*",),
    ("relpos", "key_mask", "resample"),
    ("ops",),
    ("inputs", "eager_attention", "extension", "flops", "triton.attention"),
    ("eager_tables", "extras", "grid", "variants", "_ops", "triton.forward", "triton.backward"),
    ("schemas", "triton.common", "triton.configs", "triton.launch"),
    ("triton.config_table",),
]


def module_name(path: Path) -> str:
    """`ops`, `triton.attention`; a folder's name for its __init__.py, "" for the package's own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Level (0: absolute) and dotted name of whatever is imported anywhere: in functions and for type checkers, too.

    `from a import b` gives a.b, which is a module or a name in a; `import_module('a')` gives a.*.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            yield from ((node.level, module + alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                dotted = name.value.lstrip(".")
                yield len(name.value) - len(dotted), f"{dotted}.*"


def within_package(path: Path, text: str) -> set[str]:
    """The names of the package's own modules that a file imports."""
    folder = path.relative_to(PACKAGE).parent.parts
    modules = set()
    for level, dotted in imports(text):
        if level:
            parts = (*folder[: len(folder) + 1 - level], *dotted.split("."))
            candidates = [".".join(parts), ".".join(parts[:-1])]
            modules |= set([name for name in candidates if name in FILES][:1])
    return modules


GRAPH = {name: within_package(path, path.read_text()) for name, path in FILES.items()}


def layer(name: str) -> int:
    """Its number from the top; -1 for a module above the core."""
    holding = (number for number, patterns in enumerate(LAYERS) if any(fnmatchcase(name, one) for one in patterns))
    return next(holding, -1)


def test_the_core_imports_only_what_lies_below() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if layer(name) >= 0 and layer(target) <= layer(name)
    ]
    assert upward == []


def test_every_name_of_a_layer_is_a_module() -> None:
    for patterns in LAYERS:
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in FILES), pattern


def test_no_module_imports_one_that_imports_it() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, with the circle


def test_the_package_imports_itself_relatively_and_nothing_of_the_checkout_beside_it() -> None:
    folders = [ROOT / name for name in ("tools", "tests", "benchmarks", "examples")]
    # what lies in these folders is importable by its own name, where Python starts there
    beside = {"convit_kernels", "setup", *(folder.name for folder in folders)}
    beside |= {path.stem for folder in folders for path in folder.glob("*.py")}
    for name, path in FILES.items():
        absolute = {dotted.split(".")[0] for level, dotted in imports(path.read_text()) if not level}
        assert not absolute & beside, name


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("from .. import ops", {"ops"}),
        ("from ..ops import attend, NAMESPACE", {"ops"}),
        ("from .. import gpsa_attention", {""}),
        ("from . import reference, nothing_of_ours", {"backends.reference", "backends"}),
        ("def late():\n    from ..triton import configs", {"triton.configs"}),
        ("if TYPE_CHECKING:\n    from ..gpsa import GPSA", {"gpsa"}),
        ("importlib.import_module('..triton.attention', __package__)", {"triton.attention"}),
        ("importlib.import_module('.._C', __package__)", set()),
        ("import torch\nfrom torch import nn\nfrom torch._C import ops", set()),
    ],
)
def test_every_way_to_import_is_seen(text: str, modules: set[str]) -> None:
    assert within_package(PACKAGE / "backends" / "new.py", text) == modules
