"""`tune`: measures the Triton kernels' launch configurations on this GPU."""

from contextlib import suppress
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.table import Table

from .output import check_writable, console, stop

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def command(
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 9,
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Channels of a head.")] = 48,
    grid: Annotated[tuple[int, int], typer.Option(help="Rows and columns of patches.")] = (14, 14),
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
) -> None:
    """Measures the Triton kernels' launch configurations on this GPU and keeps the fastest in the user's cache."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if not torch.cuda.is_available():
        raise stop("tune measures on a GPU, and torch sees none: the table's configurations stay", 1)
    from ..triton.configs import PASSES, Config, cache_file
    from ..triton.tune import Shape, tune

    with suppress(OSError):  # which the check says in its own words
        cache_file().parent.mkdir(parents=True, exist_ok=True)
    check_writable("the cache, which CONVIT_KERNELS_CACHE_DIR can place elsewhere,", cache_file())

    def cells(config: Config, seconds: float) -> tuple[str, str]:
        return "x".join(map(str, config)), f"{1e6 * seconds:.1f}"

    shape = Shape(batch, heads, grid, head_dim, DTYPES[dtype])
    findings = tune(shape, torch.device("cuda"))
    table = Table("kernel", "tried", "before", "us", "now", "us", title=f"{torch.cuda.get_device_name()}, {shape}")
    for finding in track(findings, "measuring", len(PASSES), console=console, transient=True):
        before, now = cells(finding.before, finding.seconds_before), cells(finding.config, finding.seconds)
        table.add_row(finding.pass_name, str(finding.tried), *before, *now)
    console.print(table)
    console.print(f"kept in {cache_file()}", markup=False, soft_wrap=True)
