"""What a sweep on a device has chosen for a network: tiles, and how many images at a time.

Plain data, made by :mod:`convmixer_fast.runtime.tuning`.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.launch import fp32_input_precision
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

__all__ = ["DepthwiseTile", "PointwiseTile", "Problem", "Tile", "Tuned", "TunedFor", "choices_for"]
__all__ += ["device_name", "tuned_for"]

DepthwiseTile = ToeplitzTile | DirectTile
PointwiseTile = PointerTile | TmaTile
Tile = DepthwiseTile | PointwiseTile

_log = logging.getLogger("convmixer_fast")

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
        """Return plain lists, dictionaries, numbers and names."""
        tiles = [
            [problem._asdict(), type(tile).__name__, tile._asdict()]
            for problem, tile in self.tiles.items()
        ]
        return {"chunk": self.chunk, "tiles": tiles}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Tuned":
        """Return what :meth:`to_json` was called on.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is something else.
        """
        tiles = {Problem(**problem): _TILES[name](**tile) for problem, name, tile in data["tiles"]}
        return Tuned(data["chunk"], tiles)


TunedFor = tuple[str, torch.dtype, str, tuple[int, ...]]
"""What choices are for: a device by name, a dtype, what float32 products are (``"tf32"`` or
``"ieee"``; empty for other dtypes), and the shape of the patch embedding's input.

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
    *here, _ = tuned_for(device, dtype, ())
    found = {}
    for (*where, shape), plain in kept.items():
        if where != here:
            continue
        try:
            found[shape] = Tuned.from_json(plain)
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("what was tuned for %s is of another version: %s", shape, error)
    return found


def tuned_for(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> TunedFor:
    """Return what choices made here and now are for."""
    products = fp32_input_precision() if dtype == torch.float32 else ""
    return device_name(device), dtype, products, shape
