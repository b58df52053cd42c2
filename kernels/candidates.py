"""Tiles worth trying on a device: what a sweep measures to find the rows of the CONFIGS tables.

Those that cannot run are left out by arithmetic where that is easy (shared memory, registers of the
sums); the rest the compiler refuses, and the sweep says so.
"""

from collections.abc import Iterator
from itertools import product

from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

__all__ = ["depthwise_candidates", "pointwise_candidates"]

_SHARED = 225 * 1024
_SUMS_OF_A_THREAD = 128


def depthwise_candidates(kernel_size: int) -> Iterator[ToeplitzTile | DirectTile]:
    """Yield tiles for 16-bit planes and a kernel's side."""
    windows = (16, 32) if kernel_size <= 9 else (8, 16)
    if kernel_size <= 15:
        for block_n, rows in product(windows, (4, 8, 16, 32)):
            yield ToeplitzTile(block_n, rows)
    unrolled = None if kernel_size <= 9 else 4
    yield DirectTile(1, 32, 32, unrolled, None, num_warps=4)
    yield DirectTile(4, 16, 16, unrolled, None, num_warps=4)


def pointwise_candidates(tma: bool) -> Iterator[PointerTile | TmaTile]:
    """Yield tiles for 16-bit operands.

    Args:
        tma: whether device and operands suit the TMA.
    """
    for block_o, block_hw, warps, stages in product((64, 128, 256), (64, 128, 256), (4, 8), (3, 4)):
        shared = 2 * stages * 64 * (block_o + block_hw)
        sums = block_o * block_hw // (32 * warps)
        if shared > _SHARED or not 16 <= sums <= _SUMS_OF_A_THREAD:
            continue
        if tma:
            for persistent in (False, True):
                yield TmaTile(block_o, block_hw, 64, persistent, warps, stages)
        else:
            yield PointerTile(block_o, block_hw, 64, warps, stages)
