"""Damaged pictures of every kind that Pillow writes here: a tensor, or an ``OSError``."""

import io
import random
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from convmixer_fast.models.images import load_image
from convmixer_fast.models.preprocessing import Preprocessing
from tests.fuzz.mutations import damaged

__all__ = ["KINDS", "check_image", "good_files"]

KINDS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO", "DDS", "JPEG2000")
KINDS += ("AVIF",) if features.check("avif") else ()
_PREPARED = Preprocessing(16, 0.9, (0.5,), (0.5,))


def check_image(seed: int, folder: Path) -> str:
    """Read a picture that follows from the seed.

    Returns:
        ``"read"`` or ``"refused"``.

    Raises:
        AssertionError: what was read is no image.
    """
    chance = random.Random(seed)
    content = chance.choice(good_files())
    if chance.random() < 0.98:
        content = damaged(content, chance)
    path = folder / f"picture{chance.choice(('.png', '.jpg', '.tif', '.avif', ''))}"
    path.write_bytes(content)
    channels = chance.choice((1, 3, 3, 4))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it finds
            image = load_image(path, _PREPARED, channels)
    except OSError as error:
        assert str(path) in str(error)
        return "refused"
    assert image.shape == (channels, 16, 16)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    return "read"


@cache
def good_files() -> list[bytes]:
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (37, 29, 3), np.uint8)
    picture = Image.fromarray(pixels)
    for kind in KINDS:
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16"):
            file = io.BytesIO()
            try:
                picture.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind)
            except (OSError, ValueError, KeyError):
                continue  # a kind without such pixels
            found.append(file.getvalue())
    for kind, options in (
        ("JPEG", {"progressive": True, "quality": 30}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("GIF", {"save_all": True, "append_images": [picture.rotate(9)]}),
        ("PNG", {"save_all": True, "append_images": [picture.rotate(9)]}),
        ("WEBP", {"lossless": True}),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append(file.getvalue())
    return found
