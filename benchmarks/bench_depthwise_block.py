"""Depthwise convolution + activation + BatchNorm + residual: ours against PyTorch's.

Sweeps the published widths, the CIFAR model, and the kernel's side.
"""

from collections.abc import Iterator, Sequence

import torch

from convmixer_fast.benchmarks.op_cases import depthwise_case
from convmixer_fast.benchmarks.op_command import op_command
from convmixer_fast.benchmarks.subjects import Case

__all__ = ["cases"]


def cases(batch: int, dtype: torch.dtype, only: Sequence[str] | None = None) -> Iterator[Case]:
    """Yield the sweep, in order of worth."""
    yield depthwise_case(768, 32, 7, batch, dtype, "relu", only=only)
    yield depthwise_case(1536, 32, 9, batch, dtype, only=only)
    yield depthwise_case(1024, 16, 9, batch, dtype, only=only)
    yield depthwise_case(256, 16, 5, batch, dtype, only=only)
    for kernel_size in (3, 5, 7, 9, 11, 15):
        yield depthwise_case(768, 32, kernel_size, batch, dtype, only=only)


if __name__ == "__main__":
    op_command("depthwise_block", cases)
