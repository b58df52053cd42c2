"""``python -m benchmarks``: the standard run, reports of results, comparisons of two runs."""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from convmixer_fast.benchmarks.compare import changes, compare_summary, compare_table
from convmixer_fast.benchmarks.options import Kept, Measured
from convmixer_fast.benchmarks.plots import save_pictures
from convmixer_fast.benchmarks.report import write_report
from convmixer_fast.benchmarks.results import ResultFile, read_folder
from convmixer_fast.benchmarks.runs import Run
from convmixer_fast.benchmarks.standard import standard_cases
from convmixer_fast.benchmarks.tables import case_tables, summary_table, wide_console
from convmixer_fast.errors import ConvMixerFastError
from convmixer_fast.support.option_groups import takes
from convmixer_fast.support.optional import need

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="A folder of results, or one JSON file.")]


@app.command()
@takes(Measured, seconds=12.0)
@takes(Kept)
def standard(
    measured: Measured,
    kept: Kept,
    minutes: Annotated[float, typer.Option(help="After which no further case is begun.")] = 13.5,
) -> None:
    """Measure models and ops in order of worth; then draw pictures and a report."""
    need("matplotlib.figure", "the standard run's report", "bench")  # before minutes of measuring
    run = Run.from_options(measured, kept, deadline=time.monotonic() + 60 * minutes)
    cases = [
        case for dtype in measured.chosen_dtypes() for case in standard_cases(measured.where, dtype)
    ]
    assert run.output is not None
    _show(run.execute("results", cases, measured.providers), run.output)


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
    output: Annotated[Path, typer.Option(help="Folder of the results; begun again, it goes on.")],
    only: Annotated[str, typer.Option(help="Batches named so: pointwise, 768 ...")] = "",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Instead of float16.")] = False,
    seconds: Annotated[float, typer.Option(help="For everything.")] = 175.0,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Without a GPU, tiny.")] = False,
) -> None:
    """Time every tile of the Triton kernels on a GPU, and print the rows for their tables."""
    from convmixer_fast.benchmarks.gpu.plan import sweep_steps
    from convmixer_fast.benchmarks.gpu.session import Session

    if not torch.cuda.is_available() and not rehearse:
        raise ValueError("tune needs a CUDA device: torch.cuda.is_available() is False")
    output.mkdir(parents=True, exist_ok=True)
    steps = sweep_steps("bfloat16" if bfloat16 else "float16", only)
    raise typer.Exit(Session(output.resolve(), seconds, rehearse).run(steps))


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
