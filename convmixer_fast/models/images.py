"""Image files -> model input, as timm prepares them for evaluation.

Resize the shorter side (bicubic), crop the centre, scale to [0, 1], normalise:
timm's ``create_transform(..., is_training=False)`` with ``crop_mode="center"``. A picture more than
32 times as long as wide is first cut to that about its middle, of which the crop is a part; one
whose EXIF data say that it is turned is turned upright.
"""

import json
import math
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from convmixer_fast.models.preprocessing import Preprocessing

__all__ = [
    "crop",
    "find_images",
    "load_image",
    "parse_labels",
    "read_labels",
    "to_input",
]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LONGEST = 32
"""Times the shorter side: what is longer is cut to that before it is resized, which could take any
amount of memory for a picture of one row."""
_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def load_image(path: str | Path, preprocessing: Preprocessing, in_chans: int = 3) -> Tensor:
    """Read one image file as a model input.

    Args:
        path: anything that Pillow reads.
        preprocessing: sizes in pixels; mean and std of pixels in [0, 1].
        in_chans: 1 (grey), 3 (RGB) or 4 (RGBA).

    Returns:
        (in_chans, image_size, image_size), float32.

    Raises:
        OSError: the file is missing, damaged or no image.
        ValueError: no image has ``in_chans`` channels, or ``mean`` or ``std`` have others.
    """
    if in_chans not in _MODES:
        raise ValueError(f"images have 1, 3 or 4 channels, and the model takes {in_chans}")
    for name in ("mean", "std"):
        values = getattr(preprocessing, name)
        if len(values) not in (1, in_chans):
            wanted = "1 value" if in_chans == 1 else f"1 or {in_chans} values"
            raise ValueError(f"{name} must have {wanted}, got {len(values)}")
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is no regular file, and reading it could wait for ever")
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(
                    f"its pixels have the mode {file.mode}, more than 8 bits a channel, which "
                    "Pillow would clip; convert it to 8 bits first"
                )
            file.load()  # of damaged pixels Pillow complains once: not where it is passed over
            upright = ImageOps.exif_transpose(file) if _is_turned(file) else file
            image = upright.convert(_MODES[in_chans])
    except Exception as error:  # readers of damaged files raise what they like
        reason = str(error) or type(error).__name__
        raise OSError(f"cannot read the image {path}: {reason}") from error
    return to_input(crop(image, preprocessing), preprocessing)


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF data say that the camera was; what is damaged there says nothing."""
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    except Exception:  # readers of damaged files raise what they like
        return False


def crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize ``image`` and cut the centre out, image_size x image_size pixels."""
    size = preprocessing.image_size
    shorter = min(image.size)
    longest = [min(side, _LONGEST * shorter) for side in image.size]
    if longest != list(image.size):
        left, top = ((side - kept) // 2 for side, kept in zip(image.size, longest, strict=True))
        image = image.crop((left, top, left + longest[0], top + longest[1]))
    return _center_crop(_resize(image, math.floor(size / preprocessing.crop_pct)), size)


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return the normalised pixels of a cropped image, (channels, height, width), float32."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels.reshape(image.height, image.width, -1)
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()


def _resize(image: Image.Image, shorter: int) -> Image.Image:
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    size = (shorter, longer) if width <= height else (longer, shorter)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def find_images(paths: Sequence[Path], listed: Iterable[str] = ()) -> list[Path]:
    """Return the files of ``paths``, directories replaced by the image files inside, sorted.

    Args:
        paths: files and directories; ``-`` stands for those of ``listed``.
        listed: a path a line.

    Raises:
        FileNotFoundError: a directory holds no image file.
    """
    found: list[Path] = []
    for path in paths:
        if str(path) == "-":
            lines = (line.rstrip("\r\n") for line in listed)
            found.extend(find_images([Path(line) for line in lines if line and line != "-"]))
            continue
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"no image files in the directory {path}")
        found.extend(inside)
    return found


def read_labels(path: str | Path) -> list[str]:
    """Read class names: one a line, or a JSON list, or a JSON object of index to name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is JSON of another form.
    """
    return parse_labels(Path(path).read_text(encoding="utf-8"), path)


def parse_labels(text: str, source: object) -> list[str]:
    """Read class names as :func:`read_labels` does, from ``text`` that came from ``source``.

    Raises:
        ValueError: it is JSON of another form, or broken.
    """
    if not text.lstrip().startswith(("[", "{")):
        return text.splitlines()
    try:
        labels = json.loads(text)
        if isinstance(labels, dict):
            labels = [labels[str(index)] for index in range(len(labels))]
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: the labels are broken JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{source}: expected the keys 0, 1, 2 ..., {error} is missing") from error
    return [str(label) for label in labels]
