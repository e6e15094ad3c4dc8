"""ConViT against its DeiT twin with few training images, and what each part of the ConViT adds.

    python examples/sample_efficiency.py --quick
    python examples/sample_efficiency.py --output runs/sample_efficiency

A run that has ended is not repeated; one that was killed goes on from its last checkpoint. To publish a study:

    python examples/sample_efficiency.py --from runs/sample_efficiency/results.csv \\
        --output docs/sample_efficiency --page docs/study.md
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from rich.markdown import Markdown
from training.data import FASHION_MNIST
from training.files import write_atomically
from training.study import (
    FIGURE,
    QUICK,
    RESULTS,
    TABLES,
    Study,
    check,
    place_for_tables,
    read_results,
    report,
    run_all,
    run_options,
    runs,
    write_page,
    write_results,
)
from training.terminal import console, failures, wrong_input
from typer import Option, Typer

app = Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="ConViT against its DeiT twin with few images, and the ablation of the paper's Table 3.")
def main(
    data: Annotated[Path, Option(help="Folder of Fashion-MNIST's IDX files.")] = FASHION_MNIST,
    output: Annotated[
        Path | None, Option(help="Folder for results; runs/sample_efficiency, or -quick beside it.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="One seed, three shares, fewer steps: ten minutes.")] = False,
    seeds: Annotated[int | None, Option(min=1, help="Runs of each kind.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Steps of every run.")] = None,
    jobs: Annotated[int, Option(min=1, help="Runs side by side; each has its share of the processor's cores.")] = 2,
    results_file: Annotated[
        Path | None, Option("--from", help="Train nothing: tables and figure of this results.csv.")
    ] = None,
    page: Annotated[
        Path | None, Option(help="A page for the tables, between its markers; else tables.md in --output.")
    ] = None,
) -> None:
    study = QUICK if quick else Study()
    study = dataclasses.replace(study, seeds=seeds or study.seeds, steps=steps or study.steps)
    output = output or Path("runs") / ("sample_efficiency-quick" if quick else "sample_efficiency")
    with failures():
        if page is not None:
            with wrong_input():
                place_for_tables(page)
        if results_file is not None:
            with wrong_input():
                results = read_results(results_file, study)
        else:
            all_options = {run: run_options(run, study, data, output) for run in runs(study)}
            with wrong_input():
                check(all_options)
            results = run_all(all_options, jobs)
        output.mkdir(parents=True, exist_ok=True)
        write_results(results, output)
        text = report(study, results)
        if page is None:
            write_atomically(output / TABLES, lambda temporary: temporary.write_text(text))
        else:
            write_page(page, text)
    console.print(Markdown(text))
    console.print(
        f"{RESULTS} and {FIGURE} in {output}, tables in {page or output / TABLES}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    app()
