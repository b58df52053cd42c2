"""Does an ONNX file compute what the model does? By ONNX Runtime, against float64."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmixer_fast.errors import MismatchError
from convmixer_fast.images import crop, to_input
from convmixer_fast.published import Preprocessing
from convmixer_fast.verify import relative_error

__all__ = ["LIMITS", "Check", "check_file", "photographs"]

LIMITS = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1, "int8": 1.0}
"""Largest error of an export, relative to the largest output. That of int8 only keeps out what is
not the model at all: how much a model loses depends on it, and stands in the report."""


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
    run = _runner(path, widened=precision == "bf16")
    exact = copy.deepcopy(model).cpu().double()
    checks = []
    with torch.inference_mode():
        for kind, batch in images.items():
            given = batch.to(example.dtype)
            # Image by image where the file takes one alone.
            parts = given.split(1 if len(example) == 1 else len(given))
            found = [run(part) for part in parts]
            truth = [pytree.tree_leaves(exact(part.double())) for part in parts]
            check = _compare(kind, found, truth)
            checks.append(check)
            if not check.error <= LIMITS[precision]:  # a NaN is not
                raise MismatchError(
                    f"the exported file's outputs on {kind} images are {check.error:.1e} of the "
                    f"largest output away from the model's in float64; {precision} may be "
                    f"{LIMITS[precision]:.0e} away. The file was deleted"
                )
    return tuple(checks)


def _compare(kind: str, found: list[list[Tensor]], truth: list[list[Tensor]]) -> Check:
    whole = [torch.cat(outputs) for outputs in zip(*found, strict=True)]
    exact = [torch.cat(outputs) for outputs in zip(*truth, strict=True)]
    same = float("nan")
    if len(whole) == 1 and whole[0].dim() == 2:
        same = float((whole[0].argmax(1) == exact[0].argmax(1)).double().mean())
    return Check(kind, len(exact[0]), relative_error(whole, exact), same)


def _runner(path: Path, widened: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = _in_float32(path) if widened else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
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


def photographs(example: Tensor, preprocessing: Preprocessing | None) -> Tensor | None:
    """Return scikit-learn's photographs as inputs like ``example``; None where that cannot be."""
    channels, height, width = example.shape[1:]
    if channels != 3 or importlib.util.find_spec("sklearn") is None:
        return None
    from PIL import Image
    from sklearn.datasets import load_sample_images

    prepare = preprocessing or Preprocessing()
    side = max(height, width)
    prepare = Preprocessing(side, prepare.crop_pct, prepare.mean, prepare.std)
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    inputs = torch.stack([to_input(crop(picture, prepare), prepare) for picture in pictures])
    return inputs[:, :, :height, :width].contiguous()
