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

# Programs that a GPU takes along the second axis of a grid, of which each kernel has one for each head.
MAX_HEADS = 65_535

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
    "sm_75": "sm_75",
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_120",
    "sm_121": "sm_120",
    "gfx90a": "gfx90a",
    "gfx942": "gfx942",
    "gfx950": "gfx950",
    "gfx1200": "gfx1200",
    "gfx1201": "gfx1200",
}

KIB = 1024

# The shared memory of a block, in bytes, that a family's tiles may need: what the smallest of its devices has.
SHARED_MEMORY = {
    "sm_75": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
    "gfx1200": 64 * KIB,
}

# Where the programs of 128 queries or keys are fewer than two for each multiprocessor, many of these stand idle for
# half of the time: there half a tile by half the warps takes the place of the table's. It reads K and V, or Q, twice as
# often from the second-level cache, which costs more than it brings where there is work for all. For other families
# than these, and for larger heads, some of the halves spill.
ROWS_OF_A_PROGRAM = 128
FINER_HEAD_DIM = 64
FINER_FAMILIES = frozenset({"sm_80", "sm_86", "sm_90"})
FINER = {
    ("forward", Config(128, 32, 8, 2)): Config(64, 32, 4, 2),
    ("backward_q", Config(128, 32, 8, 2)): Config(64, 32, 4, 2),
    ("backward_kv", Config(32, 128, 8, 2)): Config(32, 64, 4, 2),
}


class Gpu(NamedTuple):
    """What of a GPU decides about its launch configurations.

    architecture: "sm_90", "gfx942". shared_memory: bytes that a block can have. multiprocessors: SMs, CUs.
    """

    architecture: str
    shared_memory: int
    multiprocessors: int


@functools.lru_cache
def gpu(index: int) -> Gpu:
    """The GPU that torch counts as number ``index``."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = str(properties.gcnArchName).split(":")[0]
        return Gpu(architecture, properties.shared_memory_per_block, properties.multi_processor_count)
    architecture = f"sm_{properties.major}{properties.minor}"
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(architecture, shared_memory, properties.multi_processor_count)


def _place(architecture: str) -> tuple[str, int]:
    """Kind and number of an architecture: only within a kind do tiles carry over, to whatever is newer."""
    if architecture.startswith("sm_"):
        return "NVIDIA", int(architecture.removeprefix("sm_"))
    # hexadecimal digits: generation, version, stepping. Waves are of 64 lanes up to generation 9, of 32 after it.
    number = int(architecture.removeprefix("gfx"), 16)
    return f"AMD, waves of {32 if number >= 0x1000 else 64}", number


def nearest_family(gpu: Gpu) -> str | None:
    """The family of a GPU: its own, for a GPU that was not known here the newest that is not newer and whose tiles fit
    its shared memory. None where there is none."""
    if gpu.architecture in FAMILIES:
        return FAMILIES[gpu.architecture]
    kind, number = _place(gpu.architecture)
    older = {
        name: _place(name)[1]
        for name, shared_memory in SHARED_MEMORY.items()
        if _place(name)[0] == kind and _place(name)[1] <= number and shared_memory <= gpu.shared_memory
    }
    return max(older, key=older.__getitem__, default=None)


def why_not(family_name: str, dtype: torch.dtype, head_dim: int = 1) -> str:
    """Why there are no launch configurations of a family for tensors of a kind; "" where there are."""
    row = TABLE.get(table_key(family_name, "forward", "dense", dtype.itemsize))
    if row is None:
        return f"the kernels take no {dtype} on {family_name}, where Triton has no matrix instructions for it"
    most = HEAD_DIM_BUCKETS[len(row.split()) - 1]
    if head_dim > most:
        return f"head_dim is at most {most} on {family_name}, not {head_dim}"
    return ""


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


def _index(device: torch.device | None) -> int | None:
    """The number of the GPU that `lookup` answers for; None where it is no GPU or not the one at hand, see `target`."""
    if device is None or device.type != "cuda" or _target.get() is not None:
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def family(device: torch.device | None = None) -> str:
    """The family of ``device``, or of the architecture set by `target`; no device, and the CPU of Triton's interpreter,
    are "sm_86".

    Raises:
        RuntimeError: there are no launch configurations for this GPU.
    """
    return _family(_target.get(), _index(device))


@functools.lru_cache
def _family(architecture: str | None, index: int | None) -> str:
    if index is None:
        return FAMILIES[architecture or "sm_86"]
    found = nearest_family(gpu(index))
    if found is None:
        raise RuntimeError(f"there are no launch configurations for {gpu(index).architecture}")
    return found


def regimes(pass_name: str) -> tuple[Regime, ...]:
    """The regimes in which a pass differs: those that read no position map, as tiles or factors, count as dense."""
    return ("dense", "factored") if pass_name in ("forward", "backward_kv") else ("dense",)


def table_key(family_name: str, pass_name: str, regime: Regime, itemsize: int) -> str:
    """The row of `config_table.TABLE` for a family, a pass, a regime and a dtype's bytes."""
    return f"{family_name}/{pass_name}/{regime if regime in regimes(pass_name) else 'dense'}/{itemsize}"


def table_config(
    pass_name: str, *, dtype: torch.dtype, head_dim: int, regime: Regime, family_name: str, few: bool = False
) -> Config:
    """The table's configuration for a family; for ``few`` programs (see `few_programs`) with `FINER` tiles.

    Raises:
        RuntimeError: there are none for this dtype and head_dim.
    """
    if reason := why_not(family_name, dtype, head_dim):
        raise RuntimeError(reason)
    bucket = next(index for index, size in enumerate(HEAD_DIM_BUCKETS) if head_dim <= size)
    row = TABLE[table_key(family_name, pass_name, regime, dtype.itemsize)]
    config = Config(*map(int, row.split()[bucket].split("x")))
    finer = few and family_name in FINER_FAMILIES and head_dim <= FINER_HEAD_DIM
    return FINER.get((pass_name, config), config) if finer else config


def few_programs(num_tokens: int | None, batch_heads: int | None, device: torch.device | None) -> bool:
    """Whether a GPU has too few programs of `ROWS_OF_A_PROGRAM` for two on each multiprocessor.

    Args:
        num_tokens: of an image. batch_heads: images times heads. False where one of them is None.
    """
    index = _index(device)
    if index is None or num_tokens is None or batch_heads is None:
        return False
    return -(-num_tokens // ROWS_OF_A_PROGRAM) * batch_heads < 2 * gpu(index).multiprocessors


def lookup(
    pass_name: str,
    *,
    dtype: torch.dtype,
    head_dim: int,
    regime: Regime = "dense",
    num_tokens: int | None = None,
    batch_heads: int | None = None,
    device: torch.device | None = None,
) -> Config:
    """The configuration for one kernel: what `store_tuned` kept for this very device and code, else the table's.

    Args:
        pass_name: one of `PASSES`.
        dtype: float32, float16 or bfloat16.
        head_dim: 1 to 256.
        num_tokens: of an image; without it nothing that was tuned is found.
        batch_heads: images times heads: with few of them the tile is finer, see `few_programs`.
    Raises:
        ValueError: for a head_dim above 256 or an unknown pass.
        RuntimeError: there are no launch configurations for this GPU, or for such tensors on it.

    Answers are remembered until `clear`.
    """
    # whatever the answer depends on is an argument, so that it can be remembered
    return _lookup(pass_name, dtype, head_dim, regime, num_tokens, batch_heads, device, _target.get())


@functools.lru_cache(maxsize=4096)
def _lookup(
    pass_name: str,
    dtype: torch.dtype,
    head_dim: int,
    regime: Regime,
    num_tokens: int | None,
    batch_heads: int | None,
    device: torch.device | None,
    architecture: str | None,
) -> Config:
    if head_dim > HEAD_DIM_BUCKETS[-1]:
        raise ValueError(f"head_dim must be at most {HEAD_DIM_BUCKETS[-1]}, got {head_dim}")
    if pass_name not in PASSES:
        raise ValueError(f"unknown pass {pass_name!r}; one of {', '.join(PASSES)}")
    few = few_programs(num_tokens, batch_heads, device)
    if _index(device) is not None and num_tokens is not None:
        tuned = load_tuned(torch.cuda.get_device_name(device)).get(
            entry_key(pass_name, dtype=dtype, head_dim=head_dim, regime=regime, num_tokens=num_tokens, few=few)
        )
        if tuned is not None:
            return tuned
    return table_config(pass_name, dtype=dtype, head_dim=head_dim, regime=regime, family_name=family(device), few=few)


# ---- the user's cache of measured configurations ---------------------------------------------------------------------


def cache_file() -> Path:
    """``$CONVIT_KERNELS_CACHE_DIR``, else ``$XDG_CACHE_HOME/convit_kernels``, else ``~/.cache/convit_kernels``."""
    folder = os.environ.get("CONVIT_KERNELS_CACHE_DIR")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "convit_kernels")
    return Path(folder) / "triton_configs.json"


def entry_key(
    pass_name: str, *, dtype: torch.dtype, head_dim: int, regime: Regime, num_tokens: int, few: bool = False
) -> str:
    """The name of one tuned entry. Token counts share it up to the next power of two, as tiles care for no more, and
    batches and heads but for `few_programs`."""
    tokens = 1 << (num_tokens - 1).bit_length()
    few_or_not = "/few" if few else ""
    return f"{pass_name}/{regime}/{str(dtype).removeprefix('torch.')}/{head_dim}/{tokens}{few_or_not}"


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
    """Forgets what was read, of the file and of the GPUs, so that the next `lookup` reads it again."""
    for remembered in (_read, _section, _lookup, _family, gpu):
        remembered.cache_clear()
