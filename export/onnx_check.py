"""Is an ONNX file valid, and does ONNX Runtime compute with it what the model does?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convmixer_fast.errors import MismatchError
from convmixer_fast.export.checks import Check, check_outputs

__all__ = ["check_file", "classes_of", "measure_accuracy"]

_BATCH = 8


def check_file(
    path: Path, model: nn.Module, example: Tensor, images: Mapping[str, Tensor], precision: str
) -> tuple[Check, ...]:
    """Check the file's form, its shapes, and its outputs.

    ONNX Runtime has no bfloat16 convolution on a CPU: such a file is checked with all its
    bfloat16 made float32, its rounded weights included.

    Args:
        path: of the file, with its external data beside it.
        model: the source model, of any dtype; it is only read.
        example: an input like the file's; its values do not matter.
        images: batches (N, C, H, W) by name.
        precision: a name of :data:`LIMITS`.

    Raises:
        MismatchError: the file is not valid, or an output is too far from the model's.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MismatchError(f"the exported file is not valid ONNX: {error}") from error
    run = _runner(path, widened=precision == "bfloat16")
    return check_outputs(run, model, example, images, precision)


def classes_of(path: Path, images: Tensor) -> Tensor | None:
    """Return the place of the largest output for each image; None where there are no classes."""
    session = _session(str(path))
    (given, *_), (out, *others) = session.get_inputs(), session.get_outputs()
    if others or len(out.shape) != 2:
        return None
    size = given.shape[0] if isinstance(given.shape[0], int) else _BATCH
    whole = images[: len(images) // size * size] if isinstance(given.shape[0], int) else images
    wanted = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}
    parts = [
        torch.from_numpy(session.run(None, {given.name: part.numpy()})[0]).argmax(1)
        for part in whole.to(wanted.get(given.type, whole.dtype)).split(size)
    ]
    return torch.cat(parts) if parts else None


def measure_accuracy(
    path: Path, model: nn.Module, validation: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Return the share that is right, of the model and of its file.

    Raises:
        ValueError: the model returns no classes.
    """
    images, classes = validation
    found = classes_of(path, images)
    if found is None:
        raise ValueError("validation needs a model that returns (N, classes)")
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    with torch.inference_mode():
        parts = [
            model(part.to(device, dtype if part.is_floating_point() else None)).argmax(1).cpu()
            for part in images.split(_BATCH)
        ]
    shares = {"model": torch.cat(parts) == classes, "file": found == classes[: len(found)]}
    return {name: float(right.double().mean()) for name, right in shares.items()}


def _session(source: str | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _runner(path: Path, widened: bool) -> Any:
    session = _session(_in_float32(path) if widened else str(path))
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        x = x.float() if widened else x
        return [torch.from_numpy(np.asarray(out)) for out in session.run(None, {name: x.numpy()})]

    return run


def _in_float32(path: Path) -> bytes:
    """Return a bfloat16 model with every bfloat16 made a float32 of the same value."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    serialized: bytes = model.SerializeToString()
    return serialized
