"""Rewrites the README's performance section from a file of results, so that its figures cannot drift from it.

python benchmarks/readme.py [RESULTS.json]          default: the file that the section names

A sweep's results beside it, RESULTS-growth.json, give the part on growth.
"""

import sys
from pathlib import Path

from sections import ROOT, Section
from tasks import SWEEP_MODEL, SWEEP_SIDES_BATCH

from convit_kernels.bench.contenders import ARCHITECTURES, EAGER, FLOOR, MODES, PARTS, label
from convit_kernels.bench.measure import milliseconds
from convit_kernels.bench.report import FIGURES, Results, Row, by_group, describe, load, place, write_figures

SECTION = Section("performance")


def _cells(row: Row) -> list[str]:
    p20, p50, p80 = map(milliseconds, row.time)
    error = "" if row.error is None else f"{row.error:.0e} of {row.allowed_error:.0e}"
    ratio = "" if row.ratio is None else f"**{row.ratio:.2f}**"
    return [ratio, f"{p50} ({p20} to {p80})", error, f"{row.peak_memory / 1e6:.1f}", f"{row.share_of_peak:.0%}"]


def _ours(rows: list[Row]) -> list[Row]:
    return [row for row in rows if label(row.contender).startswith("ours")]


def _best(rows: list[Row]) -> Row | None:
    """That of our backends which is the furthest from eager."""
    return max((row for row in _ours(rows) if row.ratio is not None), key=lambda row: row.ratio or 0.0, default=None)


def _summary(results: Results) -> list[str]:
    """A table of the best ratio: a line a task, a column a size."""
    groups = by_group(row for row in results.rows if row.tokens == 196)
    best: dict[tuple[str, bool, str], Row] = {}
    for rows in groups.values():
        found = _best(rows)
        if found is not None:  # of the sweep's batches the default set's, which comes first
            best.setdefault((found.part, found.backward, found.model), found)
    models = [model for model in ARCHITECTURES if any(key[2] == model for key in best)]
    lines = [
        "| times faster than eager timm | " + " | ".join(ARCHITECTURES[model].title[7:] for model in models) + " |",
        "| --- |" + " ---: |" * len(models),
    ]
    for part, title in PARTS.items():
        for backward in (False, True):
            rows = [best.get((part, backward, model)) for model in models]
            if any(rows):
                cells = [f"{row.ratio:.2f}" if row else "" for row in rows]
                lines.append(f"| {title}, {MODES[backward]} | " + " | ".join(cells) + " |")
    return lines


def _details(results: Results) -> list[str]:
    lines = []
    for group, rows in by_group(results.rows).items():
        lines += [
            f"**{group}**",
            "",
            "| contender | times faster | ms (p20 to p80) | error of allowed | peak MB | of peak |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in sorted(rows, key=lambda row: place(row.contender)):
            lines.append(f"| {label(row.contender)} | " + " | ".join(_cells(row)) + " |")
        lines.append("")
    return lines


def growth_file(path: Path) -> Path:
    """Where a sweep's results belong, beside those of the default set."""
    return path.with_name(f"{path.stem}-growth.json")


def _growth(results: Results, source: str) -> list[str]:
    """Time and memory by grid: eager's beside those of our fastest backend."""
    lost = {entry.group for entry in results.not_measured if entry.contender == EAGER}
    figures = Path(source).with_suffix("")
    lines = [
        f"**Growth with the image**: {ARCHITECTURES[SWEEP_MODEL].title}, batch {SWEEP_SIDES_BATCH},",
        f"measured on {describe(results.machine)}; [all of it]({source}).",
        "",
        "| | tokens | eager, ms | ours, ms | eager, peak MB | ours, peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = by_group(row for row in results.rows if row.batch == SWEEP_SIDES_BATCH)
    for group, rows in sorted(groups.items(), key=lambda entry: (entry[1][0].backward, entry[1][0].tokens)):
        eager = next((row for row in rows if row.contender == EAGER), None)
        ours = min(_ours(rows), key=lambda row: row.time.p50, default=None)  # eager may not fit: no ratio
        if ours is None or (eager is None and group not in lost):
            continue
        cells = [str(ours.tokens)]
        cells += ["out of memory" if row is None else milliseconds(row.time.p50) for row in (eager, ours)]
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
    control = [row.ratio for row in results.rows if row.contender == EAGER and row.ratio is not None]
    measured_gpu = any(row.device.startswith("cuda") for row in results.rows)
    reasons = {entry.reason for entry in results.not_measured}
    lines = [
        SECTION.begin.format(source=source),
        f"Measured on {describe(results.machine)}; [all of it]({source}), {len(results.rows)} rows. Times faster than",
        "eager timm: medians over pairs of neighbouring runs, our fastest backend, 14x14 patches. A group is timed",
        "only when all of its results are right: an error against float64 of at most twice eager's, plus a few",
        "roundings.",
        "",
        *_summary(results),
        "",
        f"![Times faster than eager timm, by model and contender]({Path(source).with_suffix('') / 'speed-up.svg'})",
        "",
    ]
    if control:
        loads = [row.machine["load_1_minute"] for row in results.rows if row.machine["load_1_minute"] is not None]
        busy = f", at a load of {min(loads):g} to {max(loads):g} on {results.machine['cores']} cores" if loads else ""
        lines.append("Noise: eager against itself, measured in the same way, comes out at")
        lines.append(f"{min(control):.2f} to {max(control):.2f} times{busy}.")
    if any(row.contender == FLOOR for row in results.rows):
        lines.append(f"{label(FLOOR)}: PyTorch's fused attention without position, which is less work.")
    lines.append("")
    if growth is not None:
        lines += _growth(growth, growth_file(Path(source)).as_posix())
    if not measured_gpu:
        lines.append("**Not measured: any GPU.** None was at hand; nothing here says how fast the Triton kernels are.")
    lines += [f"Not measured either: {reason}." for reason in sorted(reasons)]
    lines += ["", "<details><summary>Every row</summary>", "", *_details(results), "</details>", "", SECTION.end]
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
