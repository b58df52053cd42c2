"""``python -m tests.show``: every ConvMixer that the tests know, a line each, and random scales.

A line says how far the optimized model and the original are from the original in float64, worst
over a few images, and how the optimized one runs.
"""

import argparse
import logging
import warnings

import torch

from convmixer_fast import optimize
from convmixer_fast.accuracy import exact, relative_error
from tests.runtime.test_cpu_accuracy import (
    convmixer,
    random_scales,
    recalibrated,
    scale_inputs,
    scale_outputs,
)
from tests.variants import EVERY


def show_models(images: int) -> None:
    for name, variation in EVERY.items():
        model = variation.model()
        fast, truth = optimize(model), exact(model)
        errors: list[tuple[float, float]] = []
        with torch.inference_mode():
            for seed in range(images):
                x = variation.image(seed)
                expected = truth(x.double())
                ours, theirs = (relative_error(found(x), expected) for found in (fast, model))
                errors.append((ours, theirs))
        explained = fast.explain(x)
        how = "in one call" if explained.one_call else "op by op"
        outside = ", ".join(explained.outside)
        ours, theirs = (max(column) for column in zip(*errors, strict=True))
        print(f"{name:30} {ours:.1e} (eager {theirs:.1e})  {how:12} {outside}", flush=True)


def show_scales(patterns: int) -> None:
    worst: dict[str, list[float]] = {"ours": [], "eager": [], "ratio": []}
    for seed in range(patterns):
        exponent, generator = (6, 3, 1)[seed % 3], torch.Generator().manual_seed(seed)
        model = convmixer(seed)
        scale_outputs(model, random_scales(exponent, generator))
        recalibrated(model)
        scale_inputs(model, random_scales(exponent, generator))
        fast, truth = optimize(model), exact(model)
        x = torch.randn(16, 3, 16, 16, generator=generator)
        with torch.inference_mode():
            expected = truth(x.double())
            ours, eager = (relative_error(found(x), expected) for found in (fast, model))
        for key, value in {"ours": ours, "eager": eager, "ratio": ours / eager}.items():
            worst[key].append(value)
    shown = ", ".join(
        f"{key} {max(values):.2g} (median {torch.tensor(values).median():.2g})"
        for key, values in worst.items()
    )
    print(f"{patterns} random patterns of channel scales, worst: {shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.show", description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--patterns", type=int, default=100, help="of scales")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    show_models(arguments.images)
    show_scales(arguments.patterns)
