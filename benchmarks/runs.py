"""What every command of the benchmarks does: open the results, measure, print."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from convmixer_fast.benchmarks import tables
from convmixer_fast.benchmarks.ceilings import measure_ceilings
from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.harness import Settings, run_cases
from convmixer_fast.benchmarks.options import Kept, Measured
from convmixer_fast.benchmarks.providers import choose
from convmixer_fast.benchmarks.results import ResultFile
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.support.progress import bars

__all__ = ["Run"]


@dataclass
class Run:
    """Where a run goes and how long it takes.

    Args:
        device: on which everything runs.
        output: the folder of the results; None keeps none.
        settings: of the timing.
        fresh: whether results that are there are replaced.
        ceiling_seconds: of measuring each ceiling of the roofline.
        console: to which tables go; progress goes to standard error.
    """

    device: torch.device
    output: Path | None
    settings: Settings
    fresh: bool = False
    ceiling_seconds: float = 2.0
    console: Console | None = None

    @classmethod
    def from_options(cls, measured: Measured, kept: Kept, deadline: float | None = None) -> Self:
        """Return the run that a command's options ask for, by default into benchmarks/results."""
        where = measured.where
        named = Path("benchmarks") / "results" / environment(where).slug()
        settings = Settings(measured.seconds, deadline=deadline)
        return cls(where, kept.output or named, settings, kept.fresh)

    def execute(
        self, stem: str, cases: Sequence[Case], providers: str | None = None, *, quiet: bool = False
    ) -> ResultFile:
        """Measure ``cases`` into the files ``stem``.json and .csv, then print them.

        Args:
            stem: of the file names.
            cases: in order of worth.
            providers: as :func:`providers.choose` takes them.
            quiet: whether the summary alone is printed.
        """
        console = self.console or tables.wide_console()
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        chosen, absent = choose(providers, self.device, dtypes)
        results = ResultFile.open(
            None if self.output is None else self.output / f"{stem}.json",
            environment(self.device),
            lambda: measure_ceilings(self.device, dtypes, seconds=self.ceiling_seconds),
            fresh=self.fresh,
        )
        results.absent = absent
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        errors = Console(stderr=True)
        with bars(errors, *columns, TimeElapsedColumn()) as progress:
            run_cases(cases, chosen, self.device, results, self.settings, progress)
        results.write()
        self.show(results, console, quiet=quiet)
        return results

    def show(self, results: ResultFile, console: Console, *, quiet: bool) -> None:
        """Print what was found."""
        if not quiet:
            for table in tables.case_tables(results.rows):
                console.print(table)
        console.print(tables.summary_table(results.rows))
        for row in results.rows:
            if row.status != "ok":
                where = f"{row.provider}, {row.bench}, {row.case}, {row.dtype}"
                console.print(
                    f"{row.status}: {where}: {row.note}",
                    style="bold red" if row.status == "wrong" else "yellow",
                    markup=False,
                )
        for why in dict.fromkeys(results.absent.values()):
            names = ", ".join(name for name in results.absent if results.absent[name] == why)
            console.print(f"not here: {names}: {why}", style="dim", markup=False)
        rates = ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s {dtype}"
            for dtype, rate in results.ceilings.flop_per_s.items()
        )
        console.print(
            f"roofline: copy {results.ceilings.bytes_per_s / 1e9:.4g} GB/s, product {rates}\n"
            f"{results.environment.summary()}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
