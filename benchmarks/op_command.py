"""The command line that the micro-benchmarks of the ops share."""

from collections.abc import Callable, Iterable

import torch
import typer

from convmixer_fast.benchmarks.harness import Settings
from convmixer_fast.benchmarks.runs import (
    BatchesOption,
    DeviceOption,
    DtypesOption,
    FreshOption,
    OutputOption,
    ProvidersOption,
    Run,
    SecondsOption,
    batch_sizes,
    chosen_dtypes,
    default_device,
    default_output,
)
from convmixer_fast.benchmarks.subjects import Case

__all__ = ["op_command"]


def op_command(op: str, cases: Callable[[int, torch.dtype], Iterable[Case]]) -> None:
    """Run the command line of one op's benchmark.

    Args:
        op: names the files of the results.
        cases: the sweep for a number of images and a dtype.
    """

    def main(
        batches: BatchesOption = "1,8",
        dtypes: DtypesOption = "auto",
        providers: ProvidersOption = None,
        device: DeviceOption = "auto",
        seconds: SecondsOption = 5.0,
        output: OutputOption = None,
        fresh: FreshOption = False,
    ) -> None:
        where = default_device(device)
        run = Run(where, output or default_output(where), Settings(seconds), fresh)
        sweep = [
            case
            for dtype in chosen_dtypes(dtypes, where)
            for batch in batch_sizes(batches)
            for case in cases(batch, dtype)
        ]
        run.execute(op, sweep, providers)

    main.__doc__ = f"Time {op} with every provider, over a sweep of shapes."
    typer.run(main)
