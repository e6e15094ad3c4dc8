"""A profile as tables for the terminal, and their rows, which its page shows too."""

from collections.abc import Iterator, Mapping

from rich.box import SIMPLE
from rich.table import Table

from .compare import MEANING
from .implementations import label
from .measure import is_cuda, milliseconds, spread
from .phases import PHASES
from .profile import Profile, Share


def operator_name(name: str) -> str:
    """An operator's name for a reader: without PyTorch's namespace, without a compiled graph's hash."""
    return "compiled graph" if "CompiledFxGraph" in name else name.removeprefix("aten::")


def phase_lines(profiled: Profile) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Each phase that anybody has, with a line for each implementation, whose numbers are those of `headings`."""
    cuda = is_cuda(profiled.task.device)
    for phase in PHASES:
        lines = []
        for one in profiled.implementations:
            share = one.phases.get(phase)
            if share is None:
                continue
            percent = f"{share.seconds / one.total:.0%}" if one.total else ""
            numbers = [milliseconds(share.seconds), percent, f"{share.memory / 1e6:.1f}", str(share.calls)]
            lines.append((one.name, numbers + [str(share.launches)] * cuda))
        if lines:
            yield phase, lines


def top_operators(profiled: Profile, most: int = 4) -> Mapping[str, Mapping[str, list[tuple[str, Share]]]]:
    """The operators that take most time, by phase and implementation."""
    return {
        phase: {
            one.name: sorted(one.operators.get(phase, {}).items(), key=lambda item: -item[1].seconds)[:most]
            for one in profiled.implementations
        }
        for phase in PHASES
        if any(phase in one.operators for one in profiled.implementations)
    }


def headings(profiled: Profile) -> list[str]:
    """Of the numbers of a phase; a CPU has no kernels to launch."""
    return ["ms", "share", "MB", "calls"] + ["launches"] * is_cuda(profiled.task.device)


def tables(profiled: Profile) -> list[Table | str]:
    """Totals, phases and operators, implementations side by side."""
    totals = Table(
        title=f"[bold]{profiled.task}[/bold]", title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    totals.add_column("implementation", no_wrap=True)
    for heading in ("faster", "ms (p20-p80)", "peak MB", "GFLOP/s", "error / allowed"):
        totals.add_column(heading, justify="right", no_wrap=True)
    for one in profiled.implementations:
        p20, p50, p80 = spread(one.seconds)
        times = f"{milliseconds(p50)} ({milliseconds(p20)}-{milliseconds(p80)})"
        totals.add_row(
            one.title,
            "" if one.eager_ratio is None else f"[bold]{one.eager_ratio:.2f}[/bold]",
            times,
            f"{one.peak_memory / 1e6:.1f}",
            f"{profiled.task.flops() / p50 / 1e9:.1f}",
            "" if one.accuracy is None else f"{one.accuracy.error:.1e} / {one.accuracy.allowed:.1e}",
        )
    phases = Table(title="[bold]Phases[/bold]", title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("phase", "implementation"):
        phases.add_column(heading, no_wrap=True)
    for heading in headings(profiled):
        phases.add_column(heading, justify="right", no_wrap=True)
    for phase, lines in phase_lines(profiled):
        for place, (name, numbers) in enumerate(lines):
            last = place == len(lines) - 1
            phases.add_row("" if place else phase, label(name), *numbers, end_section=last)
    operators = Table(title="[bold]Operators, ms[/bold]", title_justify="left", box=SIMPLE, pad_edge=False)
    operators.add_column("phase", no_wrap=True)
    for one in profiled.implementations:
        operators.add_column(one.title)
    for phase, by_name in top_operators(profiled).items():
        cells = [
            "\n".join(
                f"{operator_name(operator)} {milliseconds(share.seconds)}" for operator, share in by_name[one.name]
            )
            for one in profiled.implementations
        ]
        operators.add_row(phase, *cells, end_section=True)
    clock = "the GPU's" if is_cuda(profiled.task.device) else "the operators' own, on the CPU"
    parts: list[Table | str] = [totals, phases]
    parts.append("\n".join(f"{phase}: {PHASES[phase]}" for phase, _ in phase_lines(profiled)))
    parts.append(operators)
    parts.append(
        f"Faster: {MEANING}. Times in the phases are {clock}, in one profiled call; the first table's are of calls "
        "without the profiler, interleaved. MB: allocated in the phase, whether or not given back there."
    )
    if is_cuda(profiled.task.device):
        kernels = Table(title="[bold]GPU kernels[/bold]", title_justify="left", box=SIMPLE, pad_edge=False)
        for heading in ("kernel", "implementation", "launches", "ms"):
            kernels.add_column(heading)
        for one in profiled.implementations:
            for kernel, share in sorted(one.kernels.items(), key=lambda item: -item[1].seconds):
                kernels.add_row(kernel, one.title, str(share.launches), milliseconds(share.seconds))
        parts.append(kernels)
    parts += [*profiled.warnings, profiled.where]
    return parts
