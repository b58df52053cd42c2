"""What :meth:`FusedConvMixer.explain` returns."""

from dataclasses import dataclass, fields

import torch

__all__ = ["Explanation"]


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
    """The parts of the module besides the layers that PyTorch runs, in order."""

    def __str__(self) -> str:
        """Return one line for each field that says something."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value != ():
                text = ", ".join(value) if isinstance(value, tuple) else str(value)
                lines.append(f"{field.name.replace('_', ' ')}: {text}")
        return "\n".join(lines)
