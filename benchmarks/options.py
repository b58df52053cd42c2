"""The options that the benchmarks' commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from convmixer_fast.choices import DTYPES, Device, Precision, listed
from convmixer_fast.support.option_groups import completed

__all__ = ["Batches", "Kept", "Measured", "batch_sizes"]

_AUTO_OR = Literal["auto", Precision]

Batches = Annotated[
    str, typer.Option("--batches", "--batch", help="Comma-separated numbers of images.")
]


@dataclass(frozen=True)
class Measured:
    """What is measured, where and for how long."""

    dtypes: Annotated[
        str,
        typer.Option(
            "--dtypes",
            "--dtype",
            help="Comma-separated: float32, float16, bfloat16, int8 (of whole models, on a CPU); "
            "auto: float16 on a GPU.",
            autocompletion=completed(_AUTO_OR),
        ),
    ] = "auto"
    providers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, or all; by default all that do not take minutes to build."
        ),
    ] = None
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = "auto"
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Of timing for each case, all providers together.")
    ] = 20.0

    @property
    def where(self) -> torch.device:
        """The device that ``--device`` names."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)

    def precisions(self) -> list[str]:
        """Return what ``--dtypes`` names: names of dtypes, and int8.

        Raises:
            ValueError: a name is unknown.
        """
        automatic = "float16" if self.where.type == "cuda" else "float32"
        names = listed("dtypes", self.dtypes, _AUTO_OR)
        return [automatic if name == "auto" else name for name in names]

    def chosen_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that ``--dtypes`` names.

        Raises:
            ValueError: a name is unknown, or int8.
        """
        names = self.precisions()
        if "int8" in names:
            raise ValueError("int8 is of whole models: convmixer-fast bench MODEL --dtype int8")
        return [DTYPES[name] for name in names]


@dataclass(frozen=True)
class Kept:
    """Where results are kept."""

    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; by default named by device and date."),
    ] = None
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Replace the results there instead of going on with them."),
    ] = False


def batch_sizes(text: str) -> list[int]:
    """Return the numbers that ``--batches`` names.

    Raises:
        ValueError: one is no number above 0.
    """
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batches must be numbers above 0 like 1,8, got {text!r}")
    return [int(part) for part in parts]
