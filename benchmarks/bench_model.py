"""Whole models, end to end: the published ConvMixers, small ones, and how cost grows.

``cases`` are the models that people run, with ViT-B/16 and ResNet-50 of the same PyTorch for
scale; ``growth`` varies one thing at a time: batch, resolution, width, depth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer
from torch import nn

from convmixer_fast.benchmarks.harness import Settings
from convmixer_fast.benchmarks.model_cases import (
    MODELS,
    SCALE,
    convmixer_case,
    named_case,
    scale_case,
)
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
from convmixer_fast.published import Architecture
from convmixer_fast.randomize import randomize

__all__ = ["growth"]


def growth(
    dtype: torch.dtype,
    batches: Sequence[int] = (1, 4, 16, 64),
    only: Sequence[str] = ("eager", "compile", "onnxruntime", "ours"),
) -> Iterator[Case]:
    """Yield the sweep of a 256-wide, 8-deep ConvMixer with kernels of 5 and patches of 2.

    Args:
        dtype: of weights and images.
        batches: to sweep at 32 px.
        only: see :class:`Case`.
    """
    base = {"dim": 256, "depth": 8, "image_size": 32, "batch": 1}
    swept = {
        "batch": batches,
        "image_size": (16, 64, 128),
        "dim": (64, 128, 512),
        "depth": (2, 4, 16),
    }
    points = [base, *({**base, axis: value} for axis in swept for value in swept[axis])]
    for point in {tuple(point.items()): point for point in points}.values():
        architecture = Architecture(point["dim"], point["depth"], 5, 2, "gelu", num_classes=10)
        size = point["image_size"]
        case = convmixer_case(
            f"{point['dim']}/{point['depth']}",
            _random(architecture),
            (point["batch"], 3, size, size),
            dtype,
            labels={"sweep": "growth", "dim": point["dim"], "depth": point["depth"]},
            only=only,
        )
        yield replace(case, seconds_share=0.35)


def _random(architecture: Architecture) -> Callable[[], nn.Module]:
    return lambda: randomize(architecture.build())


def main(
    models: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join([*MODELS, *SCALE])}, growth.")
    ] = None,
    batches: BatchesOption = "1",
    dtypes: DtypesOption = "auto",
    providers: ProvidersOption = None,
    device: DeviceOption = "auto",
    seconds: SecondsOption = 20.0,
    output: OutputOption = None,
    fresh: FreshOption = False,
) -> None:
    """Time whole models with every provider."""
    where = default_device(device)
    run = Run(where, output or default_output(where), Settings(seconds), fresh)
    sizes = batch_sizes(batches)
    cases: list[Case] = []
    for dtype in chosen_dtypes(dtypes, where):
        for name in models or [*MODELS, *SCALE]:
            if name == "growth":
                cases += growth(dtype)
            elif name in SCALE:
                cases += [scale_case(name, batch, dtype) for batch in sizes]
            elif name in MODELS:
                cases += [named_case(name, batch, dtype) for batch in sizes]
            else:
                known = ", ".join([*MODELS, *SCALE, "growth"])
                raise typer.BadParameter(f"models must be of {known}, got {name!r}")
    run.execute("models", cases, providers)


if __name__ == "__main__":
    typer.run(main)
