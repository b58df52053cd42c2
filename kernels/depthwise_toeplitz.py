"""Depthwise block on tensor cores, for 16-bit planes in NCHW and odd kernels up to 15 x 15.

A convolution along a row is a product with a banded Toeplitz matrix: BLOCK_W results of a row
need the WINDOW columns of an input row around them, and for the tap row ``kh`` of a channel

    out[h, w_start + o] += sum_i  T_kh[o, i] * x[h + kh - R, w_start - PAD + i]
    T_kh[o, i] = weight[kh, i - o - PAD + R]   where that is a tap, else 0,   R = K // 2

For K = 7 (R = 3, BLOCK_W = 8, WINDOW = 16, PAD = 4); digits are the taps of ``weight[kh]``::

    columns of the row        ...  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19  ...
    results of a window                      | 8  9 10 11 12 13 14 15|
    the window                   | 4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19|

                           i =     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    T_kh   o = 0                   .  0  1  2  3  4  5  6  .  .  .  .  .  .  .  .
           o = 1                   .  .  0  1  2  3  4  5  6  .  .  .  .  .  .  .
            ...
           o = 7                   .  .  .  .  .  .  .  .  0  1  2  3  4  5  6  .

    lane, of four                 |-- 0 ------|-- 1 ------|-- 2 ------|-- 3 ------|

T_kh does not depend on the position. So the columns of the product's right operand are windows:
of all images, row segments and column blocks of the channel alike.

The tensor cores' left operand has 16 rows. K <= 9 needs windows of 16 for 8 results, and two rows
of results share a product: T_kh on top of T_(kh-1), K + 1 products for 2 rows of results. Larger
K have windows of 32 for 16 results of one row. A program has BLOCK_N windows of ROWS rows of one
channel: an input row is loaded once and stays in registers for the K rows of results that it is
in. The residual is one more product, with an identity.

Two orders are chosen so that nothing moves between lanes. The 4 (or 8) columns of a window that
one lane loads are those which it holds of the right operand, so that the sum runs over the window
in the order of :func:`_window_column`. And the tables are loaded (element, lane), as the left
operand holds them.

What this costs: the zeros of T times a NaN or an infinity are NaN, so that either makes NaN of all
results of the windows (and the pairs of rows) that it is in, its own place included.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from convmixer_fast.kernels.activations import activate
from convmixer_fast.kernels.launch import (
    Epilogue,
    Launch,
    is_interpreted,
    takes_ptx,
)

__all__ = ["ToeplitzTile", "aligned_elements", "toeplitz_launch"]


class ToeplitzTile(NamedTuple):
    """What a program computes: windows, and rows of results of each."""

    BLOCK_N: int
    """Windows, all of one channel."""
    max_rows: int
    """Rows of results of a window; planes are cut into even segments of at most so many."""
    ahead: int = 0
    """Rows of input that are asked for before the one that is needed next: loads in flight."""

    def rows(self, height: int) -> int:
        """Return the rows of a segment, even, of planes ``height`` high."""
        segments = -(-height // self.max_rows)
        return 2 * -(-height // (2 * segments))

    def programs(self, kernel_size: int, shape: Sequence[int]) -> int:
        """Return how many programs x of ``shape`` (N, C, H, W) takes."""
        images, channels, height, width = shape
        windows = images * -(-height // self.rows(height)) * -(-width // block_width(kernel_size))
        return channels * -(-windows // self.BLOCK_N)


def block_width(kernel_size: int) -> int:
    """Return the columns of results that a window has, for a kernel's side."""
    return 8 if kernel_size <= 9 else 16


@triton.jit
def _window_column(element, quad_lane, WINDOW: tl.constexpr):
    """The column of the window that a lane has as its ``element`` of the operand.

    Lanes are in groups of four; one of them has WINDOW // 4 neighbouring columns, in pairs, as
    many as the operand has blocks of 8 along the sum.
    """
    BLOCKS: tl.constexpr = WINDOW // 8
    return quad_lane * (WINDOW // 4) + element % BLOCKS * 2 + element // BLOCKS


@triton.jit
def _left_operand(upper, lower, WINDOW: tl.constexpr):
    """(16, WINDOW) from its upper and its lower 8 rows, each (WINDOW // 4 elements, 32 lanes)."""
    is_upper = tl.arange(0, 2)[None, None, :] == 0
    # Not tl.join: where it sees one, Triton 3.6 packs operands for a conversion that is not there.
    both = tl.where(is_upper, upper[:, :, None], lower[:, :, None])
    both = both.reshape(2, WINDOW // 8, 8, 4, 2)
    return both.permute(4, 2, 1, 3, 0).reshape(16, WINDOW)


@triton.jit
def _depthwise_toeplitz_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    images,
    channels,
    x_batch_stride,
    x_c_stride,
    x_h_stride,
    VECTOR: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    PTX: tl.constexpr,
):
    """ROWS rows of BLOCK_N windows of ``act(depthwise_conv(x) + bias) * scale + shift + x``.

    x_ptr: (N, C, H, W), rows contiguous, fp16|bf16; its strides come divided by VECTOR, which
        tells the compiler how many elements are aligned together.
    weight_ptr: (C, K, K), contiguous, dtype of x.
    bias_ptr, scale_ptr, shift_ptr: (C,), dtype of x or fp32, or None.
    out_ptr: (N, C, H, W), contiguous, dtype of x.
    Grid: channels fastest, then groups of BLOCK_N windows.
    UPCAST_DOT: widen the operands first, for the interpreter, which multiplies the
    bits of bfloat16 numbers as integers.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    PAD: tl.constexpr = WINDOW // 4
    ROWS_PER_DOT: tl.constexpr = 16 // BLOCK_W
    DOTS: tl.constexpr = KERNEL_SIZE + ROWS_PER_DOT - 1
    LATE: tl.constexpr = DOTS - 1 + AHEAD
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    SEGMENTS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    dtype = x_ptr.dtype.element_ty
    dot_dtype = tl.float32 if UPCAST_DOT else dtype

    channel = tl.program_id(0) % channels
    window = tl.program_id(0) // channels * BLOCK_N + tl.arange(0, BLOCK_N)
    w_start = window % COLUMN_BLOCKS * BLOCK_W
    segment = window // COLUMN_BLOCKS
    h_start = segment % SEGMENTS * ROWS
    image = segment // SEGMENTS
    exists = image < images

    # The left operands, one per row of input that a row (or a pair of rows) of results needs.
    lane = tl.arange(0, 32)[None, :]
    element = tl.arange(0, WINDOW // 4)[:, None]
    tap = _window_column(element, lane % 4, WINDOW) - lane // 4 - PAD + RADIUS
    row_ptrs = weight_ptr + channel * (KERNEL_SIZE * KERNEL_SIZE) + tap
    zeros = tl.zeros((WINDOW // 4, 32), dtype)
    previous = zeros
    tables = ()  # of one more at each step, which Triton follows and mypy does not
    for kh in tl.static_range(DOTS):
        upper = zeros
        if kh < KERNEL_SIZE:
            upper = tl.load(row_ptrs, mask=(tap >= 0) & (tap < KERNEL_SIZE), other=0.0)
        lower = previous
        if ROWS_PER_DOT == 1:
            is_tap = (tap >= 8) & (tap < KERNEL_SIZE + 8)
            lower = tl.load(row_ptrs - 8, mask=is_tap, other=0.0)
        table = _left_operand(upper, lower, WINDOW).to(dot_dtype)
        tables = tables + (table,)  # type: ignore[assignment]
        previous = upper
        row_ptrs += KERNEL_SIZE

    m = tl.arange(0, 16)[:, None]
    k = tl.arange(0, WINDOW)[None, :]
    # The operand's order along the sum: blocks of 8, in them lanes, in them pairs.
    column_of_k = _window_column(k // 8 + k % 2 * (WINDOW // 8), k % 8 // 2, WINDOW)

    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel).to(tl.float32)
    shift = 0.0
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel).to(tl.float32)

    columns = w_start[:, None] - PAD + tl.arange(0, WINDOW)[None, :]
    column_mask = exists[:, None] & (columns >= 0) & (columns < WIDTH)
    x_offs = image.to(tl.int64) * x_batch_stride + channel.to(tl.int64) * x_c_stride
    x_offs = (x_offs + h_start * x_h_stride) * VECTOR
    x_ptrs = x_ptr + x_offs[:, None] + columns

    out_rows = h_start[None, :, None] + tl.arange(0, ROWS_PER_DOT)[:, None, None]
    out_columns = w_start[None, :, None] + tl.arange(0, BLOCK_W)[None, None, :]
    out_mask = exists[None, :, None] & (out_columns < WIDTH)
    out_offs = (image.to(tl.int64) * channels + channel) * (HEIGHT * WIDTH)
    out_ptrs = out_ptr + out_offs[None, :, None] + out_rows * WIDTH + out_columns

    rows = ()
    for asked in tl.static_range(ROWS + KERNEL_SIZE - 1 + AHEAD):
        if asked < ROWS + KERNEL_SIZE - 1:
            row = h_start + (asked - RADIUS)
            mask = column_mask & ((row >= 0) & (row < HEIGHT))[:, None]
            x = tl.load(x_ptrs + (asked - RADIUS) * x_h_stride * VECTOR, mask=mask, other=0.0)
            x = x.reshape(BLOCK_N, 4, WINDOW // 8, 2).permute(2, 1, 3, 0).reshape(WINDOW, BLOCK_N)
            rows = rows + (x.to(dot_dtype),)  # type: ignore[assignment]
        # asked - LATE, the row of results that is due now, stays a number of the compiler's.
        if asked >= LATE and (asked - LATE) % ROWS_PER_DOT == 0:
            acc = tl.zeros((16, BLOCK_N), tl.float32)
            for kh in tl.static_range(DOTS):
                acc = tl.dot(tables[kh], rows[asked - LATE + kh], acc)
            if bias_ptr is not None:
                acc += bias
            out = activate(acc, ACTIVATION, False, PTX)
            added = tl.zeros((16, BLOCK_N), tl.float32) + shift
            if HAS_RESIDUAL:
                for r in tl.static_range(ROWS_PER_DOT):
                    is_own = column_of_k == m - r * BLOCK_W + PAD
                    is_own = is_own & (m // BLOCK_W == r)
                    identity = tl.where(is_own, 1.0, 0.0).to(dot_dtype)
                    added = tl.dot(identity, rows[asked - LATE + RADIUS + r], added)
            out = out * scale + added
            out = out.to(dtype).reshape(ROWS_PER_DOT, BLOCK_W, BLOCK_N).permute(0, 2, 1)
            mask = out_mask & (out_rows + (asked - LATE) < HEIGHT)
            tl.store(out_ptrs + (asked - LATE) * WIDTH, out, mask=mask)


def toeplitz_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    residual: bool,
    tile: ToeplitzTile,
) -> Launch:
    """Return what writes the depthwise block of x (N, C, H, W), rows contiguous, into ``out``."""
    _, _, height, width = x.shape
    kernel_size = weight.shape[3]
    vector = aligned_elements(x)
    strides = (stride // vector for stride in x.stride()[:3])
    return Launch(
        _depthwise_toeplitz_kernel,
        tile.programs(kernel_size, x.shape),
        x,
        weight.contiguous(),
        epilogue,
        out,
        (*x.shape[:2], *strides),
        {
            "VECTOR": vector,
            "HEIGHT": height,
            "WIDTH": width,
            "ACTIVATION": epilogue.activation,
            "HAS_RESIDUAL": residual,
            "UPCAST_DOT": is_interpreted(_depthwise_toeplitz_kernel),
            "PTX": takes_ptx(_depthwise_toeplitz_kernel),
            **toeplitz_constants(tile, kernel_size, height),
        },
    )


def toeplitz_constants(tile: ToeplitzTile, kernel_size: int, height: int) -> dict[str, int | bool]:
    """Return what the kernel is compiled for, of a tile, and how."""
    return {
        "KERNEL_SIZE": kernel_size,
        "WINDOW": 2 * block_width(kernel_size),
        "BLOCK_W": block_width(kernel_size),
        "BLOCK_N": tile.BLOCK_N,
        "ROWS": tile.rows(height),
        "AHEAD": tile.ahead,
        # One warp: with four, Hopper's and Blackwell's larger tensor core instructions would be
        # chosen, which take their operands from shared memory.
        "num_warps": 1,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def aligned_elements(x: Tensor) -> int:
    """Return how many elements of x (N, C, H, W), rows contiguous, are aligned together, up to 8.

    As far as sizes and strides say: Triton finds out at the call where the first one is.
    """
    strides = [stride for size, stride in zip(x.shape, x.stride()[:3], strict=False) if size > 1]
    return math.gcd(8, x.shape[3], *strides)
