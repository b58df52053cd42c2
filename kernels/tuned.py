"""What a sweep on a device has chosen for a network: tiles, and how many images at a time.

Plain data, made by :mod:`convmixer_fast.tuning`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

__all__ = ["DepthwiseTile", "PointwiseTile", "Problem", "Tile", "Tuned", "TunedFor", "choices_for"]
__all__ += ["device_name"]

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


TunedFor = tuple[str, torch.dtype, tuple[int, ...]]
"""What choices are for: a device by name, a dtype, and the shape of the patch embedding's input.

Plain, as :meth:`Tuned.to_json` is: modules keep both, and are unpickled where there is no Triton.
"""


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model, or ``"cpu"`` for Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choices_for(
    kept: Mapping[TunedFor, Mapping[str, Any]], device: torch.device, dtype: torch.dtype
) -> dict[tuple[int, ...], Tuned]:
    """Return the choices for a device and a dtype, by shape."""
    if not kept:
        return {}
    name = device_name(device)
    return {
        shape: Tuned.from_json(plain)
        for (device_of, dtype_of, shape), plain in kept.items()
        if (device_of, dtype_of) == (name, dtype)
    }
