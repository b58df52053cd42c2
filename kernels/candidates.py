"""Tiles worth trying on a device: what a sweep measures to find the rows of the CONFIGS tables.

Those that cannot run are left out by arithmetic where that is easy (shared memory, registers of the
sums); the rest the compiler refuses, and the sweep says so.
"""

from collections.abc import Iterator
from itertools import product

import torch

from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

__all__ = ["depthwise_candidates", "pointwise_candidates"]

_SHARED = 225 * 1024
_SUMS_OF_A_THREAD = 128


def depthwise_candidates(
    kernel_size: int, dtype: torch.dtype
) -> Iterator[ToeplitzTile | DirectTile]:
    """Yield tiles for planes of ``dtype`` and a kernel's side."""
    windows = (16, 32) if kernel_size <= 9 else (8, 16)
    if kernel_size <= 15 and dtype != torch.float32:
        for block_n, rows in product(windows, (4, 8, 16, 32)):
            # More windows leave no registers for rows that are not needed yet.
            for ahead in (0, 2, 3, 4, 6) if block_n == 16 and kernel_size <= 9 else (0,):
                yield ToeplitzTile(block_n, rows, ahead)
    unrolled = None if kernel_size <= 9 else 4
    for channels, height, width in (
        (1, 32, 32),
        (1, 16, 64),
        (1, 16, 32),
        (4, 16, 16),
        (2, 16, 16),
    ):
        yield DirectTile(channels, height, width, unrolled, None, num_warps=4)


def pointwise_candidates(dtype: torch.dtype, tma: bool) -> Iterator[PointerTile | TmaTile]:
    """Yield tiles for operands of ``dtype``.

    Args:
        dtype: float32 means half of the channels at a time, and tiles that suit TF32's tensor
            cores; without these, the smallest ones are the best.
        tma: whether device and operands suit the TMA.
    """
    block_k = 32 if dtype == torch.float32 else 64
    sides = (64, 128) if dtype == torch.float32 else (64, 128, 256)
    for block_o, block_hw, warps, stages in product(sides, sides, (4, 8), (3, 4)):
        shared = dtype.itemsize * stages * block_k * (block_o + block_hw)
        sums = block_o * block_hw // (32 * warps)
        if shared > _SHARED or not 16 <= sums <= _SUMS_OF_A_THREAD:
            continue
        if tma:
            for persistent in (False, True):
                yield TmaTile(block_o, block_hw, block_k, persistent, warps, stages)
        else:
            yield PointerTile(block_o, block_hw, block_k, warps, stages)
