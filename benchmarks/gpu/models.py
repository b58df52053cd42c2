"""The models of a run on a GPU, and the one that stands in for them in a rehearsal."""

import torch
from torch import nn

from convmixer_fast.benchmarks.model_cases import MODELS
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

__all__ = ["TINY", "TINY_INPUT", "tiny_model", "with_input"]

TINY = Architecture(8, 2, 3, 2, "gelu", num_classes=4)
"""So small that Triton's interpreter, on a CPU, can stand in for a GPU."""
TINY_INPUT = (2, 3, 8, 8)


def tiny_model() -> nn.Module:
    """Return :data:`TINY` with random weights."""
    return randomize(TINY.build())


def with_input(
    name: str, images: int, device: torch.device, *, rehearse: bool
) -> tuple[nn.Module, torch.Tensor]:
    """Return a model in float16 on ``device``, and a random input of it.

    Args:
        name: of :data:`~convmixer_fast.benchmarks.model_cases.MODELS`.
        images: in the batch.
        device: of both.
        rehearse: return the tiny model and its input instead.
    """
    make, image = MODELS[name]
    shape = TINY_INPUT if rehearse else (images, *image)
    model = tiny_model() if rehearse else make()
    return model.to(device, torch.float16), torch.randn(shape, device=device).to(torch.float16)
