"""What a sweep on a device has chosen for a network: tiles, and how many images at a time.

Plain data, made by :mod:`convmixer_fast.tuning`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

__all__ = ["DepthwiseTile", "PointwiseTile", "Problem", "Tile", "Tuned"]

DepthwiseTile = ToeplitzTile | DirectTile
PointwiseTile = PointerTile | TmaTile
Tile = DepthwiseTile | PointwiseTile

_TILES: dict[str, type[Any]] = {
    tile.__name__: tile for tile in (ToeplitzTile, DirectTile, PointerTile, TmaTile)
}


class Problem(NamedTuple):
    """One kernel of a network, whatever the batch."""

    op: str
    """``"depthwise_block"`` or ``"pointwise_block"``, which the patch embedding is as well."""
    channels_in: int
    channels_out: int
    height: int
    """Of the result."""
    width: int
    kernel_size: int
    activation: str
    dtype: str
    """``"float16"``, ``"bfloat16"`` or ``"float32"``."""


class Tuned(NamedTuple):
    """The choices for one shape of input."""

    chunk: int | None
    """Images computed at a time; None for all."""
    tiles: Mapping[Problem, Tile]

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, numbers and names."""
        tiles = [
            [list(problem), type(tile).__name__, list(tile)] for problem, tile in self.tiles.items()
        ]
        return {"chunk": self.chunk, "tiles": tiles}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Tuned":
        """Return what :meth:`to_json` was called on.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is something else.
        """
        tiles = {Problem(*problem): _TILES[name](*tile) for problem, name, tile in data["tiles"]}
        return Tuned(data["chunk"], tiles)
