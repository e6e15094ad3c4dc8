"""Launch configurations of the Triton kernels: a table, never an autotuner, so the first call does not stall.

The table was chosen by compiling candidates for each family and reading their machine code (tools/machine_code in the
source tree): no spill, shared memory within the device's limit, then the fewest issued instructions and the least
traffic between L2 and the cores. Nothing in it was timed. `store_tuned` keeps what was measured on a GPU in the user's
cache, which `lookup` prefers to the table.

Architectures are grouped in families by what limits a tile: shared memory for a block, registers and the kind of
matrix instruction. The cache file is keyed by the kernels' source, the device's name and Triton's version, so a choice
that was measured with other code is never used.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from .config_table import TABLE

Regime = Literal["dense", "factored"]

# One pass for each kernel that has a tile.
PASSES = ("forward", "backward_q", "backward_kv", "backward_position")

# The files whose code a measured configuration was measured with.
KERNEL_SOURCES = ("common.py", "forward.py", "backward.py")

# The answer for a head_dim is that of the first bucket that holds it.
HEAD_DIM_BUCKETS = (16, 32, 48, 64, 80, 96, 128, 192, 256)


class Config(NamedTuple):
    """One launch configuration: the tile (query rows, key columns), warps a program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What is compiled for one target runs on its family. 86, 89 and 120 have 99 KiB of shared memory a block where the
# data-centre parts have 163 (80) or 227 (90, 100). 120 has the matrix instructions of 80, not those of 100, but its
# code needs more registers than that of 86.
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_120",
    "sm_121": "sm_120",
    "gfx942": "gfx942",
    "gfx950": "gfx950",
}

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("convit_kernels_target", default=None)


@contextlib.contextmanager
def target(architecture: str) -> Iterator[None]:
    """Within this context `lookup` answers for ``architecture`` ("sm_90", "gfx942", ...) whatever the device is."""
    if architecture not in FAMILIES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(FAMILIES)}")
    token = _target.set(architecture)
    try:
        yield
    finally:
        _target.reset(token)


@functools.lru_cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
        return name if name in FAMILIES else "gfx942"
    return f"sm_{properties.major}{properties.minor}"


def family(device: torch.device | None = None) -> str:
    """The family of ``device``, or of the architecture set by `target`; unknown and CPU (interpreter) devices are
    "sm_86".

    That family has the smallest shared memory, so its tiles fit every device.
    """
    architecture = _target.get()
    if architecture is None:
        if device is None or device.type != "cuda":
            return "sm_86"
        architecture = _architecture(torch.cuda.current_device() if device.index is None else device.index)
    return FAMILIES.get(architecture, "sm_86")


def regimes(pass_name: str) -> tuple[Regime, ...]:
    """The regimes in which a pass differs: those that read no position map, as tiles or factors, count as dense."""
    return ("dense", "factored") if pass_name in ("forward", "backward_kv") else ("dense",)


def table_key(family_name: str, pass_name: str, regime: Regime, itemsize: int) -> str:
    """The row of `config_table.TABLE` for a family, a pass, a regime and a dtype's bytes."""
    return f"{family_name}/{pass_name}/{regime if regime in regimes(pass_name) else 'dense'}/{itemsize}"


def lookup(
    pass_name: str,
    *,
    dtype: torch.dtype,
    head_dim: int,
    regime: Regime = "dense",
    num_tokens: int | None = None,
    device: torch.device | None = None,
) -> Config:
    """The configuration for one kernel: what `store_tuned` kept for this very device and code, else the table's.

    Args:
        pass_name: one of `PASSES`.
        dtype: float32, float16 or bfloat16.
        head_dim: 1 to 256.
        num_tokens: chooses among the tuned entries only.
    Raises:
        ValueError: for a head_dim above 256 or an unknown pass.
    """
    if head_dim > HEAD_DIM_BUCKETS[-1]:
        raise ValueError(f"head_dim must be at most {HEAD_DIM_BUCKETS[-1]}, got {head_dim}")
    if pass_name not in PASSES:
        raise ValueError(f"unknown pass {pass_name!r}; one of {', '.join(PASSES)}")
    if _target.get() is None and device is not None and device.type == "cuda" and num_tokens is not None:
        tuned = load_tuned(torch.cuda.get_device_name(device)).get(
            entry_key(pass_name, dtype=dtype, head_dim=head_dim, regime=regime, num_tokens=num_tokens)
        )
        if tuned is not None:
            return tuned
    bucket = next(index for index, size in enumerate(HEAD_DIM_BUCKETS) if head_dim <= size)
    row = TABLE[table_key(family(device), pass_name, regime, dtype.itemsize)]
    return Config(*map(int, row.split()[bucket].split("x")))


# ---- the user's cache of measured configurations ---------------------------------------------------------------------


def cache_file() -> Path:
    """``$CONVIT_KERNELS_CACHE_DIR``, else ``$XDG_CACHE_HOME/convit_kernels``, else ``~/.cache/convit_kernels``."""
    folder = os.environ.get("CONVIT_KERNELS_CACHE_DIR")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "convit_kernels")
    return Path(folder) / "triton_configs.json"


def entry_key(pass_name: str, *, dtype: torch.dtype, head_dim: int, regime: Regime, num_tokens: int) -> str:
    """The name of one tuned entry. Token counts share it up to the next power of two, as tiles care for no more."""
    return f"{pass_name}/{regime}/{str(dtype).removeprefix('torch.')}/{head_dim}/{1 << (num_tokens - 1).bit_length()}"


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


@functools.lru_cache
def source_hash() -> str:
    """A hash of the kernels' code without comments and docstrings; what was measured with other code is out of date."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in KERNEL_SOURCES:
        code = _WithoutDocstrings().visit(ast.parse((folder / name).read_text()))
        digest.update(ast.unparse(code).encode())  # ast.dump would differ between versions of Python
    return digest.hexdigest()[:16]


@functools.lru_cache
def _section(device_name: str) -> str:
    import triton

    return f"{source_hash()}/{device_name}/triton {triton.__version__}"


def _parsed(path: Path) -> dict[str, dict[str, Config]]:
    """Every section of the cache file; raises one of `_CORRUPT` where it is none of ours."""
    if not path.exists():
        return {}
    sections = json.loads(path.read_text())
    return {
        section: {key: _checked(Config(*values)) for key, values in entries.items()}
        for section, entries in sections.items()
    }


_CORRUPT = (OSError, ValueError, TypeError, AttributeError)


@functools.lru_cache
def _read(path: Path) -> dict[str, dict[str, Config]]:
    """Every section of the cache file. A file that cannot be understood counts as empty, with one warning."""
    try:
        return _parsed(path)
    except _CORRUPT as error:
        warnings.warn(f"convit_kernels ignores {path}, which is not a file that it wrote: {error}", stacklevel=2)
        return {}


def _checked(config: Config) -> Config:
    """``config``, when a kernel can be launched with it."""
    if not all(isinstance(value, int) and value > 0 for value in config):
        raise ValueError(f"{config} is no launch configuration")
    if any(value & (value - 1) for value in config[:3]):
        raise ValueError(f"{config} has a tile or a number of warps that is no power of two")
    return config


def load_tuned(device_name: str) -> dict[str, Config]:
    """The tuned entries (see `entry_key`) for this device, this source and this Triton; read once a process."""
    return _read(cache_file()).get(_section(device_name), {})


def store_tuned(device_name: str, entries: dict[str, Config]) -> Path:
    """Adds ``entries`` to the user's cache and returns its file.

    The file is replaced in one step, so a reader sees the old one or the new one and an interrupted writer leaves the
    old one. Of two writers at once the last wins.
    """
    path = cache_file()
    for config in entries.values():
        _checked(config)
    try:
        sections = _parsed(path)
    except _CORRUPT:
        sections = {}
    sections.setdefault(_section(device_name), {}).update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(sections, stream, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    clear()
    return path


def clear() -> None:
    """Forgets what was read, so that the next `lookup` reads the file again."""
    _read.cache_clear()
    _section.cache_clear()
