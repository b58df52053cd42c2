"""Depthwise block: ``act(depthwise_conv(x, weight) + bias) * scale + shift + x``, in Triton.

Layout: NCHW with contiguous rows; other strides are free. Weights are (C, K, K).

Direct taps: a program owns BLOCK_C x BLOCK_H x BLOCK_W results of one image in
float32 registers and adds K * K shifted loads of ``x``, each times one weight per
channel. Neighbouring taps overlap, so all but the first load of an element come
from the L1 cache. Taps outside the image are masked to 0, which is the zero
padding. Any odd K; the code grows at most with K and not with K * K, because no more
than the taps of one kernel row are unrolled.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792, section 2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmixer_fast.kernels.activations import apply_epilogue
from convmixer_fast.kernels.launch import (
    contiguous_or_none,
    device_guard,
    offset_dtype,
)

__all__ = ["CONFIGS", "Config", "choose_config", "depthwise_block_triton"]


class Config(NamedTuple):
    """One row: the kernels and planes that it is for, and the tile that they get."""

    max_kernel_size: float
    max_height: float
    max_width: float
    BLOCK_C: int
    BLOCK_H: int
    BLOCK_W: int
    unrolled_taps: int | None
    """Taps of a kernel row that are unrolled at a time; None for all."""
    max_registers: int | None
    """Registers that a thread may have; None for what ptxas chooses."""
    num_warps: int
    num_stages: int


_ANY = float("inf")

CONFIGS = (
    # Each tile has 1,024 results. There is no pipelined loop, hence one stage.
    #
    # Kernels of up to 9 x 9, where ConvMixers live, with whole kernel rows unrolled: 8
    # accumulators a thread leave room for many loads in flight.
    # Tiny planes: several channels share a program, or most of a warp would be masked.
    Config(9, 4, 4, 64, 4, 4, None, None, num_warps=4, num_stages=1),
    Config(9, 8, 8, 16, 8, 8, None, None, num_warps=4, num_stages=1),
    # 16 x 16: CIFAR with patches of 2, and 224 px with patches of 14.
    Config(9, 16, 16, 4, 16, 16, None, None, num_warps=4, num_stages=1),
    # 32 x 32: 224 px with patches of 7. The whole plane, so that no halo is read twice.
    Config(9, 32, 32, 1, 32, 32, None, None, num_warps=4, num_stages=1),
    # Larger planes: rows of 64 keep the loads of a warp within whole cache lines.
    Config(9, _ANY, _ANY, 1, 16, 64, None, None, num_warps=4, num_stages=1),
    # Larger kernels: unrolled whole, the masks of a row's taps spill. 4 at a time waste at
    # most 3 taps of a row; twice the threads, and registers by decree, leave room for
    # their masks. Two tiles, for the planes that such kernels are used on.
    Config(_ANY, 16, 16, 4, 16, 16, 4, 128, num_warps=8, num_stages=1),
    Config(_ANY, _ANY, _ANY, 1, 32, 32, 4, 128, num_warps=8, num_stages=1),
)
"""Tried in order; the first row whose limits hold is used."""


def choose_config(kernel_size: int, height: int, width: int) -> Config:
    """Return the row of :data:`CONFIGS` for a kernel's side and planes of height x width."""
    return next(
        row
        for row in CONFIGS
        if kernel_size <= row.max_kernel_size
        and height <= row.max_height
        and width <= row.max_width
    )


@triton.jit
def _depthwise_block_kernel(
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
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
):
    """One tile of ``act(depthwise_conv(x) + bias) * scale + shift + x``.

    x_ptr: (N, C, H, W), rows contiguous, fp16|bf16|fp32.
    weight_ptr: (C, K, K), contiguous, dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C,), dtype of x or fp32.
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
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    if HAS_RESIDUAL:
        out += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (image * channels + c_offs) * height * width
    out_ptrs += h_offs.to(OFFSET_DTYPE) * width + w_offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


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
        activation: a name of :data:`convmixer_fast.reference.ACTIVATIONS`.
        residual: whether x is added.

    Returns:
        (N, C, H, W), contiguous, dtype of x.

    Equivalent to ``reference.depthwise_block_ref(x, ...)``, summed in float32.
    """
    images, channels, height, width = x.shape
    kernel_size = weight.shape[3]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if width > 1 and x.stride(3) != 1:
        x = x.contiguous()
    config = choose_config(kernel_size, height, width)
    tiles = triton.cdiv(width, config.BLOCK_W) * triton.cdiv(height, config.BLOCK_H)
    grid = (tiles * triton.cdiv(channels, config.BLOCK_C) * images,)
    with device_guard(x):
        _depthwise_block_kernel[grid](
            x,
            weight.contiguous(),
            contiguous_or_none(bias),
            contiguous_or_none(scale),
            contiguous_or_none(shift),
            out,
            channels,
            height,
            width,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            KERNEL_SIZE=kernel_size,
            UNROLLED_TAPS=config.unrolled_taps or kernel_size,
            BLOCK_C=config.BLOCK_C,
            BLOCK_H=config.BLOCK_H,
            BLOCK_W=config.BLOCK_W,
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            HAS_RESIDUAL=residual,
            OFFSET_DTYPE=offset_dtype(height * width, height * x.stride(2)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
            enable_fp_fusion=True,
        )
    return out
