"""Int8: explicit QuantizeLinear and DequantizeLinear, placed by ONNX Runtime's quantiser."""

import contextlib
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxruntime import quantization
from onnxruntime.quantization import qdq_loss_debug
from torch import Tensor

from convmixer_fast.choices import CalibrationMethod, OnnxTarget
from convmixer_fast.export.calibration import Batches, batch_within
from convmixer_fast.spec import FoldedBlock
from convmixer_fast.support.quiet import logging_by, printing_nothing

__all__ = ["LayerError", "quantize", "write_numbers"]

_METHODS: dict[CalibrationMethod, str] = {
    "minmax": "MinMax",
    "percentile": "Percentile",
    "entropy": "Entropy",
}
"""ONNX Runtime's names."""
_PERCENTILE = 99.99
_LOGGER = logging.getLogger("convmixer_fast.export.onnxruntime")
_LOGGER.setLevel(logging.ERROR)


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
    method: CalibrationMethod,
    target: OnnxTarget,
    *,
    depthwise: bool,
    external_data: bool,
    report: Callable[[str], None] = lambda what: None,
) -> dict[str, LayerError]:
    """Quantise the convolutions of a float32 file, in place.

    Weights are symmetric by output channel. Activations have one scale each: unsigned with a zero
    point for ONNX Runtime, whose weights have 7 bits, because processors without VNNI add
    pairs of products in 16; symmetric for TensorRT, which takes no other.

    Args:
        path: of the file.
        calibration: images (N, C, H, W).
        method: how the range of what occurs is chosen.
        target: ``"onnxruntime"`` or ``"tensorrt"``.
        depthwise: whether the depthwise convolutions are quantised too.
        external_data: whether weights are to be a file of their own.
        report: told how far it is.

    Images go through the network a few at a time, by the size of what it computes on the way, and
    of that only ranges or histograms are kept.

    Returns:
        The error of each quantised convolution, by the name of its node, on the calibration images.

    Raises:
        ValueError: there are fewer images than a fixed batch has.
    """
    import onnx

    ort: Any = quantization
    tensorrt = target == "tensorrt"
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    batch = batch_within(graph, calibration)
    fixed = bool(graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    images = Batches(calibration, batch, graph.input[0].name, fixed=fixed, report=report)
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
            images,
            quant_format=ort.QuantFormat.QDQ,
            nodes_to_quantize=chosen,
            op_types_to_quantize=["Conv"],  # whose tensors alone are then looked at
            per_channel=True,
            reduce_range=not tensorrt,
            weight_type=ort.QuantType.QInt8,
            activation_type=ort.QuantType.QInt8 if tensorrt else ort.QuantType.QUInt8,
            calibrate_method=getattr(ort.CalibrationMethod, _METHODS[method]),
            extra_options={
                **_options(tensorrt=tensorrt),
                "CalibPercentile": _PERCENTILE,
                # One batch is summed up before the next is computed.
                "CalibStridedMinMax": 1,
            },
        )
        report("comparing layers")
        errors = _layer_errors(path, made, calibration[: batch if fixed else 1], chosen)
        made.replace(path)
    if external_data:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")
    return errors


def write_numbers(path: Path, blocks: Mapping[str, FoldedBlock], *, external_data: bool) -> None:
    """Quantise the convolutions of a float32 file, in place, by numbers that are known.

    The file is the one that :func:`quantize` made for ONNX Runtime when they were chosen.

    Args:
        path: of the file.
        blocks: quantised ones, by the name of their node before ``/Conv``.
        external_data: whether weights are to be a file of their own.
    """
    import onnx
    from onnxruntime.quantization import calibrate, qdq_quantizer, quant_utils

    ort: Any = quantization
    model = quant_utils.load_model_with_shape_infer(path)
    overrides: dict[str, list[dict[str, Any]]] = {}
    ranges: dict[str, tuple[Any, Any]] = {}
    chosen = {f"{name}/Conv": block.quantization for name, block in blocks.items()}
    for node in model.graph.node:
        numbers = chosen.get(node.name)
        if numbers is None:
            continue
        for name, scale, zero in (
            (node.input[0], numbers.input_scale, numbers.zero_point),
            (node.output[0], numbers.output_scale, numbers.output_zero_point),
        ):
            step, origin = scale.cpu().numpy(), zero.cpu().numpy()
            overrides[name] = [{"scale": step, "zero_point": origin}]
            ranges[name] = -step * origin, step * (255 - origin)
        overrides[node.input[1]] = [
            {"axis": 0, "scale": scale, "zero_point": 0}
            for scale in numbers.weight_scale.cpu().numpy()
        ]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        quantizer = qdq_quantizer.QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=True,
            weight_qType=ort.QuantType.QInt8,
            activation_qType=ort.QuantType.QUInt8,
            tensors_range=calibrate.TensorsData(ort.CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=list(chosen),
            nodes_to_exclude=[],
            op_types_to_quantize=["Conv"],
            extra_options={**_options(tensorrt=False), "TensorQuantOverrides": overrides},
        )
        quantizer.quantize_model()
        made = Path(folder) / path.name
        quantizer.model.save_model_to_file(str(made), False)
        made.replace(path)
    if external_data:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")


def _options(*, tensorrt: bool) -> dict[str, object]:
    return {
        "WeightSymmetric": True,
        "ActivationSymmetric": tensorrt,
        "AddQDQPairToWeight": tensorrt,
        "QuantizeBias": not tensorrt,
    }


def _groups(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _layer_errors(
    exact: Path, quantized: Path, images: Tensor, chosen: Sequence[str]
) -> dict[str, LayerError]:
    """Compare results and weights of the convolutions in both files."""
    import onnx

    matched = qdq_loss_debug.create_weight_matching(str(exact), str(quantized))
    weights = qdq_loss_debug.compute_weight_error(matched)
    nodes = [
        node
        for node in onnx.load(exact, load_external_data=False).graph.node
        if node.name in chosen
    ]
    names = [node.output[0] for node in nodes]
    # Where a result is rounded, what stands before and behind has names of its own.
    ends = ("_QuantizeLinear_Input", "_DequantizeLinear_Output")
    truth = _results(exact, images, names)
    found = _results(quantized, images, [*names, *(n + end for n in names for end in ends)])
    errors = {}
    for node in nodes:
        name = node.output[0]
        before, behind = (found.get(name + end, found.get(name)) for end in ends)
        errors[node.name] = LayerError(
            weights.get(node.input[1], math.nan),
            _decibels(before, behind),
            _decibels(truth[name], behind),
        )
    return errors


def _results(path: Path, images: Tensor, names: Iterable[str]) -> dict[str, Any]:
    """Return values that a file computes on the way, those of ``names`` that it has."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    known = {name for node in model.graph.node for name in node.output}
    wanted = [name for name in dict.fromkeys(names) if name in known]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Node by node, as they stand in the file.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "model.onnx"
        # Not from memory: protobuf takes no more than 2 GB.
        onnx.save(model, file, save_as_external_data=True, location="model.onnx.data")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        found = session.run(wanted, {session.get_inputs()[0].name: images.numpy()})
    return dict(zip(wanted, found, strict=True))


def _decibels(truth: Any, found: Any) -> float:
    if truth is None or found is None:
        return math.nan
    return float(qdq_loss_debug.compute_signal_to_quantization_noice_ratio(truth, found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The quantiser prints, and logs on the root logger that files should be preprocessed.
    loaded = [m for name, m in sys.modules.items() if name.startswith(quantization.__name__)]
    modules = [module for module in loaded if vars(module).get("logging") is logging]
    with printing_nothing(quantization.calibrate), logging_by(_LOGGER, *modules):
        yield
