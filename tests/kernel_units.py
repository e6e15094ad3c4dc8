"""The units of the CPU's attention kernels, as setup.py and their sources describe them."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
ATTENTION = ROOT / "csrc" / "attention"


def flags(emulated: bool = False) -> dict[str, list[str]]:
    """Each unit's source and the flags that setup.py compiles it with on x86-64; setup.py is read and not run."""
    statements = [
        node
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.If)) and re.search("UNITS|EMULATED", ast.unparse(node))
    ]
    names = {"X86": True, "os": SimpleNamespace(environ={"CONVIT_KERNELS_EMULATE": "1"})}
    exec(compile(ast.Module(statements, []), "setup.py", "exec"), names)
    return names["EMULATED" if emulated else "UNITS"]


def flags_of(unit: str) -> tuple[Path, list[str]]:
    """The source of a unit that is named as in CONVIT_KERNELS_ISA, and its flags."""
    source = f"csrc/attention/{unit.removesuffix('_emulated')}.cpp"
    return ROOT / source, flags(unit.endswith("_emulated"))[source]


def definitions(source: Path) -> list[str]:
    """What a unit's source defines before it includes the kernels, as flags."""
    return [f"-D{name}={value}" for name, value in re.findall(r"#define (\w+) (\w+)", source.read_text())]
