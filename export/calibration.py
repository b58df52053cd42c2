"""Calibration images, given to ONNX Runtime in batches whose activations are few."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from onnxruntime import quantization
from torch import Tensor

__all__ = ["Batches", "batch_within"]

_MOST_BYTES = 256 * 2**20
"""Of all that a batch computes on the way: the calibration holds it once or twice."""
_LARGEST_BATCH = 16


def batch_within(graph: Any, images: Tensor) -> int:
    """Return how many images at a time take little memory, from the shapes in ``graph``.

    Args:
        graph: with the shapes that :func:`onnx.shape_inference.infer_shapes` finds. Sizes that are
            open are taken for those of the images.
        images: (N, C, H, W).
    """
    fixed = graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if fixed:
        return int(fixed)
    numbers = 0
    for value in graph.value_info:
        dims = value.type.tensor_type.shape.dim[1:]
        # What is open is at most as large as the image's side.
        sides = [dim.dim_value or max(images.shape[1:]) for dim in dims]
        numbers += int(np.prod(sides, dtype=np.int64))
    return max(1, min(_LARGEST_BATCH, _MOST_BYTES // max(1, 4 * numbers)))


class Batches(quantization.CalibrationDataReader):
    """Gives the calibration its images, batch by batch.

    Args:
        images: (N, C, H, W).
        batch: how many at a time; the last batch may be smaller, unless the batch is fixed.
        name: of the file's input.
        fixed: whether the file takes no other batch: what is left over is not used then.
        report: told how far it is.
    """

    def __init__(
        self,
        images: Tensor,
        batch: int,
        name: str,
        *,
        fixed: bool,
        report: Callable[[str], None] = lambda what: None,
    ) -> None:
        if fixed and len(images) < batch:
            raise ValueError(
                f"calibration must be at least one batch of {batch} images, got {len(images)}"
            )
        whole = len(images) // batch * batch if fixed else len(images)
        self._parts = images[:whole].split(batch)
        self._name, self._report = name, report
        self._given = 0
        self._chosen: Iterator[Tensor] = iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the batches from one number to another next."""
        self._chosen = iter(self._parts[start_index:end_index])

    def get_next(self) -> Mapping[str, Any] | None:
        """Return one batch; None at the end."""
        part = next(self._chosen, None)
        if part is None:
            return None
        self._given += len(part)
        total = sum(map(len, self._parts))
        self._report(f"calibrating: {min(self._given, total)} of {total} images")
        return {self._name: part.numpy()}
