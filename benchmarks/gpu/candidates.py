"""Which tiles are worth a GPU's minutes, for which problems and batches."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from convmixer_fast.benchmarks.tune import published_problems
from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.launch import capability
from convmixer_fast.kernels.pointwise_block import has_tma
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Problem, Tile

__all__ = ["TILES", "Batch", "batches", "tiles_for", "tiny_batches"]

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
        return f"{kind} {sizes} {self.problem.activation}, batch {self.images}"


def batches() -> Iterator[Batch]:
    """Yield the published models' layers in float16: large batches first, then single images."""
    problems = list(published_problems("float16"))
    # Of 16 images the same is compiled as of 64: sizes count by whether 16 divides them.
    for images in (64, 1, 16):
        for problem in problems:
            yield Batch(problem, images)


def tiny_batches() -> Iterator[Batch]:
    """Yield two that Triton's interpreter can compute."""
    yield Batch(Problem("depthwise_block", 2, 2, 8, 8, 3, "relu", "float16"), 2)
    yield Batch(Problem("pointwise_block", 16, 16, 4, 4, 1, "gelu", "float16"), 2)


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
