"""Does an optimized model compute what the original does? Measured against float64."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmixer_fast.optimize import optimize

__all__ = ["LIMITS", "Comparison", "randomize_batch_norm", "relative_error", "verify"]

LIMITS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error of an optimized model's outputs, relative to the largest output."""


@dataclass(frozen=True)
class Comparison:
    """One input: how far the original and the optimized model are from the float64 original.

    Errors are the largest absolute difference over the largest absolute output.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    original_error: float
    optimized_error: float

    @property
    def passed(self) -> bool:
        """Within :data:`LIMITS`, and at most twice as far as the original in that dtype.

        Differences of a few units in the last place are not held against either.
        """
        noise = 4 * torch.finfo(self.dtype).eps
        return self.optimized_error <= min(LIMITS[self.dtype], max(2 * self.original_error, noise))


def verify(
    model: nn.Module,
    shapes: Sequence[tuple[int, int, int, int]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    backend: str = "auto",
    seed: int = 0,
) -> Iterator[Comparison]:
    """Compare ``model`` with its optimized form on random images, one result at a time.

    Args:
        model: a ConvMixer in eval mode, of float32 weights; it is only read.
        shapes: of the images, (N, C, H, W).
        dtypes: to which the weights and the images are cast.
        backend: of the optimized form.
        seed: of the images.

    Raises:
        UnsupportedModelError: ``model`` is no ConvMixer in eval mode.
        BackendUnavailableError: the backend named cannot run here.
    """
    exact = copy.deepcopy(model).double()
    device = next(model.parameters()).device
    for dtype in dtypes:
        original = copy.deepcopy(model).to(dtype)
        optimized = optimize(original, backend=backend)
        for shape in shapes:
            generator = torch.Generator().manual_seed(seed)
            images = torch.randn(shape, generator=generator).to(device, dtype)
            with torch.inference_mode():
                # The float64 model sees the rounded images, and keeps the weights unrounded.
                truth = exact(images.double())
                yield Comparison(
                    dtype,
                    shape,
                    relative_error(original(images), truth),
                    relative_error(optimized(images), truth),
                )


def relative_error(found: object, truth: object) -> float:
    """Return the largest difference over the largest magnitude of ``truth``, over all tensors.

    Both may be any structure of tensors (tuples, dictionaries ...) of the same form.
    """
    worst = 0.0
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(truth), strict=True)
    for value, expected in pairs:
        assert isinstance(value, Tensor)
        difference = (value.double() - expected.double()).abs().max()
        worst = max(worst, float(difference / expected.abs().max()))
    return worst


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm of an untrained ``model`` statistics as training would leave them.

    Fresh ones compute the identity, and would hide a mistake in folding.
    """
    generator = torch.Generator().manual_seed(seed)
    ranges = {
        "running_mean": (-0.5, 0.5),
        "running_var": (0.3, 2.0),
        "weight": (0.5, 1.5),
        "bias": (-0.5, 0.5),
    }
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, (low, high) in ranges.items():
                    tensor = getattr(module, name)
                    if tensor is not None:
                        values = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
                        tensor.copy_(values)
    return model.eval()
