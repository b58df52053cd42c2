"""Pointwise block with operands brought by the TMA, Hopper's and Blackwell's copying engine.

One thread asks for a whole tile, through a descriptor of the tensor, and no register is spent on
addresses, masks or data: tiles beyond the tensor's end are filled with zeros. It wants 16-bit
numbers, positions and input channels that are multiples of 8, and addresses of 16.

A program owns a BLOCK_O x BLOCK_HW tile of one image's result, as in
:mod:`pointwise_pointers`; a persistent one does one tile after another, so that the
operands of the next are under way while the results of the last are finished.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from convmixer_fast.kernels.activations import apply_epilogue
from convmixer_fast.kernels.launch import (
    Epilogue,
    Launch,
    is_interpreted,
    offset_dtype,
    takes_ptx,
)

__all__ = ["TmaTile", "suits_tma", "tma_launch"]


class TmaTile(NamedTuple):
    """The tile of a program, and how it is read."""

    BLOCK_O: int
    BLOCK_HW: int
    BLOCK_K: int
    PERSISTENT: bool
    """Whether there is one program per multiprocessor, for all tiles."""
    num_warps: int
    num_stages: int


def suits_tma(x: Tensor, weight: Tensor) -> bool:
    """Whether x (N, C_in, H * W) and weight (C_out, C_in) can be described to the TMA."""
    matrices = (x, weight)
    return (
        x.dtype != torch.float32
        and all(matrix.stride(-1) == 1 and matrix.data_ptr() % 16 == 0 for matrix in matrices)
        and all(stride > 0 and stride % 8 == 0 for m in matrices for stride in m.stride()[:-1])
    )


@triton.jit
def _pointwise_tma_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    images,
    channels_out,
    channels_in,
    positions,
    BLOCK_O: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Tiles of ``act(weight @ x + bias) * scale + shift``.

    x_desc: (N, C_in, H * W) in blocks of (1, BLOCK_K, BLOCK_HW), fp16|bf16.
    weight_desc: (C_out, C_in) in blocks of (BLOCK_O, BLOCK_K), dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C_out,), dtype of x or fp32, or None.
    out_ptr: (N, C_out, H * W), contiguous, dtype of x. Not through the TMA: its tile would
        need shared memory of its own, and leave room for one program instead of two.
    Tiles: output channels fastest, then positions, images.
    UPCAST_DOT: widen the operands first, for the interpreter, which multiplies the
    bits of bfloat16 numbers as integers.
    """
    o_tiles = tl.cdiv(channels_out, BLOCK_O)
    hw_tiles = tl.cdiv(positions, BLOCK_HW)
    first = tl.program_id(0)
    end = o_tiles * hw_tiles * images if PERSISTENT else first + 1
    for tile in tl.range(first, end, tl.num_programs(0), flatten=PERSISTENT):
        o_start = tile % o_tiles * BLOCK_O
        hw_start = tile // o_tiles % hw_tiles * BLOCK_HW
        image = tile // o_tiles // hw_tiles
        acc = tl.zeros((BLOCK_O, BLOCK_HW), dtype=tl.float32)
        for k_start in range(0, channels_in, BLOCK_K):
            weight = weight_desc.load([o_start, k_start])
            x = x_desc.load([image, k_start, hw_start]).reshape(BLOCK_K, BLOCK_HW)
            if UPCAST_DOT:
                weight = weight.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(weight, x, acc)

        o_offs = o_start + tl.arange(0, BLOCK_O)[:, None]
        hw_offs = hw_start + tl.arange(0, BLOCK_HW)[None, :]
        o_mask = o_offs < channels_out
        out = apply_epilogue(
            acc, bias_ptr, scale_ptr, shift_ptr, o_offs, o_mask, ACTIVATION, False, PTX
        )
        out_ptrs = out_ptr + image.to(tl.int64) * channels_out * positions
        out_ptrs += o_offs.to(OFFSET_DTYPE) * positions + hw_offs
        mask = o_mask & (hw_offs < positions)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def tma_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    tile: TmaTile,
) -> Launch:
    """Return what writes the pointwise block of x (N, C_in, H * W) into ``out``.

    The weight is (C_out, C_in).
    """
    images, channels_in, positions = x.shape
    channels_out = weight.shape[0]
    programs = triton.cdiv(channels_out, tile.BLOCK_O) * triton.cdiv(positions, tile.BLOCK_HW)
    programs *= images
    if tile.PERSISTENT:
        programs = min(programs, _multiprocessors(x))
    return Launch(
        _pointwise_tma_kernel,
        programs,
        TensorDescriptor.from_tensor(x, [1, tile.BLOCK_K, tile.BLOCK_HW]),
        TensorDescriptor.from_tensor(weight, [tile.BLOCK_O, tile.BLOCK_K]),
        epilogue,
        out,
        (images, channels_out, channels_in, positions),
        {
            "UPCAST_DOT": is_interpreted(_pointwise_tma_kernel),
            "ACTIVATION": epilogue.activation,
            "OFFSET_DTYPE": offset_dtype(channels_out * positions),
            "PTX": takes_ptx(_pointwise_tma_kernel),
            **tma_constants(tile),
        },
    )


def tma_constants(tile: TmaTile) -> dict[str, Any]:
    """Return what the kernel is compiled for, of a tile, and how."""
    return {**tile._asdict(), "enable_fp_fusion": True}


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
