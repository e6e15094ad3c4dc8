"""Wrong kernels: (file, right text, wrong text). The suite must fail for each (`test_mutants_are_noticed` of the
pass that it belongs to; those of the backward pass are in mutants_backward.py, of memory and order in
mutants_memory.py).
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

KERNELS = Path(__file__).resolve().parents[2] / "convit_kernels" / "triton"


def plant(mutant: tuple[str, str, str], folder: Path) -> SimpleNamespace:
    """The modules ``forward`` and ``backward`` of a copy of the kernels that is wrong.

    The copy is in ``folder``, and is a package of that name. Nothing in the package's ``__init__`` runs, so no operator
    is registered twice.
    """
    file, right, wrong = mutant
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
    source = (folder / file).read_text()
    assert right in source, "the kernels no longer have what this mutant changes"
    (folder / file).write_text(source.replace(right, wrong))
    package = ModuleType(folder.name)
    package.__path__ = [str(folder)]
    sys.modules[folder.name] = package
    return SimpleNamespace(
        **{name: importlib.import_module(f"{folder.name}.{name}") for name in ("forward", "backward")}
    )


FORWARD: list[tuple[str, str, str]] = [
    ("forward.py", "correction = tl.exp2(m - new_m)", "correction = tl.exp2(new_m - m)"),
    ("forward.py", "c = scaled(c, correction[:, None])", "c = c"),
    ("forward.py", "s = tl.where(columns[None, :] < left,", "s = tl.where(columns[None, :] < left + 1,"),
    ("common.py", "x[1] * x_factor + y[1]", "x[1] * x_factor - y[1]"),
    ("forward.py", "c = scaled(c, normalize)", "c = c"),
    ("forward.py", "(m + tl.log2(total)) * LN2", "(m + tl.log2(total))"),
    ("forward.py", "total = tl.sum(e, 1)\n", "total = tl.sum(e, 1) * 2.0\n"),
    ("forward.py", "p, position_share * inverse_keep", "p, position_share"),
    ("forward.py", "tile = tl.where(keep, tile, 0.0)", "tile = tile"),
    ("forward.py", "(dropout.philox, batch * num_heads + head", "(dropout.philox, batch + head"),
    ("common.py", "(-x[1].to", "(x[1].to"),
    ("forward.py", "if position_share < SATURATION:", "if content_share < SATURATION:"),
    (
        "forward.py",
        "keys = next_tokens(keys, BLOCK_N, position.width)",
        "keys = next_tokens(keys, BLOCK_N, position.height)",
    ),
    ("forward.py", 'm = m + float("inf")', "m = m"),
    ("common.py", "tl.where(gate > 0.0, smaller, larger), tl.where", "tl.where(gate > 0.0, larger, smaller), tl.where"),
    (
        "common.py",
        "first = ptrs[0] + step",
        "first = ptrs[0]",
    ),
    ("common.py", "tokens[0] + step // width + wrap.to(tl.int32)", "tokens[0] + step // width"),
    ("common.py", "tl.join(k0.to(tl.int8), k2.to(tl.int8))", "tl.join(k0.to(tl.int8), k1.to(tl.int8))"),
    ("common.py", "LOWEST: tl.constexpr = tl.constexpr(-3.0e38)", "LOWEST: tl.constexpr = tl.constexpr(-3.0)"),
    ("common.py", "tl.dot(a[1], tl.trans(b[1]), product,", "product - tl.dot(a[1], tl.trans(b[1]),"),
]
