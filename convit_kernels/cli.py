"""The commands.

What can run here (`info`), whether it is right (`selfcheck`), a model before and after (`demo`), where its time goes
(`profile`), what the benchmarks found (`report`), and how local a model's attention is (`locality`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import extension
from .attention import backends
from .bench.machine import machine

app = typer.Typer(help="Fast, exact gated positional self-attention (GPSA) of ConViT.", no_args_is_help=True)
# a file or a pipe has no width of its own: tables must not be cut to 80 columns there
console = Console(width=None if sys.stdout.isatty() else 110)


def native_libraries() -> dict[str, str]:
    """What became of each native library: in use, loaded but of no use here, or the reason why it is missing."""
    found = {}
    for name, reason in extension.status.items():
        if reason is None and name == "_C_cuda" and not torch.cuda.is_available():
            build = "torch sees no GPU" if torch.version.cuda else "this torch has no CUDA"
            found[name] = f"loaded, but idle: {build}"
        else:
            found[name] = reason or "in use"
    return found


def cpu_instruction_set() -> str | None:
    """What the CPU's attention kernels use, or why they cannot; None without them."""
    if extension.status["_C"] is not None:
        return None
    try:
        return extension.instruction_set()
    except RuntimeError as error:
        return str(error)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What can run on this machine, and what cannot and why."""
    report: dict[str, Any] = {
        "machine": machine(),
        "backends": [backend._asdict() for backend in backends()],
        "cpu_instruction_set": cpu_instruction_set(),
        "native_libraries": native_libraries(),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title="Machine", show_header=False)
    for key, value in (report["machine"] | {"cpu kernels for": report["cpu_instruction_set"]}).items():
        table.add_row(key, "none" if value is None else str(value))
    console.print(table)
    table = Table("backend", "can run", "why not", title="Backends, fastest first")
    for backend in report["backends"]:
        table.add_row(backend["name"], "yes" if backend["available"] else "no", backend["reason"])
    console.print(table)
    table = Table("library", "state", title="Native libraries")
    for name, state in report["native_libraries"].items():
        table.add_row(name, state)
    console.print(table)


@app.command()
def selfcheck(
    device: Annotated[str, typer.Option(help="cuda, or cpu: the Triton kernels are then interpreted.")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    backend: Annotated[str, typer.Option(help="The backend to check.")] = "triton",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here as JSON.")] = None,
) -> None:
    """Holds the kernels to float64 on this machine: every dtype, regime, odd shape and gradient."""
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        # the interpreter is chosen when triton is imported: it takes a process of its own
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        raise typer.Exit(subprocess.run([sys.executable, "-m", __package__, *sys.argv[1:]], env=environment).returncode)
    from . import selfcheck as checks
    from .equivalence import NAMES

    if interpreted:
        console.print(
            "No GPU: the kernels run in Triton's interpreter, on small shapes, without bfloat16.", style="yellow"
        )
    cases = checks.cases(interpreted)
    found = checks.run(backend, device, interpreted)
    results = list(track(found, "checking", len(cases), console=console, transient=True))
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Errors against float64, as a share of what is allowed: {backend}, {device}",
    )
    table.add_column("case", no_wrap=True)
    for heading in ("out", "dq", "dk", "dv", "d weight", "d gate", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results:
        shares = [f"{min(row['shares'][name], 99):.2f}" for name in NAMES] if row["shares"] else [""] * len(NAMES)
        table.add_row(row["case"], *shares, "[green]ok[/green]" if row["passed"] else "[red]FAIL[/red]")
    console.print(table)
    for row in results:
        if "error" in row:
            console.print(f"{row['case']}: {row['error']}", style="red", markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "device": device, "results": results}, indent=2))
    if not all(row["passed"] for row in results):
        raise typer.Exit(1)


@app.command()
def tune(
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 9,
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Channels of a head.")] = 48,
    grid: Annotated[tuple[int, int], typer.Option(help="Rows and columns of patches.")] = (14, 14),
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
) -> None:
    """Measures the Triton kernels' launch configurations on this GPU and keeps the fastest in the user's cache."""
    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    if dtype not in dtypes:
        console.print(f"--dtype must be one of {', '.join(dtypes)}, not {dtype!r}", style="red")
        raise typer.Exit(2)
    if not torch.cuda.is_available():
        console.print("tune measures on a GPU, and torch sees none: the table's configurations stay", style="red")
        raise typer.Exit(1)
    from .triton import configs
    from .triton import tune as tuning

    shape = tuning.Shape(batch, heads, grid, head_dim, dtypes[dtype])
    found = tuning.tune(shape, torch.device("cuda"))
    table = Table("kernel", "tried", "before", "us", "now", "us", title=f"{torch.cuda.get_device_name()}, {shape}")
    for one in track(found, "measuring", len(configs.PASSES), console=console, transient=True):
        cells = [("x".join(map(str, config)), f"{1e6 * seconds:.1f}") for config, seconds in (one[3:5], one[1:3])]
        table.add_row(one.pass_name, str(one.tried), *cells[0], *cells[1])
    console.print(table)
    console.print(f"kept in {configs.cache_file()}")


@app.command()
def demo(
    model: Annotated[list[str] | None, typer.Option(help="timm model, may be repeated.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Real weights (.safetensors or .pth) for one --model.", exists=True, dir_okay=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each implementation, interleaved.")] = 7,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here as JSON.")] = None,
) -> None:
    """timm's ConViT on real photographs, before and after replace_gpsa: same outputs, less time."""
    try:
        from . import demo as demonstration
    except ImportError as error:
        console.print(f"the demo needs {error.name}: pip install 'convit_kernels\\[demo]'", style="red")
        raise typer.Exit(1) from error
    names = model or list(demonstration.MODELS)
    try:
        demonstration.check_arguments(names, checkpoint, device)
        results = demonstration.run(names, checkpoint, batch, repeats, device, console)
    except ValueError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from error
    console.print(demonstration.render(results, batch, device))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": machine(), "device": device, "batch": batch, "models": results}, indent=2)
        )
        console.print(f"written to {json_file}")
    if not all(result["passed"] for result in results):
        raise typer.Exit(1)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="convit_tiny, _small or _base, or one of these with _plus.")] = (
        "convit_small"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    backward: Annotated[bool, typer.Option("--backward", help="A training step's forward and backward.")] = False,
    layer: Annotated[bool, typer.Option("--layer", help="One GPSA layer in place of the whole model.")] = False,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compare: Annotated[str, typer.Option(help="eager, compile, auto (our fastest), or a backend; with commas.")] = (
        "eager,auto"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each implementation, interleaved.")] = 5,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of each implementation into it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with tables and plots.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")] = None,
) -> None:
    """Where the time and memory of timm go and where ours: operators by phase, side by side."""
    try:
        from .bench import profile as profiling
        from .bench import profile_tables
        from .bench.accuracy import WrongResultsError

        if html is not None:
            from .bench import profile_page
    except ImportError as error:
        console.print(f"profile needs {error.name}: pip install 'convit_kernels\\[bench]'", style="red")
        raise typer.Exit(1) from error
    try:
        task = profiling.task(model, batch, backward, layer, device, dtype)
        # plain lines: a spinner's thread would take its share of what is measured
        found = profiling.run(
            task, compare.split(","), repeats, trace, lambda text: console.print(text, style="dim", highlight=False)
        )
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except WrongResultsError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(*profile_tables.tables(found), sep="\n")
    if html is not None:
        html.write_text(profile_page.render(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=2))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="What pytest benchmarks --benchmark-json wrote.", exists=True)],
    against: Annotated[Path | None, typer.Option(help="Older results: what became slower or faster.", exists=True)] = (
        None
    ),
    out: Annotated[Path | None, typer.Option(help="Write the figures into it, as SVG and PNG.")] = None,
) -> None:
    """The results of the benchmarks as tables and figures; exits with 1 where something became slower."""
    try:
        from .bench import report as reporting
        from .bench.compare import changes
        from .bench.results import load

        new = load(results)
        old = load(against) if against else None
        written = []
        if out is not None:
            from .bench.figures import write_figures

            written = write_figures(new, out)
    except ImportError as error:
        console.print(f"report needs {error.name}: pip install 'convit_kernels\\[bench]'", style="red")
        raise typer.Exit(1) from error
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(*reporting.tables(new), sep="\n")
    for path in written:
        console.print(f"written to {path}", markup=False, soft_wrap=True)
    if old is not None:
        found = changes(new.rows, old.rows)
        console.print(*reporting.comparison(new, old, found), sep="\n")
        if any(change.verdict == "slower" for change in found):
            raise typer.Exit(1)


@app.command()
def locality(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Write the figure here: .png, .svg or .pdf.")],
    model: Annotated[str, typer.Option(help="One of convit_kernels.models, or a timm model.")] = "convit_small",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The weights (.safetensors or .pth); without: as initialised.", exists=True, dir_okay=False),
    ] = None,
    model_args: Annotated[str, typer.Option(help="Its other arguments as JSON: '{\"depth\": 6}'.")] = "{}",
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width of the images, in pixels.")] = None,
    query: Annotated[
        tuple[int, int] | None, typer.Option(help="Row and column of the patch whose maps are drawn.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as JSON.")] = None,
) -> None:
    """How local a model's attention is: a figure of non-locality, gates, and where one patch of the images looks."""
    try:
        from . import locality_report as reporting
    except ImportError as error:
        console.print(f"locality needs {error.name}: pip install 'convit_kernels\\[locality]'", style="red")
        raise typer.Exit(1) from error
    try:
        reporting.check_arguments(out, json_file, device)
        found = reporting.run(model, model_args, checkpoint, images, size, query, batch, device, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    reporting.write_figure(found, out)
    if json_file is not None:
        reporting.write_json(found, json_file)
    for path in (out, json_file):
        if path is not None:
            console.print(f"written to {path}", markup=False, soft_wrap=True)
