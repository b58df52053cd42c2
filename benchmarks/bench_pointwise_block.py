"""Pointwise convolution + activation + BatchNorm: ours against PyTorch's.

Sweeps the published widths, the CIFAR model, and widths between.
"""

from collections.abc import Iterator, Sequence

import torch

from convmixer_fast.benchmarks.op_cases import pointwise_case
from convmixer_fast.benchmarks.op_command import op_command
from convmixer_fast.benchmarks.subjects import Case

__all__ = ["cases"]


def cases(batch: int, dtype: torch.dtype, only: Sequence[str] | None = None) -> Iterator[Case]:
    """Yield the sweep, in order of worth."""
    yield pointwise_case(768, 32, batch, dtype, "relu", only=only)
    yield pointwise_case(1536, 32, batch, dtype, only=only)
    yield pointwise_case(1024, 16, batch, dtype, only=only)
    yield pointwise_case(256, 16, batch, dtype, only=only)
    for dim in (384, 512):
        yield pointwise_case(dim, 32, batch, dtype, only=only)


if __name__ == "__main__":
    op_command("pointwise_block", cases)
