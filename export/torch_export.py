"""``to_torch_export``: a ConvMixer as a ``.pt2`` file, and compiled by AOTInductor."""

import io
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmixer_fast.choices import DTYPES, FloatPrecision, TorchOps, check_choice
from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.export.checks import (
    ExportReport,
    as_images,
    check_outputs,
    photographs,
    random_images,
)
from convmixer_fast.export.forms import FORMS
from convmixer_fast.export.metadata import describe
from convmixer_fast.export.preparation import Sizes, in_8_bits, plain_module, tracing
from convmixer_fast.folding import fold
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.runtime.fused import FusedConvMixer
from convmixer_fast.support.files import new_file
from convmixer_fast.support.progress import status

__all__ = ["TorchExportReport", "to_torch_export"]


@dataclass(frozen=True)
class TorchExportReport(ExportReport):
    """What :func:`to_torch_export` wrote."""

    ops: TorchOps


def to_torch_export(
    model: nn.Module,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] = 224,
    precision: FloatPrecision = "float32",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    ops: TorchOps = "plain",
    aot_inductor: bool = False,
    images: Tensor | None = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> TorchExportReport:
    """Write ``model`` to a ``.pt2`` file by ``torch.export``, and check it.

    Args:
        model: a trained ConvMixer in eval mode, as :func:`convmixer_fast.optimize` takes it.
        path: of the file, ``.pt2``.
        image_size: pixels: a square, or height and width.
        precision: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        dynamic_batch: whether the batch is open.
        dynamic_size: whether height and width are, from two patches on.
        ops: ``"plain"``: PyTorch's own operations; ``torch.export.load`` needs nothing of this
            package. ``"fused"``: its custom ops, which ``import convmixer_fast`` defines.
        aot_inductor: whether it is compiled for this machine's CPU, by a C++ compiler, and loaded
            with ``torch._inductor.aoti_load_package``; ``ops`` is then ``"plain"``.
        images: to check with besides random ones, (N, C, H, W); None takes scikit-learn's two
            photographs where it is installed and the model has 3 channels.
        example_input: see :func:`convmixer_fast.optimize`.
        progress: whether to show on the terminal what is going on.

    Raises:
        UnsupportedModelError: ``model`` is no ConvMixer in eval mode.
        ValueError: an argument is none of its values.
        MismatchError: the file does not compute what the model does.
    """
    path = new_file(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {path}")
    check_choice("ops", ops, TorchOps)
    check_choice("precision", precision, FloatPrecision)
    if aot_inductor and ops != "plain":
        raise ValueError(f"ops must be 'plain' with aot_inductor, got {ops!r}")
    if in_8_bits(model) is not None:
        raise UnsupportedModelError(
            "the model is optimized already, and in 8-bit numbers, which a .pt2 file does not "
            "have; export the model that it was made from, or this one by to_onnx"
        )
    dtype = DTYPES[precision]
    sizes = Sizes(image_size, dynamic_batch, dynamic_size)
    module: nn.Module
    module, example, sizes = plain_module(
        model, FORMS["batch_norm"], dtype, sizes, example_input=example_input
    )
    # A single patch is a case of its own for torch.export.
    patch = module.stem.weight.shape[2:]
    least = [2 * side for side in patch]
    if dynamic_size and any(s < n for s, n in zip(sizes.plane, least, strict=True)):
        raise ValueError(
            f"image_size must be at least two patches, {least[0]} x {least[1]}, where sizes are "
            f"open, got {image_size}"
        )
    if ops == "fused":
        with torch.inference_mode(False), torch.no_grad():
            folded = fold(recognize(model, example_input), dtype)
            module = FusedConvMixer(folded).to(dtype).cpu()
    with (
        status("exporting", progress) as report_step,
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # PyTorch's, of its own insides
        with tracing():
            program = torch.export.export(
                module, (example,), dynamic_shapes=sizes.dynamic_shapes(least)
            )
        # Made beside its place, which it takes when it has been checked.
        with tempfile.TemporaryDirectory(prefix=".pt2-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            if aot_inductor:
                report_step("compiling")
                torch._inductor.aoti_compile_and_package(program, package_path=str(made))
                loaded: Any = torch._inductor.aoti_load_package(str(made))
            else:
                said = json.dumps(describe(model, precision, None, None).properties())
                # To memory first: where the disk is full, PyTorch's writer ends the process.
                written = io.BytesIO()
                torch.export.save(program, written, extra_files={"convmixer_fast.json": said})
                made.write_bytes(written.getbuffer())
                loaded = torch.export.load(made).module()
            report_step("comparing with the model in float64")
            batches = {"random": random_images(example)}
            for other in sizes.others(example, patch):
                batches[f"random {tuple(other.shape)}"] = random_images(other)
            real = photographs(example, None, sizes.layout) if images is None else images
            if real is not None:
                batches["real"] = as_images("images", real, example, sizes)
            checks = check_outputs(
                lambda x: pytree.tree_leaves(loaded(x)), model, example, batches, precision
            )
            made.replace(path)
    return TorchExportReport(path, precision, checks, ops)
