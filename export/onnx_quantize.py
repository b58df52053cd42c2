"""Int8: explicit QuantizeLinear and DequantizeLinear, placed by ONNX Runtime's quantiser."""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization import qdq_loss_debug
from torch import Tensor

__all__ = ["METHODS", "LayerError", "quantize"]

METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""Of calibration: ONNX Runtime's names."""
_PERCENTILE = 99.99
_BATCH = 16


@dataclass(frozen=True)
class LayerError:
    """How far a quantised convolution is from the float32 one, as signal to noise, in decibels.

    10 dB more is a tenth of the noise's power; 8 bits of uniform numbers have about 50 dB.
    """

    weight_db: float
    """Of its weights."""
    rounding_db: float
    """Of rounding its result to 8 bits."""
    result_db: float
    """Of its result, with all that came before it quantised too."""


def quantize(
    path: Path,
    calibration: Tensor,
    method: str,
    target: str,
    *,
    depthwise: bool,
    external_data: bool,
) -> dict[str, LayerError]:
    """Quantise the convolutions of a float32 file, in place.

    Weights are symmetric by output channel. Activations have one scale each: unsigned with a zero
    point for ONNX Runtime, whose weights have 7 bits, because processors without VNNI add
    pairs of products in 16; symmetric for TensorRT, which takes no other.

    Args:
        path: of the file.
        calibration: images (N, C, H, W).
        method: a name of :data:`METHODS`.
        target: ``"onnxruntime"`` or ``"tensorrt"``.
        depthwise: whether the depthwise convolutions are quantised too.
        external_data: whether weights are to be a file of their own.

    Returns:
        The error of each quantised convolution, by the name of its node, on the calibration images.

    Raises:
        ValueError: ``method`` is unknown, or there are fewer images than a fixed batch has.
    """
    if method not in METHODS:
        raise ValueError(
            f"calibration_method must be one of {', '.join(map(repr, METHODS))}, got {method!r}"
        )
    import onnx

    ort: Any = quantization
    tensorrt = target == "tensorrt"
    graph = onnx.load(path).graph
    batch = _fixed_batch(graph)
    chosen = [
        node.name
        for node in graph.node
        if node.op_type == "Conv" and (depthwise or _groups(node) == 1)
    ]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        made = Path(folder) / path.name
        ort.quantize_static(
            path,
            made,
            _Reader(calibration, batch, graph.input[0].name),
            quant_format=ort.QuantFormat.QDQ,
            nodes_to_quantize=chosen,
            per_channel=True,
            reduce_range=not tensorrt,
            weight_type=ort.QuantType.QInt8,
            activation_type=ort.QuantType.QInt8 if tensorrt else ort.QuantType.QUInt8,
            calibrate_method=getattr(ort.CalibrationMethod, METHODS[method]),
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": tensorrt,
                "AddQDQPairToWeight": tensorrt,
                "QuantizeBias": not tensorrt,
                "CalibPercentile": _PERCENTILE,
            },
        )
        errors = _layer_errors(path, made, calibration[: batch or 1], chosen)
        made.replace(path)
    if external_data:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")
    return errors


def _groups(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _fixed_batch(graph: Any) -> int | None:
    size = graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return int(size) or None


class _Reader(quantization.CalibrationDataReader):
    """Gives ONNX Runtime's calibration its images, batch by batch."""

    def __init__(self, images: Tensor, batch: int | None, name: str) -> None:
        self._name = name
        # Of one size: the histograms' calibration puts them side by side.
        size = batch or next(n for n in range(_BATCH, 0, -1) if len(images) % n == 0)
        if len(images) < size:
            raise ValueError(
                f"calibration must be at least one batch of {size} images, got {len(images)}"
            )
        # What is left of a fixed batch is not used.
        self._batches = iter(images[: len(images) // size * size].split(size))

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return one batch; None at the end."""
        images = next(self._batches, None)
        return None if images is None else {self._name: images.numpy()}


def _layer_errors(
    exact: Path, quantized: Path, images: Tensor, chosen: Sequence[str]
) -> dict[str, LayerError]:
    """Compare results and weights of the convolutions in both files."""
    import onnx

    matched = qdq_loss_debug.create_weight_matching(str(exact), str(quantized))
    weights = qdq_loss_debug.compute_weight_error(matched)
    truth, found = (_activations(path, images) for path in (exact, quantized))
    errors = {}
    for node in onnx.load(exact, load_external_data=False).graph.node:
        if node.name not in chosen:
            continue
        name = node.output[0]
        # Where a result is rounded, what stands before and behind has names of its own.
        before = found.get(f"{name}_QuantizeLinear_Input", found.get(name))
        behind = found.get(f"{name}_DequantizeLinear_Output", found.get(name))
        errors[node.name] = LayerError(
            weights.get(node.input[1], math.nan),
            _decibels(before, behind),
            _decibels(truth[name], behind),
        )
    return errors


def _activations(path: Path, images: Tensor) -> dict[str, Any]:
    """Return all that a file computes on the way, by name."""
    import onnx

    name = onnx.load(path, load_external_data=False).graph.input[0].name
    augmented = path.with_name(f"augmented-{path.name}")
    qdq_loss_debug.modify_model_output_intermediate_tensors(path, augmented)
    found: dict[str, Any] = qdq_loss_debug.collect_activations(
        str(augmented), _Reader(images, len(images), name)
    )
    augmented.unlink()
    return found


def _decibels(truth: Any, found: Any) -> float:
    if truth is None or found is None:
        return math.nan
    return float(qdq_loss_debug.compute_signal_to_quantization_noice_ratio(truth, found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The quantiser prints, and logs on the root logger that files should be preprocessed.
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
