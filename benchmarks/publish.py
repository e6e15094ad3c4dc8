"""Writes what readers see of the committed results: the README's table and the pages of docs/benchmarks.

    python benchmarks/publish.py                 rewrites all of it from what is committed
    python benchmarks/publish.py RESULTS.json    from then on the README's table is of this file
    python benchmarks/publish.py --path          prints where the results of this machine and commit belong

A run is what one machine measured at one commit: benchmarks/results/RUN.json, and beside it RUN-growth.json (a sweep),
RUN-models.json (whole models beside DeiT), RUN-units.json (the CPU kernels by instruction set) and RUN-host.json (the
host's time of a call), each where there is one.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import host_time
import units
from against_deit import COLUMNS, COMPOSITE, DEIT, EAGER_CONVIT, REPLACED
from against_deit import load as load_models
from tasks import SWEEP_MODEL, SWEEP_SIDES_BATCH

from convit_kernels.bench.compare import MEANING, SpeedUp, footnote, noise_of_run, speed_ups, times_faster
from convit_kernels.bench.figures import write_figures
from convit_kernels.bench.implementations import ARCHITECTURES, EAGER, MODES, PARTS, SDPA, is_ours, label, place
from convit_kernels.bench.machine import describe, machine
from convit_kernels.bench.markdown import table
from convit_kernels.bench.measure import milliseconds, spread
from convit_kernels.bench.results import NotMeasured, Results, Row, by_group, load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
BUDGET = ROOT / "tools" / "machine_code" / "budget.json"

IN_README = ("convit_tiny", "convit_small", "convit_base")
MARKERS = "<!-- performance: begin ({source}), written by benchmarks/publish.py -->", "<!-- performance: end -->"
SECTION = re.compile(r"<!-- performance: begin \((?P<source>[^)]*)\).*?<!-- performance: end -->", re.DOTALL)
GENERATED = "<!-- written by benchmarks/publish.py -->"

Ratios = Mapping[tuple[str, str], SpeedUp]


class Run(NamedTuple):
    """What one machine measured at one commit."""

    name: str
    results: Results | None = None
    growth: Results | None = None
    models: dict[str, Any] | None = None  # what against_deit.py wrote
    units: dict[str, Any] | None = None  # what units.py wrote
    host: dict[str, Any] | None = None  # what host_time.py wrote

    @property
    def machine(self) -> dict[str, Any]:
        source = self.results or self.growth
        return source.machine if source else (self.models or self.units or self.host or {})["machine"]

    @property
    def date(self) -> str:
        source = self.results or self.growth
        return source.date if source else (self.models or self.units or self.host or {}).get("date", "")

    @property
    def on_gpu(self) -> bool:
        return any(row.device.startswith("cuda") for part in (self.results, self.growth) if part for row in part.rows)


def run_of(name: str) -> Run:
    """The run of a name, with the parts that are committed."""
    readers = {"": load, "-growth": load, "-models": load_models, "-units": units.load, "-host": host_time.load}
    paths = {part: RESULTS / f"{name}{part}.json" for part in readers}
    return Run(name, *(read(paths[part]) if paths[part].is_file() else None for part, read in readers.items()))


def runs() -> list[Run]:
    """All committed runs, by name."""
    names = {re.sub("-(growth|models|units|host)$", "", path.stem) for path in RESULTS.glob("*.json")}
    return [run_of(name) for name in sorted(names)]


def new_results() -> Path:
    """Where the results of this machine and commit belong."""
    here = machine()
    name = f"{here['gpu'] or here['cpu']} {here['cpu_capability']} {here['threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{here['commit'] or 'no-commit'}.json"


# ---- times faster ----------------------------------------------------------------------------------------------------


def best_of_ours(results: Results, ratios: Ratios) -> dict[str, dict[str, SpeedUp]]:
    """The best ratio of our backends at 14x14 patches: by `Row.kind`, then by model."""
    best: dict[str, dict[str, SpeedUp]] = {}
    for rows in by_group(row for row in results.rows if row.tokens == 196 and row.key in ratios).values():
        if ours := [ratios[row.key] for row in rows if is_ours(row.implementation)]:
            # of a sweep's batches the default set's, which comes first
            best.setdefault(rows[0].kind, {}).setdefault(rows[0].model, max(ours, key=lambda ratio: ratio.times))
    return best


def _ratio_lines(lines: Mapping[str, Mapping[str, SpeedUp]], models: Iterable[str]) -> list[str]:
    """A line of ratios for each title, a column for each model, and what the mark means where one bears it."""
    models = list(models)
    headings = [
        "times faster than eager timm",
        *(ARCHITECTURES[model].title.removeprefix("ConViT-") for model in models),
    ]
    cells = [[title, *(str(line.get(model, "")) for model in models)] for title, line in lines.items()]
    note = footnote(line.get(model) for line in lines.values() for model in models)
    return table(headings, cells) + (["", note] if note else [])


def readme_section(source: str, results: Results, on_gpu: bool) -> str:
    """The README's section, markers included.

    `source` is the results' path from the project's root, `on_gpu` whether any committed run is of a GPU.
    """
    name = Path(source).stem
    begin, end = MARKERS
    ratios = speed_ups(results.rows)
    batches = sorted({row.batch for row in results.rows if row.tokens == 196 and row.key in ratios})
    text = [
        begin.format(source=source),
        f"Measured on {describe(results.machine, results.loads)}, {results.date}; 14x14 patches.",
        f"The fastest of our backends; batches of {batches[0]} to {batches[-1]} images, fewer for larger work.",
        "Nothing is timed unless its results are right.",
        "",
        *_ratio_lines(best_of_ours(results, ratios), IN_README),
        "",
        f"![Times faster than eager timm, by model and implementation](docs/benchmarks/{name}/speed-up.svg)",
        "",
        f"[Every size and row of this run](docs/benchmarks/results-{name}.md),",
        "[other runs](docs/benchmarks/index.md), [how it is measured](docs/benchmarks/method.md).",
    ]
    if not on_gpu:
        text.append("No GPU was at hand: nothing here says how fast the Triton kernels are.")
    return "\n".join([*text, end])


def readme(text: str, source: str = "") -> str:
    """The README's text with its section of `source`, a path from the project's root, or of the file that it names.

    Raises:
        ValueError: the text has no such section.
    """
    section = SECTION.search(text)
    if section is None:
        raise ValueError(f"the README lacks the lines {' and '.join(MARKERS)}: put them where the table belongs")
    source = source or section["source"]
    on_gpu = any(run.on_gpu for run in runs())
    return text[: section.start()] + readme_section(source, load(ROOT / source), on_gpu) + text[section.end() :]


# ---- pages -----------------------------------------------------------------------------------------------------------


def results_page(run: Run) -> str:
    """All that a run has measured."""
    lines = [f"# {_title(run)}", "", GENERATED, ""]
    loads = run.results.loads if run.results else []
    lines.append(f"Measured on {', '.join(filter(None, (describe(run.machine, loads), run.date)))}.")
    lines.append("[How it is measured](method.md).")
    if not run.on_gpu:
        lines.append("No GPU was measured: nothing here says how fast the Triton kernels are.")
    lines.append("")
    if run.results:
        lines += _speed_ups(run.name, run.results)
    if run.growth:
        lines += _growth(run.name, run.growth)
    if run.models:
        lines += _models(run.name, run.models)
    if run.units:
        lines += _units(run.name, run.units)
    if run.host:
        lines += _host(run.name, run.host)
    if run.results:
        lines += [*_not_measured(run.results.not_measured), *_every_row(run.results)]
    return "\n".join(lines).rstrip() + "\n"


def _title(run: Run) -> str:
    here = run.machine
    processor = here["gpu"] or f"{here['cpu']} ({here['cpu_capability']}), {here['threads']} threads"
    return f"{processor}, commit {here['commit']}"


def _data(name: str) -> str:
    return f"The data: `{(RESULTS / name).relative_to(ROOT).as_posix()}.json`."


def _speed_ups(name: str, results: Results) -> list[str]:
    ratios = speed_ups(results.rows)
    lines_of: dict[str, Mapping[str, SpeedUp]] = {}
    for kind, line in best_of_ours(results, ratios).items():
        lines_of[kind] = line
        alone = {
            row.model: ratios[row.key]
            for row in reversed(results.rows)
            if (row.implementation, row.kind, row.tokens) == (SDPA, kind, 196) and row.key in ratios
        }
        if alone:
            lines_of[kind.replace(PARTS["attention"], label(SDPA), 1)] = alone
    models = [model for model in ARCHITECTURES if any(model in line for line in lines_of.values())]
    lines = [
        "## Times faster than eager timm",
        "",
        f"14x14 patches, the fastest of our backends. Each number: {MEANING}. {_data(name)}",
        f"{label(SDPA)}, is PyTorch's fused attention without position, which is less work.",
        "",
        *_ratio_lines(lines_of, models),
        "",
        f"![Times faster than eager timm, by model and implementation]({name}/speed-up.svg)",
        "",
    ]
    control = [ratio.times for (_, implementation), ratio in ratios.items() if implementation == EAGER]
    noise = noise_of_run(results.rows)
    if control and noise is not None:
        lines += [
            f"Noise: eager against itself, measured in the same way, comes out at {min(control):.2f} to "
            f"{max(control):.2f} times. One standard deviation of a row's median is {noise:.1%}.",
            "",
        ]
    return lines


def _growth(name: str, results: Results) -> list[str]:
    """Time and memory by grid: eager's beside those of our fastest backend."""
    lost = {entry.group for entry in results.not_measured if entry.implementation == EAGER}
    groups = by_group(row for row in results.rows if row.batch == SWEEP_SIDES_BATCH)
    kinds = list(dict.fromkeys(row.kind for row in results.rows))
    cells = []
    for group, rows in sorted(groups.items(), key=lambda entry: (kinds.index(entry[1][0].kind), entry[1][0].tokens)):
        eager, alone = (next((row for row in rows if row.implementation == name), None) for name in (EAGER, SDPA))
        ours = min((row for row in rows if is_ours(row.implementation)), key=lambda row: row.time.p50, default=None)
        if ours is None or (eager is None and group not in lost):
            continue
        times = [milliseconds(row.time.p50) if row else "" for row in (eager, ours, alone)]
        memory = [f"{row.peak_memory / 1e6:.1f}" if row else "" for row in (eager, ours)]
        cells.append([ours.kind, str(ours.tokens), times[0] or "out of memory", *times[1:], *memory])
    headings = ["", "tokens", "eager, ms", "ours, ms", f"{label(SDPA)}, ms", "eager, peak MB", "ours, peak MB"]
    return [
        "## Growth with the image",
        "",
        f"{ARCHITECTURES[SWEEP_MODEL].title}, batch {SWEEP_SIDES_BATCH}, {results.date}. {_data(f'{name}-growth')}",
        "",
        *table(headings, cells),
        "",
        f"![Time and memory against the number of tokens, with fitted exponents]({name}/growth-tokens.svg)",
        "",
        f"![Time and memory against the batch, with fitted exponents]({name}/growth-batch.svg)",
        "",
    ]


def _models(name: str, measured: dict[str, Any]) -> list[str]:
    """Whole models: timm's ConViT, the same replaced, and timm's DeiT of the same size."""
    columns = [column for column in COLUMNS if any(row["implementation"] == column for row in measured["rows"])]
    ours = [column for column in columns if column in (REPLACED, COMPOSITE)]
    cells, shares = [], []
    dtypes = list(dict.fromkeys(row["dtype"] for row in measured["rows"]))
    forward_first = sorted(measured["rows"], key=lambda row: (dtypes.index(row["dtype"]), row["backward"]))
    for (dtype, backward, size), entries in groupby(
        forward_first, lambda row: (row["dtype"], row["backward"], row["size"])
    ):
        rows = {row["implementation"]: row for row in entries}
        title = f"{ARCHITECTURES[size].title}, {MODES[backward]}, {dtype}"
        line = []
        for column in columns:
            row = rows.get(column)
            share = f" ({row['attention']:.0%})" if row and row["attention"] is not None else ""
            line.append(f"{milliseconds(spread(row['seconds']).p50)} ms{share}" if row else "")
        cells.append([title, str(rows[EAGER_CONVIT]["batch"]), *line])
        deit = rows[DEIT]
        slower = [1 / times_faster(deit["seconds"], rows[column]["seconds"]).times for column in ours]
        parameters = rows[REPLACED]["parameters"] / deit["parameters"]
        shares.append([title, *(f"{ratio:.2f}" for ratio in (*slower, parameters))])
    return [
        "## Whole models beside DeiT",
        "",
        "224 x 224 pixels, medians of interleaved calls. In brackets attention's share of the time.",
        _data(f"{name}-models"),
        *(f"{entry['dtype']} was not timed: {entry['reason']}." for entry in measured["not_measured"]),
        "",
        *table(["", "batch", *columns], cells),
        "",
        "Relative to timm's DeiT: times, and the parameters of ConViT. A time is the larger of two ratios: that of the",
        "medians, and the median over pairs of neighbouring calls.",
        "",
        *table(["", *ours, "parameters"], shares),
        "",
    ]


def _units(name: str, measured: dict[str, Any]) -> list[str]:
    """The CPU kernels by instruction set, beside PyTorch's attention of the content and the composite."""
    serving = [f"{unit} ({dtype})" for dtype, unit in measured["serving"].items()]
    peaks = [f"{peak['rate'] / 1e9:.0f} GFLOP/s ({peak['how']})" for peak in measured["peaks"].values()]
    lines = [
        "## CPU kernels by instruction set",
        "",
        f"How many times faster than {label(SDPA)}, which is less work; in brackets the share of the rate of a large",
        f"matrix product in the same dtype, or in float32 where that is faster: {', '.join(peaks)}.",
        "The arithmetic that is counted is two matrix products forward and five backward.",
        f"{units.VARIABLE} chooses a set; without it serve {', '.join(serving)}.",
        _data(f"{name}-units"),
        "",
    ]
    for (dtype, backward), group in groupby(measured["rows"], lambda row: (row["dtype"], row["backward"])):
        rows = list(group)
        # a processor without products of bfloat16 does them in float32, and torch.mm slower than by hand
        peak = max(measured["peaks"][each]["rate"] for each in (dtype, "float32") if each in measured["peaks"])
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        cells = []
        for shape, same in groupby(rows, lambda row: [row[key] for key in ("images", "heads", "side", "head_dim")]):
            by_name = {row["implementation"]: row for row in same}
            images, heads, side, head_dim = shape
            line = [f"{images}, {heads}, {side}x{side}, {head_dim}"]
            for unit in names:
                row, alone = by_name[unit], by_name[SDPA]
                share = units.rate(row) / peak
                time = f"{milliseconds(spread(row['seconds']).p50)} ms"
                faster = f"{times_faster(alone['seconds'], row['seconds']).times:.2f}"
                line.append(f"{time if unit == SDPA else faster} ({share:.0%})")
            cells.append(line)
        headings = [label(unit) if unit == SDPA else unit for unit in names]
        lines += [
            f"**{MODES[backward]}, {dtype}**",
            "",
            *table(["images, heads, grid, head_dim", *headings], cells),
            "",
        ]
    return lines


def _host(name: str, measured: dict[str, Any]) -> list[str]:
    """The host's time of a call, ours beside eager's."""
    return [
        "## The host's time of a call",
        "",
        "What Python and PyTorch take, on tensors of next to no work, until the kernels are launched, to a stub. What",
        "CUDA takes for each kernel is missing: eager has 17 forward and 26 backward, ours 2 and 4 or 5.",
        _data(f"{name}-host"),
        "",
        *table(host_time.HEADINGS, host_time.lines(measured["rows"])),
        "",
    ]


def _not_measured(entries: Iterable[NotMeasured]) -> list[str]:
    """What was left out, a line for each reason."""
    by_reason: dict[str, list[NotMeasured]] = {}
    for entry in sorted(entries, key=lambda entry: (place(entry.implementation), entry.reason)):
        by_reason.setdefault(entry.reason, []).append(entry)
    lines = []
    for reason, same in by_reason.items():
        names = dict.fromkeys(label(entry.implementation) for entry in same)
        lines.append(f"- {', '.join(names)}, {len({entry.group for entry in same})} tasks: {reason}.")
    return ["## Not measured", "", *lines, ""] if lines else []


def _every_row(results: Results) -> list[str]:
    ratios = speed_ups(results.rows)
    lines = [
        "## Every row",
        "",
        "Error: the largest against float64, and what is allowed. Of peak: the share of the rate of a large matrix",
        "product or of a large copy, whichever is nearer.",
        "",
        *filter(None, [footnote(ratios.values())]),
    ]
    headings = ["implementation", "times faster", "ms (p20 to p80)", "error of allowed", "peak MB", "of peak"]
    for group, rows in by_group(results.rows).items():
        cells = [_cells(row, ratios.get(row.key)) for row in sorted(rows, key=lambda row: place(row.implementation))]
        lines += ["", f"**{group}**", "", *table(headings, cells)]
    return lines


def _cells(row: Row, ratio: SpeedUp | None) -> list[str]:
    p20, p50, p80 = map(milliseconds, row.time)
    error = "" if row.error is None else f"{row.error:.0e} of {row.allowed_error:.0e}"
    times = "" if ratio is None else f"**{ratio}**"
    memory, share = f"{row.peak_memory / 1e6:.1f}", f"{row.share_of_peak:.0%}"
    return [label(row.implementation), times, f"{p50} ({p20} to {p80})", error, memory, share]


def index_page(all_runs: Iterable[Run]) -> str:
    """The list of runs."""
    rows = []
    for run in all_runs:
        parts = {"speed-ups": run.results, "growth": run.growth, "whole models beside DeiT": run.models}
        parts |= {"CPU kernels by instruction set": run.units, "the host's time": run.host}
        holds = ", ".join(part for part, content in parts.items() if content)
        rows.append([f"[{_title(run)}](results-{run.name}.md)", run.date, holds])
    lines = [
        "# Results",
        "",
        GENERATED,
        "",
        "One page for each machine and commit. [How it is measured](method.md);",
        "[what the Triton kernels compile to](machine-code.md).",
        "",
        *table(["run", "date", "holds"], rows, named=3),
    ]
    return "\n".join(lines) + "\n"


def machine_code_page(budget: Mapping[str, Any]) -> str:
    """The kernels' registers, memory and instructions, from the budget's file."""
    kernels = []
    for name, entry in budget["paper"].items():
        target, pass_name = name.split("/")
        for kernel in entry["kernels"]:
            issued = sum(kernel["issued"].values()) if kernel["issued"] else None
            kernels.append(
                [
                    target,
                    pass_name,
                    f"`{kernel['kernel']}`",
                    "x".join(map(str, kernel["tile"])),
                    *(str(kernel[field]) for field in ("warps", "registers", "spill_bytes")),
                    f"{kernel['shared'] / 1024:.1f}",
                    str(kernel["occupancy"]),
                    "" if issued is None else str(issued),
                ]
            )
    ratios = {name: entry["ratio"] for name, entry in budget["paper"].items() if entry["ratio"] is not None}
    targets = list(dict.fromkeys(name.split("/")[0] for name in budget["paper"]))
    compared = [
        [target, *(f"{ratios[f'{target}/{pass_name}']:.2f}" for pass_name in ("forward", "backward"))]
        for target in targets
        if f"{target}/forward" in ratios
    ]
    matrix = []
    for target in dict.fromkeys(name.split("/")[0] for name in budget["matrix"]):
        cases = [entry for name, entry in budget["matrix"].items() if name.split("/")[0] == target]
        used = [numbers for case in cases for numbers in case.values()]
        registers, spilled, shared, warps = zip(*used, strict=True)
        cells = (len(cases), len(used), max(registers), max(spilled), f"{max(shared) / 1024:.1f}", min(warps))
        matrix.append([target, *map(str, cells)])
    headings = ["target", "pass", "kernel", "tile", "warps", "registers", "spilled bytes", "shared KiB", "warps/SM"]
    lines = [
        "# Machine code of the Triton kernels",
        "",
        GENERATED,
        "",
        f"What Triton {budget['triton']} makes of the kernels for each target: compiled without that GPU, never run.",
        "Such counts say nothing of latencies, caches or stalls: they are a budget that tests hold, not a speed.",
        f"The data: `{BUDGET.relative_to(ROOT).as_posix()}`.",
        "",
        "## A training step at the paper's size",
        "",
        "14x14 patches, head_dim 48, bfloat16. On AMD's targets (gfx) instructions are not counted.",
        "",
        *table([*headings, "instructions/warp"], kernels, named=3),
        "",
        "Instructions of all kernels of a pass, relative to flash attention of the content alone in the same tiles:",
        "",
        *table(["target", "forward", "backward"], compared),
        "",
        "## Every configuration that can be chosen",
        "",
        "By target: each dtype, head_dim, regime of positions and pass. Fewest warps an SM: 0 would be a kernel that",
        "cannot be launched.",
        "",
        *table(
            [
                "target",
                "cases",
                "kernels",
                "most registers",
                "most spilled bytes",
                "most shared KiB",
                "fewest warps/SM",
            ],
            matrix,
        ),
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every generated page of docs/benchmarks, by file name."""
    all_runs = runs()
    texts = {f"results-{run.name}.md": results_page(run) for run in all_runs}
    budget = machine_code_page(json.loads(BUDGET.read_text()))
    return texts | {"index.md": index_page(all_runs), "machine-code.md": budget}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="from now on the README's table is of this file")
    parser.add_argument("--path", action="store_true", help="only print where this machine's results belong")
    options = parser.parse_args()
    if options.path:
        print(new_results().relative_to(ROOT))
        return
    source = options.results.resolve().relative_to(ROOT).as_posix() if options.results else ""
    text = readme(README.read_text(), source)
    for run in runs():
        for results, names in ((run.results, ("speed-up",)), (run.growth, ("growth-tokens", "growth-batch"))):
            if results:
                write_figures(results, PAGES / run.name, ("svg",), names)
    for name, page in pages().items():
        (PAGES / name).write_text(page)
    README.write_text(text)


if __name__ == "__main__":
    main()
