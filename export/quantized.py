"""A ConvMixer in 8-bit numbers for the CPU engine: those of ``to_onnx``'s int8 file."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.choices import CalibrationMethod
from convmixer_fast.export.onnx_export import OnnxReport, to_onnx
from convmixer_fast.folding import fold
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.spec import FoldedBlock, FoldedConvMixer, FoldedLayer, Quantization

__all__ = ["QuantizationReport", "quantized"]


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantised, and what that costs, on the images of the calibration."""

    method: str
    """Of the calibration."""
    images: int
    layers: Mapping[str, Any]
    """The error of each quantised convolution; see :class:`onnx_quantize.LayerError`."""
    error: float
    """Largest difference of the outputs from the float64 model's, over the largest output."""
    same_as_float32: float | None
    """Share of images whose largest output is at the same place as before quantisation; None where
    outputs are no (N, classes)."""
    accuracy: Mapping[str, float]
    """Share of ``validation`` that is right, of the ``"model"`` and ``"quantized"``."""


def quantized(
    model: nn.Module,
    calibration: Tensor,
    *,
    method: CalibrationMethod = "minmax",
    validation: tuple[Tensor, Tensor] | None = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> tuple[FoldedConvMixer, QuantizationReport]:
    """Return ``model`` folded, with stem and pointwise convolutions in 8-bit numbers.

    They are those of the file that :func:`to_onnx` writes with ``precision="int8"`` and the same
    images, for ONNX Runtime; what it rounds besides, results of convolutions and biases, is not
    rounded here. Depthwise convolutions and the head stay in float32.

    Args:
        model: see :func:`convmixer_fast.optimize`; its weights are quantised as float32.
        calibration: images as the model takes them, (N, C, H, W), some hundred.
        method: ``"minmax"``, ``"percentile"`` or ``"entropy"``.
        validation: images and their classes (N,), on which accuracy is measured.
        example_input: see :func:`convmixer_fast.optimize`.
        progress: whether to show on the terminal what is going on.

    Raises:
        UnsupportedModelError, ValueError, MismatchError: as :func:`to_onnx`.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    if not isinstance(calibration, Tensor) or calibration.dim() != 4:
        found = getattr(calibration, "shape", type(calibration).__name__)
        raise ValueError(f"calibration must be images (N, C, H, W), got {found}")
    with torch.inference_mode(False), torch.no_grad():
        spec = recognize(model, example_input)
        folded = fold(spec, torch.float32)
    height, width = (calibration.shape[spec.input_layout.index(side)] for side in "HW")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = to_onnx(
            model,
            path,
            image_size=(height, width),
            precision="int8",
            dynamic_batch=False,  # which not every model can leave open
            calibration=calibration,
            calibration_method=method,
            validation=validation,
            example_input=example_input,
            progress=progress,
        )
        numbers = _read(path)
    stem = _quantized(folded.stem, numbers["stem/Conv"])
    # Layers that the source shares between positions stay shared.
    done: dict[int, FoldedLayer] = {}
    for index, layer in enumerate(folded.layers):
        if id(layer) not in done:
            block = _quantized(layer.pointwise, numbers[f"layers.{index}.pointwise/Conv"])
            done[id(layer)] = replace(layer, pointwise=block)
    layers = tuple(done[id(layer)] for layer in folded.layers)
    return replace(folded, stem=stem, layers=layers), _report(report, method, len(calibration))


def _report(report: OnnxReport, method: str, images: int) -> QuantizationReport:
    names = {"model": "model", "file": "quantized"}
    return QuantizationReport(
        method=method,
        images=images,
        layers=report.layers,
        error=report.checks[0].error,
        same_as_float32=report.same_as_float32,
        accuracy={names[name]: share for name, share in report.accuracy.items()},
    )


def _quantized(block: FoldedBlock, numbers: tuple[Tensor, Quantization]) -> FoldedBlock:
    weight, quantization = numbers
    device = block.weight.device
    moved = {name: tensor.to(device) for name, tensor in vars(quantization).items()}
    return replace(block, weight=weight.to(device), quantization=Quantization(**moved))


def _read(path: Path) -> dict[str, tuple[Tensor, Quantization]]:
    """Return the 8-bit weights of a file's convolutions, by node, and what they stand for."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    read_by = {name: node for node in graph.node for name in node.input}

    def values(node: Any, first: int) -> list[Tensor]:
        arrays = (numpy_helper.to_array(stored[name]) for name in node.input[first:])
        return [torch.from_numpy(array.copy()) for array in arrays]

    found = {}
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in made_by:
            continue  # what is not quantised has its weights stored
        weight, weight_scale, _ = values(made_by[node.input[1]], 0)
        found[node.name] = (
            weight,
            Quantization(
                weight_scale,
                *values(made_by[node.input[0]], 1),
                *values(read_by[node.output[0]], 1),
            ),
        )
    return found
