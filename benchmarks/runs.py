"""What every command of the benchmarks does: open the results, measure, print."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from convmixer_fast.benchmarks import tables
from convmixer_fast.benchmarks.ceilings import measure_ceilings
from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.harness import Settings, run_cases
from convmixer_fast.benchmarks.providers import choose
from convmixer_fast.benchmarks.results import ResultFile
from convmixer_fast.benchmarks.subjects import Case

__all__ = [
    "DTYPES",
    "BatchesOption",
    "DeviceOption",
    "DtypesOption",
    "FreshOption",
    "OutputOption",
    "ProvidersOption",
    "Run",
    "SecondsOption",
    "batch_sizes",
    "chosen_dtypes",
    "default_device",
    "default_output",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

DeviceOption = Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU if there is one.")]
DtypesOption = Annotated[
    str, typer.Option(help="Comma-separated: float32, float16, bfloat16; auto: what suits.")
]
BatchesOption = Annotated[str, typer.Option(help="Comma-separated numbers of images.")]
ProvidersOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated, or all; by default all that do not take minutes to build."),
]
SecondsOption = Annotated[
    float, typer.Option(min=0.0, help="Of timing for each case, all providers together.")
]
OutputOption = Annotated[
    Path | None, typer.Option(help="Folder of the results; by default named by device and date.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Replace the results there instead of going on with them.")
]


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
        with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True) as progress:
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
        for name, why in results.absent.items():
            console.print(f"not here: {name}: {why}", style="dim", markup=False)
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


def default_device(name: str) -> torch.device:
    """Return the device that ``--device`` names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def default_output(device: torch.device) -> Path:
    """Return ``benchmarks/results/<device>-<date>`` in the current folder."""
    return Path("benchmarks") / "results" / environment(device).slug()


def chosen_dtypes(names: str, device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that ``--dtypes`` names.

    Raises:
        ValueError: a name is unknown.
    """
    if names == "auto":
        return [torch.float16 if device.type == "cuda" else torch.float32]
    for name in names.split(","):
        if name not in DTYPES:
            raise ValueError(f"dtypes must be of {', '.join(DTYPES)}, got {name!r}")
    return [DTYPES[name] for name in names.split(",")]


def batch_sizes(text: str) -> list[int]:
    """Return the numbers that ``--batches`` names.

    Raises:
        ValueError: one is no number above 0.
    """
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batches must be numbers above 0 like 1,8, got {text!r}")
    return [int(part) for part in parts]
