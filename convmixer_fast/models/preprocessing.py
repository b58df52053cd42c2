"""How an image becomes an input, as plain data."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convmixer_fast.errors import CheckpointError

__all__ = ["Preprocessing", "preprocessing_from_metadata"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize the shorter side, crop the centre, normalise."""

    image_size: int = 224
    """Side of the crop, in pixels."""
    crop_pct: float = 0.96
    """Side of the crop over the shorter side of the resized image."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if not all(std > 0 for std in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")


def preprocessing_from_metadata(metadata: Mapping[str, str]) -> Preprocessing:
    """Return the preprocessing that a checkpoint's metadata states, ImageNet's where it is silent.

    Raises:
        CheckpointError: a value is not a JSON number, or list of numbers.
    """
    convert: dict[str, Callable[[Any], Any]] = {
        "image_size": int,
        "crop_pct": float,
        "mean": lambda values: tuple(map(float, values)),
        "std": lambda values: tuple(map(float, values)),
    }
    try:
        return Preprocessing(
            **{n: to(json.loads(metadata[n])) for n, to in convert.items() if n in metadata}
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's metadata states its preprocessing wrongly: {error}"
        ) from error
