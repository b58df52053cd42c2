"""Depthwise block by direct taps: any odd K, any dtype, NCHW with contiguous rows.

A program owns BLOCK_C x BLOCK_H x BLOCK_W results of one image in float32 registers and adds
K * K shifted loads of ``x``, each times one weight per channel. Neighbouring taps overlap, so all
but the first load of an element come from the L1 cache. Taps outside the image are masked to
0, which is the zero padding. The code grows at most with K and not with K * K, because no more
than the taps of one kernel row are unrolled.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from convmixer_fast.kernels.activations import apply_epilogue
from convmixer_fast.kernels.launch import (
    Epilogue,
    Launch,
    offset_dtype,
    takes_ptx,
)

__all__ = ["DirectTile", "direct_launch"]


class DirectTile(NamedTuple):
    """The results of one image that a program computes."""

    BLOCK_C: int
    BLOCK_H: int
    BLOCK_W: int
    unrolled_taps: int | None
    """Taps of a kernel row that are unrolled at a time; None for all."""
    max_registers: int | None
    """Registers that a thread may have; None for what ptxas chooses."""
    num_warps: int


@triton.jit
def _depthwise_direct_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    channels,
    height,
    width,
    x_batch_stride,
    x_c_stride,
    x_h_stride,
    KERNEL_SIZE: tl.constexpr,
    UNROLLED_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of ``act(depthwise_conv(x) + bias) * scale + shift + x``.

    x_ptr: (N, C, H, W), rows contiguous, fp16|bf16|fp32.
    weight_ptr: (C, K, K), contiguous, dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C,), dtype of x or fp32, or None.
    out_ptr: (N, C, H, W), contiguous, dtype of x.
    Grid: columns of tiles fastest, then rows, channels, images.
    """
    w_tiles = tl.cdiv(width, BLOCK_W)
    h_tiles = tl.cdiv(height, BLOCK_H)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0)
    w_start = (tile % w_tiles) * BLOCK_W
    tile //= w_tiles
    h_start = (tile % h_tiles) * BLOCK_H
    tile //= h_tiles
    c_start = (tile % c_tiles) * BLOCK_C
    image = (tile // c_tiles).to(tl.int64)

    c_offs = c_start + tl.arange(0, BLOCK_C)[:, None, None]
    h_offs = h_start + tl.arange(0, BLOCK_H)[None, :, None]
    w_offs = w_start + tl.arange(0, BLOCK_W)[None, None, :]
    c_mask = c_offs < channels
    mask = c_mask & (h_offs < height) & (w_offs < width)

    x_ptrs = x_ptr + image * x_batch_stride + c_offs.to(tl.int64) * x_c_stride
    x_ptrs += h_offs.to(OFFSET_DTYPE) * x_h_stride + w_offs
    weight_ptrs = weight_ptr + c_offs * (KERNEL_SIZE * KERNEL_SIZE)

    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    acc = tl.zeros((BLOCK_C, BLOCK_H, BLOCK_W), dtype=tl.float32)
    for kh in range(KERNEL_SIZE):
        row = h_offs + (kh - RADIUS)
        row_mask = c_mask & (row >= 0) & (row < height)
        row_ptrs = x_ptrs + tl.full((), kh - RADIUS, OFFSET_DTYPE) * x_h_stride
        for kw_start in range(0, KERNEL_SIZE, UNROLLED_TAPS):
            for step in tl.static_range(UNROLLED_TAPS):
                kw = kw_start + step
                column = w_offs + (kw - RADIUS)
                tap_mask = row_mask & (column >= 0) & (column < width)
                weight_mask = c_mask
                if KERNEL_SIZE % UNROLLED_TAPS != 0:
                    # A block of one, because masks do not mix with scalar booleans.
                    is_tap = tl.full((1, 1, 1), kw, tl.int32) < KERNEL_SIZE
                    tap_mask &= is_tap
                    weight_mask &= is_tap
                weight_offs = kh * KERNEL_SIZE + kw
                value = tl.load(row_ptrs + (kw - RADIUS), mask=tap_mask, other=0.0)
                weight = tl.load(weight_ptrs + weight_offs, mask=weight_mask, other=0.0)
                acc += value.to(tl.float32) * weight.to(tl.float32)

    out = apply_epilogue(
        acc,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        c_offs,
        c_mask,
        ACTIVATION,
        out_ptr.dtype.element_ty == tl.float32,
        PTX,
    )
    if HAS_RESIDUAL:
        out += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (image * channels + c_offs) * height * width
    out_ptrs += h_offs.to(OFFSET_DTYPE) * width + w_offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def direct_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    residual: bool,
    tile: DirectTile,
) -> Launch:
    """Return what writes the depthwise block of x (N, C, H, W), rows contiguous, into ``out``."""
    images, channels, height, width = x.shape
    tiles = triton.cdiv(width, tile.BLOCK_W) * triton.cdiv(height, tile.BLOCK_H)
    tiles *= triton.cdiv(channels, tile.BLOCK_C) * images
    return Launch(
        _depthwise_direct_kernel,
        tiles,
        x,
        weight.contiguous(),
        epilogue,
        out,
        (channels, height, width, *x.stride()[:3]),
        {
            "ACTIVATION": epilogue.activation,
            "HAS_RESIDUAL": residual,
            "OFFSET_DTYPE": offset_dtype(height * width, height * x.stride(2)),
            "PTX": takes_ptx(_depthwise_direct_kernel),
            **direct_constants(tile, weight.shape[3]),
        },
    )


def direct_constants(tile: DirectTile, kernel_size: int) -> dict[str, Any]:
    """Return what the kernel is compiled for, of a tile, and how."""
    return {
        "KERNEL_SIZE": kernel_size,
        "UNROLLED_TAPS": tile.unrolled_taps or kernel_size,
        "BLOCK_C": tile.BLOCK_C,
        "BLOCK_H": tile.BLOCK_H,
        "BLOCK_W": tile.BLOCK_W,
        "num_warps": tile.num_warps,
        "num_stages": 1,  # there is no loop to pipeline
        "maxnreg": tile.max_registers,
        "enable_fp_fusion": True,
    }
