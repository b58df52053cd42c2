"""Which tiles are worth a GPU's minutes, for which problems and batches."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.launch import capability
from convmixer_fast.kernels.pointwise_block import has_tma
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Problem, Tile

__all__ = [
    "TILES",
    "Batch",
    "batches",
    "chosen_batches",
    "published_problems",
    "tiles_for",
]

TILES: dict[str, type[Tile]] = {
    kind.__name__: kind for kind in (ToeplitzTile, DirectTile, PointerTile, TmaTile)
}
"""By name, as results have them."""


class Batch(NamedTuple):
    """A problem, and how many images of it."""

    problem: Problem
    images: int

    def __str__(self) -> str:
        kind, size = self.problem.op.split("_")[0], self.problem.kernel_size
        kernel = f" k{size}" if size > 1 else ""
        sizes = f"{self.problem.channels_out} x {self.problem.height}x{self.problem.width}{kernel}"
        dtype = "" if self.problem.dtype == "float16" else f" {self.problem.dtype}"
        return f"{kind} {sizes} {self.problem.activation}{dtype}, batch {self.images}"


def batches(dtype: str = "float16", only: str = "") -> Iterator[Batch]:
    """Yield the published models' layers: large batches first, then single images.

    Args:
        dtype: 16-bit, by name.
        only: what the name of a batch must have in it.
    """
    problems = list(published_problems(dtype))
    # Of 16 images the same is compiled as of 64: sizes count by whether 16 divides them.
    for images in (64, 1, 16):
        for problem in problems:
            if only in str(batch := Batch(problem, images)):
                yield batch


def published_problems(dtype: str) -> Iterator[Problem]:
    """Yield the ops of the published models' layers at 224 px."""
    for channels, side, kernel_size, activation in (
        (768, 32, 7, "relu"),
        (1536, 32, 9, "gelu"),
        (1024, 16, 9, "gelu"),
    ):
        shape = channels, channels, side, side
        yield Problem("depthwise_block", *shape, kernel_size, activation, dtype)
        yield Problem("pointwise_block", *shape, 1, activation, dtype)


def _tiny_batches() -> Iterator[Batch]:
    """Yield two that Triton's interpreter can compute."""
    yield Batch(Problem("depthwise_block", 2, 2, 8, 8, 3, "relu", "float16"), 2)
    yield Batch(Problem("pointwise_block", 16, 16, 4, 4, 1, "gelu", "float16"), 2)


def chosen_batches(arguments: argparse.Namespace) -> Iterator[Batch]:
    """Yield those that ``options.add_batch_options`` chose."""
    return _tiny_batches() if arguments.rehearse else batches(arguments.dtype, arguments.only)


def tiles_for(batch: Batch, device: torch.device) -> Iterator[Tile]:
    """Yield the candidates of a problem that can be fast for so many images."""
    problem, images = batch
    if problem.op == "depthwise_block":
        for tile in depthwise_candidates(problem.kernel_size, torch.float16):
            # Direct tiles take four times the instructions: kernels/NOTES.md.
            if isinstance(tile, ToeplitzTile) and _suits(tile, images):
                yield tile
        return
    tma = has_tma(capability(torch.empty(0, device=device)))
    for product in pointwise_candidates(torch.float16, tma):
        area, persistent = product.BLOCK_O * product.BLOCK_HW, getattr(product, "PERSISTENT", False)
        if images == 1 and area <= 128 * 128 and not persistent:
            yield product
        if images > 1 and min(product.BLOCK_O, product.BLOCK_HW) >= 128:
            yield product


def _suits(tile: ToeplitzTile, images: int) -> bool:
    if images == 1:
        return tile.max_rows <= 8 and tile.BLOCK_N <= 16
    return tile.max_rows >= (8 if images < 64 else 16) and tile.BLOCK_N >= 16
