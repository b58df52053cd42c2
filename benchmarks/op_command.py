"""The command line that the micro-benchmarks of the ops share."""

from collections.abc import Callable, Iterable

import torch
import typer

from convmixer_fast.benchmarks.options import Batches, Kept, Measured, batch_sizes
from convmixer_fast.benchmarks.runs import Run
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.support.option_groups import takes

__all__ = ["op_command"]


def op_command(op: str, cases: Callable[[int, torch.dtype], Iterable[Case]]) -> None:
    """Run the command line of one op's benchmark.

    Args:
        op: names the files of the results.
        cases: the sweep for a number of images and a dtype.
    """

    @takes(Measured, seconds=5.0)
    @takes(Kept)
    def main(measured: Measured, kept: Kept, batches: Batches = "1,8") -> None:
        sweep = [
            case
            for dtype in measured.chosen_dtypes()
            for batch in batch_sizes(batches)
            for case in cases(batch, dtype)
        ]
        Run.from_options(measured, kept).execute(op, sweep, measured.providers)

    main.__doc__ = f"Time {op} with every provider, over a sweep of shapes."
    typer.run(main)
