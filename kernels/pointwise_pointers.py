"""Pointwise block with operands read through pointers: any size, stride, dtype and device.

A program owns a BLOCK_O x BLOCK_HW tile of one image's result and walks over the
input channels, BLOCK_K at a time, through a pipeline of ``num_stages`` tiles in
shared memory; ``tl.dot`` is the tensor cores' product, summed in float32. Tiles of
output channels come first in the grid: the programs that share a tile of X run at
the same time, and the weights, at most a few megabytes, stay in the L2 cache.
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
    is_interpreted,
    offset_dtype,
    takes_ptx,
)

__all__ = ["PointerTile", "pointers_launch"]


class PointerTile(NamedTuple):
    """The tile of a program, and how it is read."""

    BLOCK_O: int
    BLOCK_HW: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit
def _pointwise_pointers_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    channels_out,
    channels_in,
    positions,
    x_batch_stride,
    x_k_stride,
    x_hw_stride,
    weight_o_stride,
    BLOCK_O: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of ``act(weight @ x + bias) * scale + shift``.

    x_ptr: (N, C_in, H * W), any strides, fp16|bf16|fp32.
    weight_ptr: (C_out, C_in), rows contiguous, dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C_out,), dtype of x or fp32, or None.
    out_ptr: (N, C_out, H * W), contiguous, dtype of x.
    Grid: output channels fastest, then positions, images.
    UPCAST_DOT: widen the operands first, for the interpreter, which multiplies the
    bits of bfloat16 numbers as integers.
    """
    o_tiles = tl.cdiv(channels_out, BLOCK_O)
    hw_tiles = tl.cdiv(positions, BLOCK_HW)
    tile = tl.program_id(0)
    o_start = (tile % o_tiles) * BLOCK_O
    tile //= o_tiles
    hw_start = (tile % hw_tiles) * BLOCK_HW
    image = (tile // hw_tiles).to(tl.int64)

    o_offs = o_start + tl.arange(0, BLOCK_O)[:, None]
    hw_offs = hw_start + tl.arange(0, BLOCK_HW)[None, :]
    k_offs = tl.arange(0, BLOCK_K)
    o_mask = o_offs < channels_out
    hw_mask = hw_offs < positions

    weight_ptrs = weight_ptr + o_offs.to(OFFSET_DTYPE) * weight_o_stride + k_offs[None, :]
    x_ptrs = x_ptr + image * x_batch_stride + hw_offs.to(OFFSET_DTYPE) * x_hw_stride
    x_ptrs += k_offs[:, None].to(OFFSET_DTYPE) * x_k_stride

    acc = tl.zeros((BLOCK_O, BLOCK_HW), dtype=tl.float32)
    for k_start in range(0, channels_in, BLOCK_K):
        k_mask = k_offs < channels_in - k_start
        weight = tl.load(weight_ptrs, mask=o_mask & k_mask[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=k_mask[:, None] & hw_mask, other=0.0)
        if UPCAST_DOT:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(weight, x, acc, input_precision=INPUT_PRECISION)
        weight_ptrs += BLOCK_K
        x_ptrs += tl.full((), BLOCK_K, OFFSET_DTYPE) * x_k_stride

    out = apply_epilogue(
        acc,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        o_offs,
        o_mask,
        ACTIVATION,
        out_ptr.dtype.element_ty == tl.float32,
        PTX,
    )
    out_ptrs = out_ptr + image * channels_out * positions
    out_ptrs += o_offs.to(OFFSET_DTYPE) * positions + hw_offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=o_mask & hw_mask)


def pointers_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    precision: str,
    tile: PointerTile,
) -> Launch:
    """Return what writes the pointwise block of x (N, C_in, H * W) into ``out``.

    The weight is (C_out, C_in).
    """
    images, channels_in, positions = x.shape
    channels_out = weight.shape[0]
    tiles = triton.cdiv(channels_out, tile.BLOCK_O) * triton.cdiv(positions, tile.BLOCK_HW)
    return Launch(
        _pointwise_pointers_kernel,
        tiles * images,
        x,
        weight,
        epilogue,
        out,
        (channels_out, channels_in, positions, *x.stride(), weight.stride(0)),
        {
            "UPCAST_DOT": is_interpreted(_pointwise_pointers_kernel),
            "ACTIVATION": epilogue.activation,
            "OFFSET_DTYPE": offset_dtype(
                channels_out * positions,
                channels_out * weight.stride(0),
                channels_in * x.stride(1) + positions * x.stride(2),
            ),
            "PTX": takes_ptx(_pointwise_pointers_kernel),
            **pointers_constants(tile, precision),
        },
    )


def pointers_constants(tile: PointerTile, precision: str) -> dict[str, Any]:
    """Return what the kernel is compiled for, of a tile, and how."""
    return {"INPUT_PRECISION": precision, **tile._asdict(), "enable_fp_fusion": True}
