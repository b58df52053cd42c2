"""``to_onnx``: a ConvMixer as an ONNX file of standard operators, checked before it is kept."""

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.choices import DTYPES, CalibrationMethod, OnnxTarget, Precision, check_choice
from convmixer_fast.errors import MissingDependencyError
from convmixer_fast.export.checks import (
    ExportReport,
    as_images,
    as_labelled,
    photographs,
    random_images,
)
from convmixer_fast.export.files import external_weights, weights_beside
from convmixer_fast.export.forms import choose_form
from convmixer_fast.export.metadata import Description, describe
from convmixer_fast.export.onnx_check import check_file, classes_of, measure_accuracy
from convmixer_fast.export.onnx_graph import count_operators, lower, name_nodes
from convmixer_fast.export.preparation import (
    Sizes,
    in_8_bits,
    output_shapes,
    plain_module,
    tracing,
)
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.support.files import new_file
from convmixer_fast.support.progress import status

__all__ = ["OnnxReport", "to_onnx"]

_OPSET = 20
"""The first with Gelu."""
_BF16_OPSET = 22
"""The first whose Conv takes bfloat16."""
_LARGEST_OPSET = 23
_LEAST = 17
"""The first with what quantised files have; users of older runtimes ask for it."""
_LEAST_TRACED = 18
"""The least that PyTorch writes."""
_CHECKED = 16
_EXTERNAL_BYTES = 1.5e9
"""From there on weights are a file of their own: protobuf cannot hold 2 GB."""


@dataclass(frozen=True)
class OnnxReport(ExportReport):
    """What :func:`to_onnx` wrote."""

    target: str
    form: str
    opset: int
    bytes: int
    """Of the file, and of its weights where these are beside it."""
    operators: Mapping[str, int]
    """How many nodes there are of each kind."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """int8: the error of each quantised layer; see :class:`onnx_quantize.LayerError`."""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Share of ``validation`` that is right, of the ``"model"`` and of the ``"file"``."""
    same_as_float32: float | None = None
    """int8: share of all calibration images whose largest output is at the same place as before
    quantisation; None where outputs are no (N, classes)."""


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] = 224,
    precision: Precision = "float32",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int | None = None,
    target: OnnxTarget = "onnxruntime",
    form: str | None = None,
    float32_io: bool = False,
    external_data: bool | None = None,
    calibration: Tensor | None = None,
    calibration_method: CalibrationMethod = "minmax",
    quantize_depthwise: bool = False,
    images: Tensor | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    example_input: Tensor | None = None,
    input_name: str = "images",
    output_names: Sequence[str] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
) -> OnnxReport:
    """Write ``model`` to an ONNX file, and check it.

    The input is (N, C, H, W), or (N, H, W, C) where the model takes that. The file is compared with
    the model in float64 by ONNX Runtime, on random images, in other sizes too where these are open,
    and on photographs (int8: on the images of the calibration), before this returns; where it fails
    nothing is left behind.

    Args:
        model: a trained ConvMixer in eval mode, as :func:`convmixer_fast.optimize` takes it; or
            what that returned with ``precision="int8"``, whose numbers the file then has.
        path: of the file. Weights of 1.5 GB and more go to ``<path>.data`` beside it.
        image_size: pixels: a square, or height and width.
        precision: ``"float32"``; ``"float16"`` or ``"bfloat16"``: convolutions and activations,
            while scales, residual sums, pooling and classifier stay in float32; ``"int8"``: stem
            and pointwise convolutions between QuantizeLinear and DequantizeLinear, float32
            otherwise.
        dynamic_batch: whether the batch is open.
        dynamic_size: whether height and width are.
        opset: of ONNX, from 17; None is 20, for bfloat16 22.
        target: the runtime whose form is taken: ``"onnxruntime"`` or ``"tensorrt"``.
        form: a name of :data:`forms.FORMS` instead.
        float32_io: whether 16-bit files take and return float32.
        external_data: whether weights are a file of their own; None decides by size.
        calibration: int8: images (N, C, H, W) as the model takes them, some hundred. They go
            through the network a few at a time: ConvMixer-768/32 takes less than 2 GB.
        calibration_method: int8: ``"minmax"``, ``"percentile"`` or ``"entropy"``.
        quantize_depthwise: int8: whether depthwise convolutions are quantised too.
        images: to check with, (N, C, H, W); None takes scikit-learn's two photographs where it is
            installed and the model has 3 channels.
        preprocessing: written into the file; None takes timm's, if the model has it.
        labels: written into the file.
        example_input: see :func:`convmixer_fast.optimize`; where it is uint8, so is the input.
        input_name: what the file calls its input.
        output_names: what it calls its outputs; None takes the keys of the dictionary or the names
            of the dataclass that the model returns, ``logits`` for a tensor alone, or ``output_0``
            ...
        validation: images and their classes (N,), on which the report's accuracy is measured.
        progress: whether to show on the terminal what is going on.

    Raises:
        UnsupportedModelError: ``model`` is no ConvMixer in eval mode.
        ValueError: an argument is none of its values.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        MismatchError: the file does not compute what the model does.
        FileExistsError: ``path`` is a device or a pipe, or weights would replace a file that no
            earlier export wrote.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    name, chosen = choose_form(target, form)
    check_choice("precision", precision, Precision)
    check_choice("calibration_method", calibration_method, CalibrationMethod)
    known = in_8_bits(model)
    if known is not None:
        if precision != "int8" or calibration is not None or target != "onnxruntime":
            raise ValueError(
                "the model is in 8-bit numbers already: export it with precision='int8' and for "
                f"ONNX Runtime, without calibration; got {precision!r} and {target!r}"
            )
    elif (precision == "int8") != (calibration is not None):
        raise ValueError(
            "calibration must be images (N, C, H, W) for precision='int8', and None for others"
        )
    opset = _opset(opset, precision)
    if opset < _OPSET:  # it has no Gelu
        chosen = chosen._replace(in_parts=True)
    path = new_file(path)
    sizes = Sizes(image_size, dynamic_batch, dynamic_size)
    description = describe(model, precision, preprocessing, labels)
    if not dynamic_size:
        description = description.of_size(sizes.plane)
    module, example, sizes = plain_module(
        model,
        chosen,
        DTYPES.get(precision, torch.float32),
        sizes,
        float32_io=float32_io,
        example_input=example_input,
    )
    if calibration is not None:
        calibration = as_images("calibration", calibration, example, sizes)
    if images is not None:
        images = as_images("images", images, example, sizes)
    checked = {"random": random_images(example)}
    for other in sizes.others(example, module.stem.weight.shape[2:]):
        checked[f"random {tuple(other.shape)}"] = random_images(other)
    if images is None and precision != "int8":
        images = photographs(example, description.preprocessing, sizes.layout)
    real = {} if images is None else {"real": images}
    if validation is not None:
        validation = as_labelled(validation, example, sizes)
    layers: Mapping[str, Any] = {}
    same: float | None = None
    accuracy: Mapping[str, float] = {}
    # Made under its final name, which external data refers to, in a folder that goes if it fails.
    with (
        status("exporting", progress) as report_step,
        tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder,
    ):
        made = Path(folder) / path.name
        external = _is_external(module, external_data)
        if external:
            _check_weights_beside(path)
        # What is quantised is saved again: only then in the form that was asked for.
        separate, names = external and precision != "int8", (input_name, output_names)
        _write(module, example, made, sizes, opset, description, separate, names)
        report_step("comparing with the model in float64")
        if known is not None:
            from convmixer_fast.export.onnx_quantize import write_numbers

            write_numbers(made, known.quantized_blocks(), external_data=external)
            checks = check_file(made, model, example, checked | real, precision)
        elif calibration is None:
            checks = check_file(made, model, example, checked | real, precision)
        else:
            # Before it is quantised: noise is outside of what it is calibrated for.
            check_file(made, model, example, checked, "float32")
            before = classes_of(made, calibration)
            from convmixer_fast.export.onnx_quantize import quantize

            layers = quantize(
                made,
                calibration,
                calibration_method,
                target,
                depthwise=quantize_depthwise,
                external_data=external,
                report=report_step,
            )
            report_step("comparing with the model before quantisation, and in float64")
            after = classes_of(made, calibration)
            if before is not None and after is not None:
                same = float((before == after).double().mean())
            seen = {"calibration": calibration[:_CHECKED]}
            checks = check_file(made, model, example, seen | real, precision)
        if validation is not None:
            report_step("classifying the validation images")
            accuracy = measure_accuracy(made, model, validation)
        report = OnnxReport(
            path=path,
            precision=precision,
            target=target,
            form=name,
            opset=opset,
            bytes=sum(file.stat().st_size for file in Path(folder).iterdir()),
            operators=count_operators(made),
            checks=checks,
            layers=layers,
            accuracy=accuracy,
            same_as_float32=same,
        )
        _publish(Path(folder), path)
    return report


def _check_weights_beside(path: Path) -> None:
    beside = new_file(weights_beside(path))
    if beside.exists() and beside.name not in external_weights(path):
        raise FileExistsError(
            f"{beside} is in the place of the weights, and not of an earlier export to {path}; "
            "move it, or name another file"
        )


def _publish(folder: Path, path: Path) -> None:
    """Move what was made to its place, weights first; those of an earlier export go."""
    if weights_beside(path).name in external_weights(path):
        weights_beside(path).unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), reverse=True):
        file.replace(path.parent / file.name)


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX export needs {', '.join(missing)}: pip install 'convmixer-fast[onnx]'"
        )


def _opset(opset: int | None, precision: str) -> int:
    least = _BF16_OPSET if precision == "bfloat16" else _LEAST
    if opset is None:
        return max(least, _OPSET)
    if (
        isinstance(opset, bool)
        or not isinstance(opset, int)
        or not least <= opset <= _LARGEST_OPSET
    ):
        raise ValueError(
            f"opset must be from {least} to {_LARGEST_OPSET} for precision {precision!r}, "
            f"got {opset!r}"
        )
    return opset


def _is_external(module: nn.Module, external_data: bool | None) -> bool:
    if external_data is not None:
        return external_data
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) >= _EXTERNAL_BYTES


def _write(
    module: nn.Module,
    example: Tensor,
    path: Path,
    sizes: Sizes,
    opset: int,
    description: Description,
    external_data: bool,
    names: tuple[str, Sequence[str] | None],
) -> None:
    shapes = output_shapes(module, example)
    if len(shapes) == 1 and len(shapes[0][1]) == 2:
        description.check_classes(shapes[0][1][1])
    input_name, output_names = names[0], _output_names([name for name, _ in shapes], names[1])
    if input_name in output_names:
        raise ValueError(f"input_name {input_name!r} is one of output_names too")
    stem: Any = module.stem
    with tracing(), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's, of its own insides
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=max(opset, _LEAST_TRACED),
            input_names=[input_name],
            output_names=output_names,
            dynamic_shapes=sizes.dynamic_shapes(stem.weight.shape[2:]),
        )
    assert program is not None
    traced: Any = program.model.graph.inputs[0].shape
    sizes.check_open(list(traced))
    name_nodes(program.model.graph)
    program.model.metadata_props.update(description.properties())
    program.model.doc_string = f"{description.model}, by convmixer_fast"
    program.save(path, external_data=external_data)
    if opset < _LEAST_TRACED:
        lower(path, opset, external_data)


def _output_names(found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    if wanted is not None:
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if len(names) != len(found) or len(set(names)) != len(names) or not all(names):
            raise ValueError(
                f"expected {len(found)} output_names, one for each output and no two alike, got "
                f"{names}"
            )
        return names
    if len(found) == 1:
        return [found[0] or "logits"]
    return [f"output_{name}" if name.isdecimal() else name for name in found]
