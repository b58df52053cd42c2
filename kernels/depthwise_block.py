"""Depthwise block: ``act(depthwise_conv(x, weight) + bias) * scale + shift + x``, in Triton.

Layout: NCHW with contiguous rows; other strides are free. Weights are (C, K, K). Two kernels:
:mod:`depthwise_toeplitz`, on tensor cores, for 16-bit numbers and the kernels that ConvMixers
have, and :mod:`depthwise_direct` for the rest. Here are their configurations, as data.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792, section 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from convmixer_fast.kernels.depthwise_direct import DirectTile, direct_launch
from convmixer_fast.kernels.depthwise_toeplitz import (
    ToeplitzTile,
    aligned_elements,
    toeplitz_launch,
)
from convmixer_fast.kernels.launch import INT32_ELEMENTS, Epilogue, Launch

__all__ = ["CONFIGS", "Config", "choose_config", "depthwise_block_triton"]
__all__ += ["depthwise_launch"]


class Config(NamedTuple):
    """One row: the kernels and planes that it is for, and the tile that they get."""

    max_kernel_size: float
    max_height: float
    max_width: float
    min_programs: int
    """Of a Toeplitz tile: with fewer, a smaller one shares the work among more."""
    min_aligned: int
    """Of a Toeplitz tile: elements of a row that must be aligned together."""
    tile: ToeplitzTile | DirectTile


_ANY = float("inf")

CONFIGS = (
    # On tensor cores. Loads ahead of their use hide the latency of memory, as far as they leave 16
    # programs of one warp a multiprocessor: 128 registers. Taller programs read fewer rows twice.
    # Batch 64 on an H100 (benchmarks/results/nvidia-h100-2026-11-27-first): 768 x 32x32 k7 78 us,
    # 101 with (16, 16); 1536 x 32x32 k9 185 us, was 216; 1024 x 16x16 k9 36 us, was 42.
    Config(7, _ANY, _ANY, 4096, 1, ToeplitzTile(BLOCK_N=16, max_rows=32, ahead=4)),
    Config(9, _ANY, _ANY, 4096, 1, ToeplitzTile(BLOCK_N=16, max_rows=32, ahead=2)),
    # Batch 16 (...-second): 768 x 32x32 k7 24 us, 27 with ahead=2; 1024 x 16x16 k9 10 us, where
    # shorter programs take 12 to 17.
    Config(7, _ANY, _ANY, 2000, 1, ToeplitzTile(BLOCK_N=16, max_rows=16, ahead=3)),
    Config(9, _ANY, _ANY, 2000, 1, ToeplitzTile(BLOCK_N=16, max_rows=16, ahead=2)),
    # Smaller batches: more programs, each with fewer rows, for devices of about 130
    # multiprocessors, whose time here is latency. Single images: 3.5 us, 5.6 us, 3.7 us.
    Config(9, _ANY, 31, 0, 1, ToeplitzTile(BLOCK_N=16, max_rows=4, ahead=2)),
    Config(9, _ANY, _ANY, 0, 1, ToeplitzTile(BLOCK_N=16, max_rows=8, ahead=4)),
    # Windows of 32: with 16 of them, 250 registers for K = 11 and spills above. Widths that are
    # read element by element spill too.
    Config(15, _ANY, _ANY, 0, 4, ToeplitzTile(BLOCK_N=8, max_rows=16)),
    # Direct taps. Each tile has 1,024 results.
    #
    # Kernels of up to 9 x 9, with whole kernel rows unrolled: 8 accumulators a thread leave
    # room for many loads in flight.
    # Tiny planes: several channels share a program, or most of a warp would be masked. Left to
    # itself, ptxas spills in 16 bits for sm_100.
    Config(9, 4, 4, 0, 1, DirectTile(64, 4, 4, None, 224, num_warps=4)),
    Config(9, 8, 8, 0, 1, DirectTile(16, 8, 8, None, None, num_warps=4)),
    # 16 x 16: CIFAR with patches of 2, and 224 px with patches of 14.
    Config(9, 16, 16, 0, 1, DirectTile(4, 16, 16, None, None, num_warps=4)),
    # 32 x 32: 224 px with patches of 7. The whole plane, so that no halo is read twice.
    Config(9, 32, 32, 0, 1, DirectTile(1, 32, 32, None, None, num_warps=4)),
    # Larger planes: rows of 64 keep the loads of a warp within whole cache lines.
    Config(9, _ANY, _ANY, 0, 1, DirectTile(1, 16, 64, None, None, num_warps=4)),
    # Larger kernels: unrolled whole, the masks of a row's taps spill. 4 at a time waste at
    # most 3 taps of a row; twice the threads, and registers by decree, leave room for
    # their masks. Two tiles, for the planes that such kernels are used on.
    Config(_ANY, 16, 16, 0, 1, DirectTile(4, 16, 16, 4, 128, num_warps=8)),
    Config(_ANY, _ANY, _ANY, 0, 1, DirectTile(1, 32, 32, 4, 128, num_warps=8)),
)
"""Tried in order; the first row whose limits hold is used."""

_MIN_TOEPLITZ_WIDTH = 4
"""Narrower planes leave most of a window's 8 results empty."""


def choose_config(x: Tensor, kernel_size: int) -> Config:
    """Return the row of :data:`CONFIGS` for x (N, C, H, W), rows contiguous, and a kernel."""
    height, width = x.shape[2:]
    # Float32 has no tensor cores that keep its digits, and the Toeplitz kernel 32-bit offsets
    # within a plane.
    toeplitz = (
        x.dtype != torch.float32
        and width >= _MIN_TOEPLITZ_WIDTH
        and height * max(width, x.stride(2)) < INT32_ELEMENTS
    )

    def fits(row: Config) -> bool:
        if isinstance(row.tile, ToeplitzTile):
            programs = row.tile.programs(kernel_size, x.shape)
            if not toeplitz or programs < row.min_programs or aligned_elements(x) < row.min_aligned:
                return False
        return (
            kernel_size <= row.max_kernel_size
            and height <= row.max_height
            and width <= row.max_width
        )

    return next(row for row in CONFIGS if fits(row))


def depthwise_block_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    residual: bool,
) -> Tensor:
    """``act(depthwise_conv(x) + bias) * scale + shift + x``; see :func:`ops.depthwise_block`.

    Args:
        x: (N, C, H, W), fp16|bf16|fp32. Copied first if its rows are not contiguous, as
            in channels_last: reading it with stride C would cost more than the copy.
        weight: (C, 1, K, K), K odd, dtype of x.
        bias: (C,), dtype of x or fp32; None for 0.
        scale: as bias; None for 1.
        shift: as bias; None for 0.
        activation: a name of :data:`convmixer_fast.activations.ACTIVATIONS`.
        residual: whether x is added.

    Returns:
        (N, C, H, W), contiguous, dtype of x.

    Equivalent to ``reference.depthwise_block_ref(x, ...)``, summed in float32.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.shape[3] > 1 and x.stride(3) != 1:
        x = x.contiguous()
    depthwise_launch(x, weight, Epilogue(bias, scale, shift, activation), out, residual).run()
    return out


def depthwise_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    residual: bool,
    tile: ToeplitzTile | DirectTile | None = None,
) -> Launch:
    """Return what writes the depthwise block of x (N, C, H, W), rows contiguous, into ``out``.

    Args:
        x: not empty.
        weight: (C, 1, K, K), K odd, dtype of x.
        epilogue: what follows the sum.
        out: contiguous memory for (N, C, H, W), dtype of x.
        residual: whether x is added.
        tile: None for the table's.
    """
    if tile is None:
        tile = choose_config(x, weight.shape[3]).tile
    if isinstance(tile, ToeplitzTile):
        return toeplitz_launch(x, weight, epilogue, out, residual, tile)
    return direct_launch(x, weight, epilogue, out, residual, tile)
