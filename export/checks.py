"""Does what was exported compute what the model does? Against the model in float64."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convmixer_fast.accuracy import exact, relative_error
from convmixer_fast.errors import MismatchError, UnsupportedModelError
from convmixer_fast.export.preparation import Sizes
from convmixer_fast.models.images import crop, to_input
from convmixer_fast.models.outputs import named_tensors
from convmixer_fast.models.preprocessing import Preprocessing

__all__ = [
    "LIMITS",
    "Check",
    "ExportReport",
    "as_images",
    "as_labelled",
    "check_outputs",
    "photographs",
]
__all__ += ["random_images"]

LIMITS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1, "int8": 0.5}
"""Largest error of an export, relative to the largest output. That of int8 only keeps out what is
not the model any more: how much one loses depends on it, and stands in the report."""


@dataclass(frozen=True)
class Check:
    """One comparison with the model in float64."""

    images: str
    """``"random"``, ``"real"`` or ``"calibration"``."""
    count: int
    error: float
    """Largest difference over the largest output."""
    same_top1: float
    """Share of images whose largest output is at the same place; NaN where outputs are no
    (N, classes)."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model in float64."""

    path: Path
    precision: str
    checks: tuple[Check, ...]
    """One for each kind of images: the largest error, relative to the largest output."""


def check_outputs(
    run: Callable[[Tensor], list[Tensor]],
    model: nn.Module,
    example: Tensor,
    images: Mapping[str, Tensor],
    precision: str,
) -> tuple[Check, ...]:
    """Compare what ``run`` returns with the model in float64.

    Args:
        run: the export: from a batch like ``example`` to its outputs.
        model: the source model, of any dtype and device; it is only read.
        example: an input of the export; its values do not matter. Where it is one image, the
            batches are given image by image.
        images: batches (N, C, H, W) by name.
        precision: a name of :data:`LIMITS`.

    Raises:
        MismatchError: an output is too far from the model's.
    """
    in_float64 = exact(model).cpu()
    checks = []
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for kind, batch in images.items():
            given = batch.to(example.dtype)
            parts = given.split(1 if len(example) == 1 else len(given))
            found = [run(part) for part in parts]
            truth = [_truth(in_float64, part) for part in parts]
            check = _compare(kind, found, truth)
            checks.append(check)
            if not check.error <= LIMITS[precision]:  # a NaN is not
                raise MismatchError(
                    f"the export's outputs on {kind} images are {check.error:.1e} of the largest "
                    f"output away from the model's in float64; {precision} may be "
                    f"{LIMITS[precision]:.0e} away. No file was kept"
                )
    return tuple(checks)


def _truth(in_float64: nn.Module, images: Tensor) -> list[Tensor]:
    given = images.double() if images.is_floating_point() else images
    try:
        return [tensor for _, tensor in named_tensors(in_float64(given))]
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the model does not run in float64, in which an export is checked ({error}): its own "
            "code casts to another dtype; use its input's, x.to(other.dtype)"
        ) from error


def _compare(kind: str, found: list[list[Tensor]], truth: list[list[Tensor]]) -> Check:
    whole = [torch.cat(outputs) for outputs in zip(*found, strict=True)]
    exact = [torch.cat(outputs) for outputs in zip(*truth, strict=True)]
    same = float("nan")
    if len(whole) == 1 and whole[0].dim() == 2:
        same = float((whole[0].argmax(1) == exact[0].argmax(1)).double().mean())
    return Check(kind, len(exact[0]), relative_error(whole, exact), same)


def as_images(name: str, images: object, example: Tensor, sizes: Sizes) -> Tensor:
    """Return ``images`` in float32, if the export takes them.

    Raises:
        ValueError: they are no finite numbers (N, C, H, W) like ``example``, at least one image.
    """
    wanted: list[object] = ["N", *example.shape[1:]]
    for name in "HW" if sizes.dynamic_size else "":
        wanted[sizes.layout.index(name)] = name
    found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    fits = (
        isinstance(images, Tensor)
        and images.dim() == 4
        and len(images) > 0
        and all(isinstance(w, str) or w == n for w, n in zip(wanted, images.shape, strict=True))
    )
    if not fits or not isinstance(images, Tensor):
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{name} must be a tensor of images ({text}), N at least 1, got {found}")
    if images.dtype == example.dtype == torch.uint8:
        return images.detach().cpu()
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(
            f"{name} must be finite floating-point numbers, prepared as the model takes them, got "
            f"{images.dtype}{'' if not images.is_floating_point() else ' with NaN or infinities'}"
        )
    return images.detach().cpu().float()


def as_labelled(
    validation: tuple[Tensor, Tensor], example: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Return images and their classes, if they fit each other and the export.

    Raises:
        ValueError: they do not.
    """
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise ValueError("validation must be two tensors: images (N, C, H, W) and classes (N,)")
    images, classes = validation
    images = as_images("validation", images, example, sizes)
    if not isinstance(classes, Tensor) or classes.shape != images.shape[:1]:
        found = tuple(classes.shape) if isinstance(classes, Tensor) else type(classes).__name__
        raise ValueError(f"validation needs a class for each of {len(images)} images, got {found}")
    return images, classes.cpu().long()


def random_images(example: Tensor) -> Tensor:
    """Return random numbers in the shape of ``example``, always the same: normal, or of pixels."""
    generator = torch.Generator().manual_seed(0)
    if example.dtype == torch.uint8:
        return torch.randint(256, example.shape, generator=generator, dtype=torch.uint8)
    return torch.randn(example.shape, generator=generator)


def photographs(
    example: Tensor, preprocessing: Preprocessing | None, layout: str = "NCHW"
) -> Tensor | None:
    """Return scikit-learn's photographs as inputs like ``example``; None where that cannot be."""
    channels, height, width = (example.shape[layout.index(name)] for name in "CHW")
    if channels != 3 or importlib.util.find_spec("sklearn") is None:
        return None
    from PIL import Image
    from sklearn.datasets import load_sample_images

    prepare = preprocessing or Preprocessing()
    side = max(height, width)
    prepare = Preprocessing(side, prepare.crop_pct, prepare.mean, prepare.std)
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    cropped = [crop(picture, prepare) for picture in pictures]
    if example.dtype == torch.uint8:
        inputs = torch.stack([torch.tensor(np.asarray(picture)) for picture in cropped])
        inputs = inputs.permute(0, 3, 1, 2)
    else:
        inputs = torch.stack([to_input(picture, prepare) for picture in cropped])
    inputs = inputs[:, :, :height, :width]
    return (inputs if layout == "NCHW" else inputs.permute(0, 2, 3, 1)).contiguous()
