"""Rewrites the README's performance section from a file of results, so that its figures cannot drift from it.

python benchmarks/readme.py [RESULTS.json]          default: the file that the section names

A sweep's results beside it, RESULTS-growth.json, give the part on growth.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from sections import ROOT, Section
from tasks import SWEEP_MODEL, SWEEP_SIDES_BATCH

from convit_kernels.bench.compare import MEANING, SpeedUp, footnote, noise_of_run, speed_ups
from convit_kernels.bench.contenders import ARCHITECTURES, EAGER, FLOOR, MODES, PARTS, label, place
from convit_kernels.bench.machine import describe
from convit_kernels.bench.measure import milliseconds
from convit_kernels.bench.report import FIGURES, write_figures
from convit_kernels.bench.results import Results, Row, by_group, load

SECTION = Section("performance")
Ratios = Mapping[tuple[str, str], SpeedUp]


def _cells(row: Row, ratio: SpeedUp | None) -> list[str]:
    p20, p50, p80 = map(milliseconds, row.time)
    error = "" if row.error is None else f"{row.error:.0e} of {row.allowed_error:.0e}"
    times = "" if ratio is None else f"**{ratio}**"
    return [times, f"{p50} ({p20} to {p80})", error, f"{row.peak_memory / 1e6:.1f}", f"{row.share_of_peak:.0%}"]


def _ours(rows: list[Row]) -> list[Row]:
    return [row for row in rows if label(row.contender).startswith("ours")]


def _summary(results: Results, ratios: Ratios) -> list[str]:
    """A table of the best ratio of our backends: a line a task, a column a size; SDPA's below that of the attention."""
    lines_of: dict[str, dict[str, SpeedUp]] = {}
    for rows in by_group(row for row in results.rows if row.tokens == 196 and row.key in ratios).values():
        title = f"{PARTS[rows[0].part]}, {MODES[rows[0].backward]}"
        ours = [ratios[row.key] for row in _ours(rows)]
        floor = [ratios[row.key] for row in rows if row.contender == FLOOR]
        for line, found in ((title, ours), (f"{label(FLOOR)}, {MODES[rows[0].backward]}", floor)):
            if found:  # of the sweep's batches the default set's, which comes first
                best = max(found, key=lambda ratio: ratio.times)
                lines_of.setdefault(line, {}).setdefault(rows[0].model, best)
    models = [model for model in ARCHITECTURES if any(model in line for line in lines_of.values())]
    lines = [
        "| times faster than eager timm | " + " | ".join(ARCHITECTURES[model].title[7:] for model in models) + " |",
        "| --- |" + " ---: |" * len(models),
    ]
    for title, line in lines_of.items():
        lines.append(f"| {title} | " + " | ".join(str(line.get(model, "")) for model in models) + " |")
    note = footnote(ratio for line in lines_of.values() for ratio in line.values())
    return [*lines, "", note] if note else lines


def _details(results: Results, ratios: Ratios) -> list[str]:
    lines = []
    for group, rows in by_group(results.rows).items():
        lines += [
            f"**{group}**",
            "",
            "| contender | times faster | ms (p20 to p80) | error of allowed | peak MB | of peak |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in sorted(rows, key=lambda row: place(row.contender)):
            lines.append(f"| {label(row.contender)} | " + " | ".join(_cells(row, ratios.get(row.key))) + " |")
        lines.append("")
    note = footnote(ratios.values())
    return [*lines, note, ""] if note else lines


def growth_file(path: Path) -> Path:
    """Where a sweep's results belong, beside those of the default set."""
    return path.with_name(f"{path.stem}-growth.json")


def _growth(results: Results, source: str) -> list[str]:
    """Time and memory by grid: eager's beside those of our fastest backend."""
    lost = {entry.group for entry in results.not_measured if entry.contender == EAGER}
    figures = Path(source).with_suffix("")
    lines = [
        f"**Growth with the image**: {ARCHITECTURES[SWEEP_MODEL].title}, batch {SWEEP_SIDES_BATCH},",
        f"measured on {describe(results.machine)}, {results.date}; [all of it]({source}).",
        "",
        f"| | tokens | eager, ms | ours, ms | {label(FLOOR)}, ms | eager, peak MB | ours, peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = by_group(row for row in results.rows if row.batch == SWEEP_SIDES_BATCH)
    for group, rows in sorted(groups.items(), key=lambda entry: (entry[1][0].backward, entry[1][0].tokens)):
        eager, floor = (next((row for row in rows if row.contender == name), None) for name in (EAGER, FLOOR))
        ours = min(_ours(rows), key=lambda row: row.time.p50, default=None)  # eager may not fit: no ratio
        if ours is None or (eager is None and group not in lost):
            continue
        cells = [str(ours.tokens)]
        cells += ["out of memory" if row is None else milliseconds(row.time.p50) for row in (eager, ours)]
        cells.append("" if floor is None else milliseconds(floor.time.p50))
        cells += ["" if row is None else f"{row.peak_memory / 1e6:.1f}" for row in (eager, ours)]
        lines.append(f"| {PARTS[ours.part]}, {MODES[ours.backward]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"![Time and memory against the number of tokens, with fitted exponents]({figures / 'growth-tokens.svg'})",
        "",
        f"The same against the batch: [figure]({figures / 'growth-batch.svg'}).",
        "",
    ]
    return lines


def section(results: Results, source: str, growth: Results | None = None) -> str:
    """The section, markers included, from results and the path of their file beside the README."""
    ratios = speed_ups(results.rows)
    control = [ratio.times for (_, contender), ratio in ratios.items() if contender == EAGER]
    noise = noise_of_run(results.rows)
    measured_gpu = any(row.device.startswith("cuda") for row in results.rows)
    reasons = {entry.reason for entry in results.not_measured}
    lines = [
        SECTION.begin.format(source=source),
        f"Measured on {describe(results.machine)}, {results.date}; [all of it]({source}), {len(results.rows)} rows.",
        f"14x14 patches, our fastest backend; {MEANING}.",
        "A group is timed only when all of its results are right: an error against float64 of at most twice",
        "what rounding gives eager.",
        "",
        *_summary(results, ratios),
        "",
        f"![Times faster than eager timm, by model and contender]({Path(source).with_suffix('') / 'speed-up.svg'})",
        "",
    ]
    if control:
        loads = [row.machine["load_1_minute"] for row in results.rows if row.machine["load_1_minute"] is not None]
        busy = f", at a load of {min(loads):g} to {max(loads):g} on {results.machine['cores']} cores" if loads else ""
        lines.append("Noise: eager against itself, measured in the same way, comes out at")
        lines.append(f"{min(control):.2f} to {max(control):.2f} times{busy}.")
    if noise is not None:
        lines.append(f"A row's median varies by {noise:.1%} (one standard deviation), as eager's repeated ones tell.")
    if any(row.contender == FLOOR for row in results.rows):
        lines.append(f"{label(FLOOR)}: PyTorch's fused attention without position, which is less work.")
    lines.append("")
    if growth is not None:
        lines += _growth(growth, growth_file(Path(source)).as_posix())
    if not measured_gpu:
        lines.append("**Not measured: any GPU.** None was at hand; nothing here says how fast the Triton kernels are.")
    lines += [f"Not measured either: {reason}." for reason in sorted(reasons)]
    lines += ["", "<details><summary>Every row</summary>", "", *_details(results, ratios), "</details>"]
    lines += ["", SECTION.end]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    named = SECTION.source()
    path = Path(arguments[0]).resolve() if arguments else named
    results = load(path)
    source = path.relative_to(ROOT).as_posix()
    write_figures(results, path.with_suffix(""), ("svg",), FIGURES[:1])
    growth = None
    if (swept := growth_file(path)).is_file():
        growth = load(swept)
        write_figures(growth, swept.with_suffix(""), ("svg",), FIGURES[1:])
    SECTION.write(section(results, source, growth))


if __name__ == "__main__":
    main(sys.argv[1:])
