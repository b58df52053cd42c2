"""Does an optimized model compute what the original does? Measured against float64."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from convmixer_fast.accuracy import LIMITS, exact, ieee_float32, relative_error
from convmixer_fast.choices import BackendName
from convmixer_fast.optimize import optimize

__all__ = ["LIMITS", "Comparison", "passed", "relative_error", "verify"]


@dataclass(frozen=True)
class Comparison:
    """One input: how far the original and the optimized model are from the float64 original.

    Errors are the largest absolute difference over the largest absolute output.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    original_error: float
    optimized_error: float


def passed(comparisons: Sequence[Comparison]) -> bool:
    """Whether an optimized model is as accurate as the original, in one dtype.

    The worst over all ``comparisons`` is within :data:`LIMITS`, and at most twice the
    original's worst; differences of a few units in the last place are not held against it.
    The worst of one small input alone would be luck. A NaN never passes.
    """
    (dtype,) = {comparison.dtype for comparison in comparisons}
    original, optimized = (
        # Python's max() passes over a NaN; PyTorch's does not.
        float(torch.tensor(errors).max())
        for errors in (
            [comparison.original_error for comparison in comparisons],
            [comparison.optimized_error for comparison in comparisons],
        )
    )
    noise = 4 * torch.finfo(dtype).eps
    near = optimized <= 2 * original or optimized <= noise
    return near and optimized <= LIMITS[dtype]


def verify(
    model: nn.Module,
    shapes: Sequence[tuple[int, int, int, int]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    backend: BackendName = "auto",
    seed: int = 0,
) -> Iterator[Comparison]:
    """Compare ``model`` with its optimized form on random images, one result at a time.

    Args:
        model: a ConvMixer in eval mode, of float32 weights; it is only read.
        shapes: of the images, (N, C, H, W).
        dtypes: to which the weights and the images are cast.
        backend: of the optimized form.
        seed: of the images.

    Float32 products are IEEE float32 meanwhile, not TF32, whatever PyTorch's switches say.

    Raises:
        ValueError: one of ``dtypes`` is not in :data:`LIMITS`.
        UnsupportedModelError: ``model`` is no ConvMixer in eval mode.
        BackendUnavailableError: the backend named cannot run here.
    """
    for dtype in dtypes:
        if dtype not in LIMITS:
            raise ValueError(f"dtypes must be of {', '.join(map(str, LIMITS))}, got {dtype}")
    in_float64 = exact(model)
    device = next(model.parameters()).device
    for dtype in dtypes:
        original = copy.deepcopy(model).to(dtype)
        optimized = optimize(original, backend=backend, verify=False)
        for shape in shapes:
            generator = torch.Generator().manual_seed(seed)
            images = torch.randn(shape, generator=generator).to(device, dtype)
            with torch.inference_mode(), ieee_float32():
                # The float64 model sees the rounded images, and keeps the weights unrounded.
                truth = in_float64(images.double())
                yield Comparison(
                    dtype,
                    shape,
                    relative_error(original(images), truth),
                    relative_error(optimized(images), truth),
                )
