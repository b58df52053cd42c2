"""Pointwise block: ``act(weight @ x + bias) * scale + shift`` per image, in Triton.

Layout: NCHW, so that an image is the matrix X (C_in, H * W) and the result
``W (C_out, C_in) @ X`` is again NCHW, without a transpose. Positions are the
contiguous side of both X and the result. Two kernels: :mod:`pointwise_tma`, where the device
and the sizes allow it, and :mod:`pointwise_pointers`. Here are their configurations, as data.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792, section 2.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from convmixer_fast.kernels.launch import Epilogue, Launch, capability, fp32_input_precision
from convmixer_fast.kernels.pointwise_pointers import PointerTile, pointers_launch
from convmixer_fast.kernels.pointwise_tma import TmaTile, suits_tma, tma_launch

__all__ = ["CONFIGS", "Config", "aligned_rows", "choose_config", "choose_tile"]
__all__ += ["as_matrix", "has_tma", "pointwise_block_triton", "pointwise_launch"]


class Config(NamedTuple):
    """One row: the devices and products that it is for, and the tile that they get."""

    capabilities: tuple[int, int]
    """The first compute capability that the row is for, and the first that it is not: 80 is 8.0."""
    operands: str
    """``"16-bit"``, or ``"tf32"`` or ``"ieee"`` for float32."""
    aligned: bool
    """Whether a row of pointers is for operands that can be read 16 bytes at a time alone."""
    min_positions: int
    min_programs: int
    tile: PointerTile | TmaTile


_EVERY = (80, 1000)
_DATACENTER = (90, 120)
"""Hopper, and Blackwell with tensor memory: wgmma and tcgen05 take operands from shared memory,
where the TMA puts them. Capability 12.0 has a TMA, but neither of these."""

_HOPPER = (90, 100)

CONFIGS = (
    # Batch 64 on an H100 (benchmarks/results/nvidia-h100-2026-11-27-first): 768 x 32x32 136 us, 151
    # with (128, 128); 1536 556 us, 570; 1024 x 16x16 66.5 us, 67.3. Single images: 5.7, 12.9, 5.6.
    Config(_HOPPER, "16-bit", True, 256, 264, TmaTile(128, 256, 64, True, 8, 4)),
    Config(_HOPPER, "16-bit", True, 64, 132, TmaTile(128, 128, 64, False, 8, 3)),
    Config(_HOPPER, "16-bit", True, 256, 90, TmaTile(128, 128, 64, False, 8, 4)),
    Config(_HOPPER, "16-bit", True, 256, 90, TmaTile(64, 128, 64, False, 4, 4)),
    # 16-bit through the TMA. Static counts for sm_90 (kernels/NOTES.md): 127 registers of 256
    # threads and 96 KiB, so that two programs share a multiprocessor and the epilogue of one
    # overlaps the product of the other. It needs enough tiles to fill about 130 of them.
    Config(_DATACENTER, "16-bit", True, 64, 128, TmaTile(128, 128, 64, False, 8, 3)),
    Config(_DATACENTER, "16-bit", True, 32, 0, TmaTile(64, 64, 64, False, 4, 4)),
    # Every row of pointers fits the 99 KiB of shared memory of the smallest supported devices
    # (compute capability 8.6, 8.9 and 12.0).
    Config(_EVERY, "16-bit", True, 64, 128, PointerTile(128, 128, 64, 8, 3)),
    # Small batches: a quarter of the tile, for four times the programs.
    Config(_EVERY, "16-bit", True, 32, 0, PointerTile(64, 64, 64, 4, 4)),
    # Odd sizes (7 x 7 positions, 3 x 7 x 7 pixels): elements are read one by one, through
    # registers, and the tiles above would spill. Fewer elements a thread do not.
    Config(_EVERY, "16-bit", False, 64, 128, PointerTile(64, 128, 32, 8, 3)),
    Config(_EVERY, "16-bit", False, 32, 0, PointerTile(64, 64, 32, 8, 3)),
    # Planes of a few positions, down to 1 x 1: the narrowest tile of the tensor cores
    # that is not mostly padding; the time is that of reading the weights.
    Config(_EVERY, "16-bit", False, 0, 0, PointerTile(64, 16, 64, 4, 4)),
    # TF32: the same tiles in bytes, hence half of the channels at a time.
    Config(_EVERY, "tf32", False, 64, 128, PointerTile(128, 128, 32, 8, 3)),
    # Here odd sizes spill with 4 warps.
    Config(_EVERY, "tf32", False, 0, 0, PointerTile(64, 32, 32, 8, 4)),
    # IEEE float32 has no tensor cores: fused multiply-adds on tiles small enough for
    # both operands of a step to stay in registers.
    Config(_EVERY, "ieee", False, 32, 0, PointerTile(64, 64, 16, 4, 3)),
    Config(_EVERY, "ieee", False, 0, 0, PointerTile(64, 16, 16, 4, 3)),
)
"""Tried in order; the first row for the device and the operands whose limits hold is used."""


def has_tma(device: int) -> bool:
    """Whether the TMA's rows are for a compute capability, 90 for 9.0."""
    return _DATACENTER[0] <= device < _DATACENTER[1]


def choose_config(
    device: int,
    operands: str,
    aligned: bool,
    tma: bool,
    images: int,
    channels_out: int,
    positions: int,
) -> Config:
    """Return the row of :data:`CONFIGS` for a product.

    Args:
        device: its compute capability, 90 for 9.0.
        operands: ``"16-bit"``, ``"tf32"`` or ``"ieee"``.
        aligned: whether both operands can be read 16 bytes at a time.
        tma: whether both can be described to the TMA.
        images: the batch.
        channels_out: rows of the weights.
        positions: H * W of an image.
    """

    def fits(row: Config) -> bool:
        programs = images * triton.cdiv(channels_out, row.tile.BLOCK_O)
        programs *= triton.cdiv(positions, row.tile.BLOCK_HW)
        return (
            row.capabilities[0] <= device < row.capabilities[1]
            and row.operands == operands
            and (tma if isinstance(row.tile, TmaTile) else aligned or not row.aligned)
            and positions >= row.min_positions
            and programs >= row.min_programs
        )

    return next(row for row in CONFIGS if fits(row))


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
        activation: a name of :data:`convmixer_fast.activations.ACTIVATIONS`.

    Returns:
        (N, C_out, H, W), contiguous, dtype of x.

    Equivalent to ``reference.pointwise_block_ref(x, ...)``, summed in float32.
    """
    images, _, height, width = x.shape
    channels_out = weight.shape[0]
    out = torch.empty((images, channels_out, height, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = aligned_rows(weight.flatten(1))
    pointwise_launch(as_matrix(x), rows, Epilogue(bias, scale, shift, activation), out).run()
    return out


def as_matrix(x: Tensor) -> Tensor:
    """Return x (N, C, H, W) as (N, C, H * W), positions or channels contiguous.

    A view where H and W merge into one dimension, and it or the channels are contiguous; otherwise
    a copy.
    """
    matrix = x.flatten(2)
    return matrix if 1 in matrix.stride()[1:] else matrix.contiguous()


def pointwise_launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    tile: PointerTile | TmaTile | None = None,
) -> Launch:
    """Return what writes the pointwise block of an :func:`as_matrix` into ``out``.

    Args:
        x: (N, C_in, H * W), not empty.
        weight: (C_out, C_in) as :func:`aligned_rows` returns it, dtype of x.
        epilogue: what follows the sum.
        out: contiguous memory for (N, C_out, H * W), dtype of x.
        tile: None for the table's, which also stands in where the TMA cannot read an operand.
    """
    # What was tuned was tuned for other strides and addresses, which may suit the TMA alone.
    if tile is None or (isinstance(tile, TmaTile) and not suits_tma(x, weight)):
        tile = choose_tile(x, weight)
    if isinstance(tile, TmaTile):
        return tma_launch(x, weight, epilogue, out, tile)
    precision = "tf32" if _operands(x) == "tf32" else "ieee"
    return pointers_launch(x, weight, epilogue, out, precision, tile)


def choose_tile(x: Tensor, weight: Tensor) -> PointerTile | TmaTile:
    """Return the table's tile for x (N, C_in, H * W) and weight (C_out, C_in)."""
    return choose_config(
        capability(x),
        _operands(x),
        _is_aligned(x, weight),
        suits_tma(x, weight),
        x.shape[0],
        weight.shape[0],
        x.shape[2],
    ).tile


def _operands(x: Tensor) -> str:
    return fp32_input_precision() if x.dtype == torch.float32 else "16-bit"


def _is_aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether Triton finds x (N, C_in, H * W) and weight (C_out, C_in) readable in vectors.

    It looks for multiples of 16 in every size, stride and address.
    """
    multiples = (*x.shape[1:], *x.stride(), weight.stride(0), x.data_ptr(), weight.data_ptr())
    return all(number == 1 or number % 16 == 0 for number in multiples)


def aligned_rows(weight: Tensor) -> Tensor:
    """Return weight (C_out, C_in) with rows that begin at multiples of 16 bytes.

    What is read in vectors, or by the TMA, wants that. The patch embedding's rows do not:
    3 x 7 x 7 pixels. Copying them costs little: they are as many as the channels.
    """
    channels_out, channels_in = weight.shape
    elements = 16 // weight.element_size()
    if weight.stride(1) == 1 and weight.stride(0) % elements == 0 and weight.stride(0) > 0:
        return weight
    rows = weight.new_zeros(channels_out, -(-channels_in // elements) * elements)
    rows[:, :channels_in] = weight
    return rows[:, :channels_in]
