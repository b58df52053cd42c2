"""What :meth:`FusedConvMixer.explain` returns."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Explanation", "parts_outside"]


@dataclass(frozen=True)
class Explanation:
    """How a FusedConvMixer would run an input. ``print`` shows one fact a line."""

    backend: str
    """Of the layers; the one asked for, where it cannot run."""
    one_call: bool
    """Whether the backend runs stem and layers in one call, and not op by op."""
    reason: str | None
    """Why not."""
    device: torch.device
    """Of the stem's input."""
    dtype: torch.dtype
    """What weights and results are rounded to."""
    computed_in: torch.dtype
    """What the numbers between are: the CPU backend computes 16-bit numbers in float32. On a GPU
    sums are in float32, and each op's result is rounded to ``dtype``."""
    ready: bool
    """Whether what the backend makes of the weights is there; else the next call makes it."""
    graph: str | None
    """What a CUDA graph does for this input; None on a CPU, and op by op."""
    outside: tuple[str, ...]
    """The parts of the module that PyTorch runs, in order, and how many convolutions are in them:
    those of a head of the source's own run as they did."""

    def __str__(self) -> str:
        """Return one line for each field that says something."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value != ():
                text = ", ".join(value) if isinstance(value, tuple) else str(value)
                lines.append(f"{field.name.replace('_', ' ')}: {text}")
        return "\n".join(lines)


def parts_outside(model: Any, plain_head: Iterable[str]) -> tuple[str, ...]:
    """Name the parts of a FusedConvMixer that PyTorch runs: ``source_head (2 convolutions)``.

    Args:
        model: the module.
        plain_head: those of a plain head that it runs.
    """
    before = _source_parts(model, ("prefix", "preprocess"))
    after = _source_parts(model, ("source_head",))
    return *before, *_inside_layers(model), *plain_head, *after


def _inside_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if name.startswith("blocks.") and name.endswith((".entry", ".branch")):
            yield f"{name}{_convolutions(module)}"


def _source_parts(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        module = getattr(model, name)
        if module is not None:
            yield f"{name}{_convolutions(module)}"


def _convolutions(module: nn.Module) -> str:
    """Return how many there are, in brackets; an empty string for none."""
    count = 0
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            calls = (node for node in part.graph.nodes if node.op == "call_function")
            count += sum("conv" in str(node.target) for node in calls)
        elif isinstance(part, nn.modules.conv._ConvNd):
            count += 1
    if count == 0:
        return ""
    return f" ({count} convolution{'s' if count > 1 else ''})"
