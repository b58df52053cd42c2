"""How far results are from the truth, and how far they may be."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.models.outputs import named_tensors

__all__ = ["LIMITS", "exact", "ieee_float32", "relative_error"]

LIMITS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error of an optimized model's outputs, relative to the largest output."""


def relative_error(found: object, truth: object) -> float:
    """Return the largest difference over the largest magnitude of ``truth``, over all tensors.

    Both may be any structure of tensors (tuples, dictionaries, dataclasses ...) of the same form.
    A NaN in either is an error of NaN, which is within no limit.
    """
    errors = [0.0]
    for (_, value), (_, expected) in zip(named_tensors(found), named_tensors(truth), strict=True):
        difference = (value.double() - expected.double()).abs().max()
        largest = expected.double().abs().max()
        errors.append(float(difference / largest if difference != 0 else difference))
    # Python's max() passes over a NaN; PyTorch's does not.
    return float(torch.tensor(errors, dtype=torch.float64).max())


def exact(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in float64, whatever its own code casts to on the way.

    That is so for what its layers compute; a cast by itself rounds what it casts.
    """
    copied = copy.deepcopy(model).double()

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        floats = (torch.float16, torch.bfloat16, torch.float32)
        return tuple(
            x.double() if isinstance(x, Tensor) and x.dtype in floats else x for x in inputs
        )

    for module in copied.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
    return copied


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Let float32 be float32: on a GPU PyTorch's convolutions use TF32 by default."""
    cudnn: Any = torch.backends.cudnn
    # Written through the older switch, because PyTorch refuses to read that one where it
    # does not agree with the newer ones; read through a newer one, which never refuses.
    before = cudnn.conv.fp32_precision == "tf32"
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
