"""Whole models, end to end: the published ConvMixers, small ones, and how cost grows.

``cases`` are the models that people run, with ViT-B/16 and ResNet-50 of the same PyTorch for
scale; ``growth`` varies one thing at a time: batch, resolution, width, depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer
from torch import nn

from convmixer_fast.benchmarks.model_cases import (
    MODELS,
    SCALE,
    convmixer_case,
    named_case,
    scale_case,
)
from convmixer_fast.benchmarks.options import Batches, Kept, Measured, batch_sizes
from convmixer_fast.benchmarks.runs import Run
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.support.option_groups import takes

__all__ = ["BASE", "SWEEP", "growth"]


BASE = {"dim": 256, "depth": 8, "image_size": 32, "batch": 1}
SWEEP: Mapping[str, Sequence[int]] = {
    "batch": (4, 16, 64, 256),
    "image_size": (16, 64, 128, 256, 512),
    "dim": (64, 128, 512, 1024, 2048),
    "depth": (2, 4, 16),
}


def growth(
    dtype: torch.dtype,
    swept: Mapping[str, Sequence[int]] = SWEEP,
    only: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Yield a ConvMixer of 256 channels and 8 layers, kernels of 5, patches of 2, and its changes.

    Args:
        dtype: of weights and images.
        swept: by what is changed, the values besides that of :data:`BASE`, one at a time.
        only: see :class:`Case`.
    """
    points = [BASE, *({**BASE, axis: value} for axis in swept for value in swept[axis])]
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


@takes(Measured)
@takes(Kept)
def main(
    measured: Measured,
    kept: Kept,
    models: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join([*MODELS, *SCALE])}, growth.")
    ] = None,
    batches: Batches = "1",
) -> None:
    """Time whole models with every provider."""
    sizes = batch_sizes(batches)
    cases: list[Case] = []
    for dtype in measured.chosen_dtypes():
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
    Run.from_options(measured, kept).execute("models", cases, measured.providers)


if __name__ == "__main__":
    typer.run(main)
