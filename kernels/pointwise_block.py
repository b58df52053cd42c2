"""Pointwise block: ``act(weight @ x + bias) * scale + shift`` per image, in Triton.

Layout: NCHW, so that an image is the matrix X (C_in, H * W) and the result
``W (C_out, C_in) @ X`` is again NCHW, without a transpose. Positions are the
contiguous side of both X and the result.

A program owns a BLOCK_O x BLOCK_HW tile of one image's result and walks over the
input channels, BLOCK_K at a time, through a pipeline of ``num_stages`` tiles in
shared memory; ``tl.dot`` is the tensor cores' product, summed in float32. Tiles of
output channels come first in the grid: the programs that share a tile of X run at
the same time, and the weights, at most a few megabytes, stay in the L2 cache.

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
    fp32_input_precision,
    is_interpreted,
    offset_dtype,
)

__all__ = ["CONFIGS", "Config", "choose_config", "pointwise_block_triton"]


class Config(NamedTuple):
    """One row: the products that it is for, and the tile that they get."""

    operands: str
    """``"16-bit"``, or ``"tf32"`` or ``"ieee"`` for float32."""
    aligned: bool
    """Whether the row is for operands that can be read 16 bytes at a time alone."""
    min_positions: int
    min_programs: int
    BLOCK_O: int
    BLOCK_HW: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


CONFIGS = (
    # Every row fits the 99 KiB of shared memory of the smallest supported devices
    # (compute capability 8.6, 8.9 and 12.0).
    #
    # 16-bit, aligned: two programs of 96 KiB share a multiprocessor of 228 KiB, so that
    # the epilogue of one overlaps the product of the other. It needs enough tiles to
    # fill a device of about 130 multiprocessors.
    Config("16-bit", True, 64, 128, 128, 128, 64, num_warps=8, num_stages=3),
    # Small batches: a quarter of the tile, for four times the programs.
    Config("16-bit", True, 32, 0, 64, 64, 64, num_warps=4, num_stages=4),
    # Odd sizes (7 x 7 positions, 3 x 7 x 7 pixels): elements are read one by one, through
    # registers, and the tiles above would spill. Fewer elements a thread do not.
    Config("16-bit", False, 64, 128, 64, 128, 32, num_warps=8, num_stages=3),
    Config("16-bit", False, 32, 0, 64, 64, 32, num_warps=8, num_stages=3),
    # Planes of a few positions, down to 1 x 1: the narrowest tile of the tensor cores
    # that is not mostly padding; the time is that of reading the weights.
    Config("16-bit", False, 0, 0, 64, 16, 64, num_warps=4, num_stages=4),
    # TF32: the same tiles in bytes, hence half of the channels at a time.
    Config("tf32", False, 64, 128, 128, 128, 32, num_warps=8, num_stages=3),
    # Here odd sizes spill with 4 warps.
    Config("tf32", False, 0, 0, 64, 32, 32, num_warps=8, num_stages=4),
    # IEEE float32 has no tensor cores: fused multiply-adds on tiles small enough for
    # both operands of a step to stay in registers.
    Config("ieee", False, 32, 0, 64, 64, 16, num_warps=4, num_stages=3),
    Config("ieee", False, 0, 0, 64, 16, 16, num_warps=4, num_stages=3),
)
"""Tried in order; the first row for the operands whose limits hold is used."""


def choose_config(
    operands: str, aligned: bool, images: int, channels_out: int, positions: int
) -> Config:
    """Return the row of :data:`CONFIGS` for a product.

    Args:
        operands: ``"16-bit"``, ``"tf32"`` or ``"ieee"``.
        aligned: whether both operands can be read 16 bytes at a time.
        images: the batch.
        channels_out: rows of the weights.
        positions: H * W of an image.
    """

    def fits(row: Config) -> bool:
        programs = images * triton.cdiv(channels_out, row.BLOCK_O)
        programs *= triton.cdiv(positions, row.BLOCK_HW)
        return (
            row.operands == operands
            and (aligned or not row.aligned)
            and positions >= row.min_positions
            and programs >= row.min_programs
        )

    return next(row for row in CONFIGS if fits(row))


@triton.jit
def _pointwise_block_kernel(
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
    BLOCK_O: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
):
    """One tile of ``act(weight @ x + bias) * scale + shift``.

    x_ptr: (N, C_in, H * W), any strides, fp16|bf16|fp32.
    weight_ptr: (C_out, C_in), contiguous, dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C_out,), dtype of x or fp32.
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

    weight_ptrs = weight_ptr + o_offs.to(OFFSET_DTYPE) * channels_in + k_offs[None, :]
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
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    out_ptrs = out_ptr + image * channels_out * positions
    out_ptrs += o_offs.to(OFFSET_DTYPE) * positions + hw_offs
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=o_mask & hw_mask)


def pointwise_block_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(pointwise_conv(x) + bias) * scale + shift``; see :func:`ops.pointwise_block`.

    Float32 products follow PyTorch's switch for convolutions,
    ``torch.backends.cudnn.conv.fp32_precision`` (or ``torch.backends.cudnn.allow_tf32``).

    Args:
        x: (N, C_in, H, W), fp16|bf16|fp32. Copied first if neither its positions nor its
            channels are contiguous, as in a crop; channels_last is read as it is.
        weight: (C_out, C_in, 1, 1), dtype of x.
        bias: (C_out,), dtype of x or fp32; None for 0.
        scale: as bias; None for 1.
        shift: as bias; None for 0.
        activation: a name of :data:`convmixer_fast.reference.ACTIVATIONS`.

    Returns:
        (N, C_out, H, W), contiguous, dtype of x.

    Equivalent to ``reference.pointwise_block_ref(x, ...)``, summed in float32.
    """
    images, channels_in, height, width = x.shape
    channels_out, positions = weight.shape[0], height * width
    out = torch.empty((images, channels_out, height, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # Views where H and W merge into one dimension, and it or the channels are
    # contiguous; otherwise copies.
    matrix = x.reshape(images, channels_in, positions)
    if 1 not in matrix.stride()[1:]:
        matrix = matrix.contiguous()
    weight = weight.reshape(channels_out, channels_in).contiguous()
    operands = fp32_input_precision() if x.dtype == torch.float32 else "16-bit"
    aligned = _is_aligned(matrix, weight)
    config = choose_config(operands, aligned, images, channels_out, positions)
    tiles = triton.cdiv(channels_out, config.BLOCK_O) * triton.cdiv(positions, config.BLOCK_HW)
    with device_guard(x):
        _pointwise_block_kernel[(tiles * images,)](
            matrix,
            weight,
            contiguous_or_none(bias),
            contiguous_or_none(scale),
            contiguous_or_none(shift),
            out,
            channels_out,
            channels_in,
            positions,
            matrix.stride(0),
            matrix.stride(1),
            matrix.stride(2),
            BLOCK_O=config.BLOCK_O,
            BLOCK_HW=config.BLOCK_HW,
            BLOCK_K=config.BLOCK_K,
            INPUT_PRECISION="tf32" if operands == "tf32" else "ieee",
            UPCAST_DOT=is_interpreted(_pointwise_block_kernel),
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            OFFSET_DTYPE=offset_dtype(
                channels_out * positions,
                channels_out * channels_in,
                channels_in * matrix.stride(1) + positions * matrix.stride(2),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out


def _is_aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether Triton finds x (N, C_in, H * W) and weight (C_out, C_in) readable in vectors.

    It looks for multiples of 16 in every size, stride and address.
    """
    multiples = (*x.shape[1:], *x.stride(), x.data_ptr(), weight.data_ptr())
    return all(number == 1 or number % 16 == 0 for number in multiples)
