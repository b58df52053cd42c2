"""Image files -> class probabilities, in batches; a file that cannot be read stops nothing."""

import collections
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from convmixer_fast.models.images import load_image
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.runtime.fused import FusedConvMixer

__all__ = ["predict_files"]

_AHEAD = 2
"""Batches that are being read while one is computed: memory for as many."""


def predict_files(
    model: FusedConvMixer, files: Sequence[Path], preprocessing: Preprocessing, batch: int = 16
) -> Iterator[tuple[Path, Tensor | OSError]]:
    """Yield each file, in order, with its probabilities (num_classes,), float32, on the CPU.

    A file that is missing, damaged or no image is yielded with the error instead. Threads read
    files while the model computes.

    Raises:
        ValueError: the model's channels, or the preprocessing's, are not an image's.
    """
    like = next(model.parameters())
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        try:
            for chunk, images in _batches(readers, files, preprocessing, model.in_chans, batch):
                good = [image for image in images if isinstance(image, Tensor)]
                if good:
                    with torch.inference_mode():
                        logits = model(torch.stack(good).to(like.device, like.dtype))
                    rows = iter(logits.float().softmax(-1).cpu())
                for path, image in zip(chunk, images, strict=True):
                    yield path, image if isinstance(image, OSError) else next(rows)
        finally:
            # Whoever stops listening does not wait for what nobody will see.
            readers.shutdown(wait=False, cancel_futures=True)


def _batches(
    readers: ThreadPoolExecutor,
    files: Sequence[Path],
    preprocessing: Preprocessing,
    in_chans: int,
    batch: int,
) -> Iterator[tuple[Sequence[Path], list[Tensor | OSError]]]:
    """Yield files and what was read of them, with those of the next batches begun."""
    begun: collections.deque[tuple[Sequence[Path], list[Future[Tensor | OSError]]]]
    begun = collections.deque()
    for start in range(0, len(files), batch):
        chunk = files[start : start + batch]
        begun.append(
            (chunk, [readers.submit(_load, path, preprocessing, in_chans) for path in chunk])
        )
        if len(begun) > _AHEAD:
            paths, reading = begun.popleft()
            yield paths, [one.result() for one in reading]
    for paths, reading in begun:
        yield paths, [one.result() for one in reading]


def _load(path: Path, preprocessing: Preprocessing, in_chans: int) -> Tensor | OSError:
    try:
        return load_image(path, preprocessing, in_chans)
    except OSError as error:
        return error
