"""ConViT against its DeiT twin with few training images, and what each part of the ConViT adds.

    python examples/sample_efficiency.py --quick
    python examples/sample_efficiency.py --output runs/sample_efficiency

A run that has ended is not repeated; one that was killed goes on from its last checkpoint. To publish a study:

    python examples/sample_efficiency.py --from runs/sample_efficiency --output docs/sample_efficiency \\
        --page docs/study.md
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from rich.markdown import Markdown
from training.data import FASHION_MNIST
from training.files import write_atomically
from training.report import place_for_tables, report, write_figures, write_page
from training.study import QUICK, RESULTS, Study, carry_out, curves_of, prepare, read_results, write_results
from training.terminal import console, failures, wrong_input
from typer import Option, Typer

TABLES = "tables.md"

app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="ConViT, its DeiT twin and a CNN with few images, and the ablation of the paper's Table 3.")
def main(
    data: Annotated[Path, Option(help="Folder of Fashion-MNIST's IDX files.")] = FASHION_MNIST,
    output: Annotated[
        Path | None, Option(help="Folder for results; runs/sample_efficiency, or -quick beside it.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="One seed, two shares, fewer steps: ten minutes.")] = False,
    seeds: Annotated[int | None, Option(min=1, help="Runs of each kind.")] = None,
    steps: Annotated[int | None, Option(min=20, help="Steps of every run.")] = None,
    jobs: Annotated[int, Option(min=1, help="Runs side by side; each has its share of the processor's cores.")] = 2,
    results_folder: Annotated[
        Path | None, Option("--from", help="Train nothing: tables and figures of this folder's results.")
    ] = None,
    page: Annotated[
        Path | None, Option(help="A page for the tables, between its markers; else tables.md in --output.")
    ] = None,
) -> None:
    study = QUICK if quick else Study()
    study = dataclasses.replace(study, seeds=seeds or study.seeds, steps=steps or study.steps)
    output = output or Path("runs") / ("sample_efficiency-quick" if quick else "sample_efficiency")
    with failures():
        with wrong_input():
            if page is not None:
                place_for_tables(page)
            if results_folder is not None:
                results, curves = read_results(results_folder)
            else:
                prepare(study, data, output)
        if results_folder is None:
            results = carry_out(study, output, jobs)
            curves = curves_of(results, output)
        output.mkdir(parents=True, exist_ok=True)
        write_results(results, curves, output)
        write_figures(results, curves, output)
        text = report(study, results, curves)
        if page is None:
            write_atomically(output / TABLES, lambda temporary: temporary.write_text(text))
        else:
            write_page(page, text)
    console.print(Markdown(text))
    console.print(
        f"{RESULTS} and figures in {output}, tables in {page or output / TABLES}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    app()
