"""``to_openvino``: a ConvMixer as OpenVINO's own files, made of the ONNX file, checked like it."""

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.choices import OpenVinoPrecision, check_choice
from convmixer_fast.errors import MissingDependencyError
from convmixer_fast.export.checks import ExportReport, check_outputs, random_images
from convmixer_fast.export.onnx_export import OnnxReport, to_onnx
from convmixer_fast.support.files import new_file
from convmixer_fast.support.progress import status

__all__ = ["OpenVinoReport", "to_openvino"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "u8": torch.uint8}
_IMAGES = 2
_CHECKED = 16


@dataclass(frozen=True)
class OpenVinoReport(ExportReport):
    """What :func:`to_openvino` wrote; ``path`` is that of the ``.xml`` file."""

    onnx: OnnxReport
    """Of the ONNX file that it was made of: operators, errors of layers, accuracy."""


def to_openvino(
    model: nn.Module,
    path: str | Path,
    *,
    precision: OpenVinoPrecision = "float32",
    image_size: int | tuple[int, int] = 224,
    progress: bool = True,
    **options: Any,
) -> OpenVinoReport:
    """Write ``model`` as ``path`` (``.xml``) and its weights beside it (``.bin``), and check them.

    The file is converted from the one that :func:`to_onnx` writes, by ``openvino.convert_model``,
    and compared with the model in float64 on this machine's CPU before it takes its place.

    Args:
        model: see :func:`to_onnx`.
        path: of the ``.xml`` file.
        precision: see :func:`to_onnx`. OpenVINO computes float32 files in bfloat16 where the
            processor has it, unless ``INFERENCE_PRECISION_HINT`` says ``f32``, as the check does.
        image_size: pixels: a square, or height and width.
        progress: whether to show on the terminal what is going on.
        options: others of :func:`to_onnx`: ``calibration``, ``dynamic_size``, ``labels`` ...

    Raises:
        MissingDependencyError: openvino, or what :func:`to_onnx` needs, is not installed.
        ValueError: an argument is none of its values.
        UnsupportedModelError, MismatchError: see :func:`to_onnx`.
    """
    check_choice("precision", precision, OpenVinoPrecision)
    path = new_file(path)
    if path.suffix != ".xml":
        raise ValueError(f"path must end in .xml, got {path}")
    weights = new_file(path.with_suffix(".bin"))
    openvino = _openvino()
    with tempfile.TemporaryDirectory(prefix=".openvino-", dir=path.parent) as folder:
        file = Path(folder) / "model.onnx"
        report = to_onnx(
            model, file, image_size=image_size, precision=precision, progress=progress, **options
        )
        with status("converting to OpenVINO", progress) as report_step:
            converted = openvino.convert_model(file)
            made = Path(folder) / path.name
            for name, value in _metadata(file).items():
                converted.set_rt_info(value, ["convmixer_fast", name])
            openvino.save_model(converted, made, compress_to_fp16=False)
            report_step("comparing with the model in float64")
            run, example = _runner(openvino, made, image_size)
            images = {"random": random_images(example)}
            if precision == "int8":  # noise is outside of what it is calibrated for
                images = {"calibration": options["calibration"][:_CHECKED].float()}
            checks = check_outputs(run, model, example, images, precision)
        # The weights first: what reads the other finds them.
        made.with_suffix(".bin").replace(weights)
        made.replace(path)
    return OpenVinoReport(path, precision, checks, report)


def _openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingDependencyError(
            f"to_openvino needs OpenVINO ({error}): pip install openvino"
        ) from error


def _metadata(file: Path) -> dict[str, str]:
    import onnx

    model = onnx.load(file, load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def _runner(
    openvino: Any, path: Path, image_size: int | tuple[int, int]
) -> tuple[Callable[[Tensor], list[Tensor]], Tensor]:
    """Return what computes the file, and an input that it takes."""
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    (entry,) = compiled.inputs
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    open_sizes = [_IMAGES, 0, *sides]
    shape = [
        open_sizes[place] if size.is_dynamic else size.get_length()
        for place, size in enumerate(entry.get_partial_shape())
    ]
    dtype = _DTYPES[entry.get_element_type().get_type_name()]

    def run(x: Tensor) -> list[Tensor]:
        found = compiled(x.numpy())
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run, torch.zeros(shape, dtype=dtype)
