"""scikit-learn's handwritten digits, split as the packaged model was trained on them."""

from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from convmixer_fast.models.checkpoint import load, read_checkpoint
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.models.preprocessing import Preprocessing, preprocessing_from_metadata
from convmixer_fast.support.optional import need

__all__ = [
    "Digits",
    "digits_model",
    "held_out_digits",
    "split_digits",
    "training_digits",
]

_CHECKPOINT = resources.files("convmixer_fast") / "data" / "digits.safetensors"


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: scans of 8 x 8 pixels."""

    images: Tensor
    """(N, 1, 8, 8), float32, from 0 (paper) to 1 (ink)."""
    labels: Tensor
    """(N,), int64: the digit written."""

    def accuracy(self, logits: Tensor) -> float:
        """Return the share of the digits, from 0 to 1, that ``logits`` (N, 10) are right about."""
        return float((logits.argmax(1) == self.labels).double().mean())


def digits_model() -> tuple[ConvMixer, Preprocessing]:
    """Return the trained model that ships with this package, and how its images are prepared."""
    with resources.as_file(_CHECKPOINT) as path:
        return load(path), preprocessing_from_metadata(read_checkpoint(path).metadata)


def split_digits(digits: Digits, held_out_share: float) -> tuple[Digits, Digits]:
    """Split ``digits`` into a first part and a held-out one with the same share of each digit."""
    selection = need("sklearn.model_selection", "reading scikit-learn's digits", "demo")
    first, held_out = selection.train_test_split(
        np.arange(len(digits.labels)),
        test_size=held_out_share,
        random_state=0,
        stratify=digits.labels.numpy(),
    )
    return (
        Digits(digits.images[first], digits.labels[first]),
        Digits(digits.images[held_out], digits.labels[held_out]),
    )


def training_digits() -> Digits:
    """Return the digits that the packaged model was trained on."""
    return split_digits(_all_digits(), held_out_share=0.25)[0]


def held_out_digits() -> Digits:
    """Return the digits that the packaged model has never seen, always the same ones."""
    return split_digits(_all_digits(), held_out_share=0.25)[1]


def _all_digits() -> Digits:
    bunch = need("sklearn.datasets", "reading scikit-learn's digits", "demo").load_digits()
    images = torch.from_numpy(bunch.images / bunch.images.max()).float()
    return Digits(images[:, None], torch.from_numpy(bunch.target).long())
