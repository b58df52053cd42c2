"""Image files -> class probabilities, in batches; a file that cannot be read stops nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from convmixer_fast.models.images import load_image
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.runtime.fused import FusedConvMixer

__all__ = ["predict_files"]


def predict_files(
    model: FusedConvMixer, files: Sequence[Path], preprocessing: Preprocessing, batch: int = 16
) -> Iterator[tuple[Path, Tensor | OSError]]:
    """Yield each file, in order, with its probabilities (num_classes,), float32, on the CPU.

    A file that is missing, damaged or no image is yielded with the error instead.

    Raises:
        ValueError: the model's channels, or the preprocessing's, are not an image's.
    """
    like = next(model.parameters())
    for start in range(0, len(files), batch):
        chunk = files[start : start + batch]
        images = [_load(path, preprocessing, model.in_chans) for path in chunk]
        good = [image for image in images if isinstance(image, Tensor)]
        if good:
            with torch.inference_mode():
                logits = model(torch.stack(good).to(like.device, like.dtype))
            rows = iter(logits.float().softmax(-1).cpu())
        for path, image in zip(chunk, images, strict=True):
            yield path, image if isinstance(image, OSError) else next(rows)


def _load(path: Path, preprocessing: Preprocessing, in_chans: int) -> Tensor | OSError:
    try:
        return load_image(path, preprocessing, in_chans)
    except OSError as error:
        return error
