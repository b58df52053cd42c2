"""Patch convolution + activation + BatchNorm, the stem: ours against PyTorch's."""

from collections.abc import Iterator, Sequence

import torch

from convmixer_fast.benchmarks.op_cases import patch_embed_case
from convmixer_fast.benchmarks.op_command import op_command
from convmixer_fast.benchmarks.subjects import Case

__all__ = ["cases"]


def cases(batch: int, dtype: torch.dtype, only: Sequence[str] | None = None) -> Iterator[Case]:
    """Yield the published stems and the CIFAR model's, in order of worth."""
    yield patch_embed_case(768, 224, 7, batch, dtype, "relu", only=only)
    yield patch_embed_case(1536, 224, 7, batch, dtype, only=only)
    yield patch_embed_case(1024, 224, 14, batch, dtype, only=only)
    yield patch_embed_case(256, 32, 2, batch, dtype, only=only)


if __name__ == "__main__":
    op_command("patch_embed", cases)
