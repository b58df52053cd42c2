"""``python -m benchmarks``: the standard run, reports of results, comparisons of two runs."""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from convmixer_fast.benchmarks.compare import changes, compare_summary, compare_table
from convmixer_fast.benchmarks.harness import Settings
from convmixer_fast.benchmarks.plots import save_pictures
from convmixer_fast.benchmarks.report import write_report
from convmixer_fast.benchmarks.results import ResultFile, read_folder
from convmixer_fast.benchmarks.runs import (
    DeviceOption,
    DtypesOption,
    FreshOption,
    OutputOption,
    ProvidersOption,
    Run,
    SecondsOption,
    chosen_dtypes,
    default_device,
    default_output,
)
from convmixer_fast.benchmarks.standard import standard_cases
from convmixer_fast.benchmarks.tables import case_tables, summary_table, wide_console
from convmixer_fast.errors import ConvMixerFastError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="A folder of results, or one JSON file.")]


@app.command()
def standard(
    minutes: Annotated[float, typer.Option(help="After which no further case is begun.")] = 13.5,
    dtypes: DtypesOption = "auto",
    providers: ProvidersOption = None,
    device: DeviceOption = "auto",
    seconds: SecondsOption = 12.0,
    output: OutputOption = None,
    fresh: FreshOption = False,
) -> None:
    """Measure models and ops in order of worth; then draw pictures and a report."""
    deadline = time.monotonic() + 60 * minutes
    where = default_device(device)
    folder = output or default_output(where)
    run = Run(where, folder, Settings(seconds, deadline=deadline), fresh)
    cases = [
        case for dtype in chosen_dtypes(dtypes, where) for case in standard_cases(where, dtype)
    ]
    _show(run.execute("results", cases, providers), folder)


@app.command()
def report(folder: Folder) -> None:
    """Draw the pictures and write the report of results that are there, beside them."""
    results = read_folder(folder)
    console = wide_console()
    for table in case_tables(results.rows):
        console.print(table)
    console.print(summary_table(results.rows))
    _show(results, folder if folder.is_dir() else folder.parent)


@app.command()
def compare(before: Folder, after: Folder) -> None:
    """Print by how much the ratios to the best peer differ between two runs."""
    found = list(changes(read_folder(before).rows, read_folder(after).rows))
    if not found:
        raise ValueError(f"{before} and {after} have no case in common")
    wide_console().print(compare_table(found))
    print(compare_summary(found))


@app.command()
def tune(
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    only: Annotated[str, typer.Option(help="Shapes named so: pointwise, 768 ...")] = "",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Instead of float16.")] = False,
    seconds: Annotated[float, typer.Option(help="Of timing for each shape.")] = 10.0,
) -> None:
    """Time every tile of the Triton kernels on a GPU, and print the rows for their tables."""
    # They need Triton, which not every machine has.
    from convmixer_fast.benchmarks.tune import published_problems, sweep_row, sweep_table, title
    from convmixer_fast.runtime.sweep import sweep

    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device: torch.cuda.is_available() is False")
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    with torch.inference_mode():
        for problem in published_problems("bfloat16" if bfloat16 else "float16"):
            if only not in title(problem, batch):
                continue
            found = sweep(problem, batch, device, seconds)
            wide_console().print(sweep_table(problem, batch, found))
            print(sweep_row(problem, batch, found, name), flush=True)


def _show(results: ResultFile, folder: Path) -> None:
    for path in save_pictures(results, folder):
        print(path)
    write_report(results, folder / "report.html")
    print(folder / "report.html")


if __name__ == "__main__":
    try:
        app()
    except (ConvMixerFastError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
