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
    for images in (64, 1):
        for problem in problems:
            yield Batch(problem, images)


def tiny_batches() -> Iterator[Batch]:
    """Yield two that Triton's interpreter can compute."""
    yield Batch(Problem("depthwise_block", 2, 2, 8, 8, 3, "relu", "float16"), 2)
    yield Batch(Problem("pointwise_block", 16, 16, 4, 4, 1, "gelu", "float16"), 2)


def tiles_for(batch: Batch, device: torch.device) -> Iterator[Tile]:
    """Yield the candidates of a problem that can be fast for so many images."""
    problem, few = batch.problem, batch.images < 8
    if problem.op == "depthwise_block":
        for tile in depthwise_candidates(problem.kernel_size, torch.float16):
            if isinstance(tile, DirectTile):
                continue  # four times the instructions: kernels/NOTES.md
            if few and (tile.max_rows > 16 or tile.BLOCK_N > 16):
                continue
            if not few and tile.max_rows < 8:
                continue
            yield tile
        return
    tma = has_tma(capability(torch.empty(0, device=device)))
    for product in pointwise_candidates(torch.float16, tma):
        area = product.BLOCK_O * product.BLOCK_HW
        if (area <= 128 * 128) if few else (area >= 128 * 128):
            if few and getattr(product, "PERSISTENT", False):
                continue
            yield product
