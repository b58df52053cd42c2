"""A ConvMixer, or an ONNX file -> a TensorRT engine on disk."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast._version import __version__
from convmixer_fast.choices import DTYPES, FloatPrecision, Plugins, check_choice
from convmixer_fast.errors import MissingDependencyError, UnsupportedModelError
from convmixer_fast.export import trt_bindings
from convmixer_fast.export.metadata import metadata_path, weights_of
from convmixer_fast.export.trt_build import Build, TensorInfo
from convmixer_fast.export.trt_network import DepthwiseOp, plain_head
from convmixer_fast.folding import fold
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.recognition.tracing import unwrap
from convmixer_fast.runtime.fused import FusedConvMixer
from convmixer_fast.spec import FoldedConvMixer
from convmixer_fast.support.files import new_file, write_whole

__all__ = ["EngineReport", "TensorInfo", "to_tensorrt"]


@dataclass(frozen=True)
class EngineReport:
    """What :func:`to_tensorrt` built. But for ``path`` it is what the file beside it says."""

    path: str
    """Of the engine."""
    bytes: int
    seconds: float
    """What TensorRT took to build it."""
    source: str
    """The model's class, or the ONNX file."""
    precision: str | None
    """None where an ONNX file states it, tensor by tensor."""
    plugins: str
    capability: int | None
    """That plugins are compiled for."""
    batches: tuple[int, int, int]
    """The smallest, that which it is optimized for, and the largest."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tf32: bool
    """Whether TensorRT may compute in TF32 what is float32."""
    version_compatible: bool
    versions: dict[str, str]
    """Of this package, TensorRT and PyTorch."""
    preprocessing: dict[str, Any] | None
    weights: str = ""
    """``"random"`` where a model's are known to be; else empty."""


def to_tensorrt(
    model_or_onnx: nn.Module | str | Path,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] = 224,
    precision: FloatPrecision | None = None,
    min_batch: int = 1,
    opt_batch: int | None = None,
    max_batch: int = 32,
    workspace: int | None = None,
    timing_cache: str | Path | None = None,
    version_compatible: bool = False,
    plugins: Plugins = "none",
    capability: int | None = None,
    preprocessing: Preprocessing | None = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> EngineReport:
    """Build a TensorRT engine and write it to ``path``, with its metadata in ``<path>.json``.

    Needs TensorRT 10.13 or newer (``pip install tensorrt``) and the GPU that the engine is for:
    TensorRT times its kernels on it. :class:`TensorRTModule` runs the result.

    The project has not built an engine yet: every call is checked against the bindings of TensorRT
    10.13 and 11.4, and the network's results are computed from what was recorded, without a GPU.

    Args:
        model_or_onnx: a trained ConvMixer in eval mode, as :func:`convmixer_fast.optimize` takes
            it, whose head is global pooling and at most one linear layer; or an ONNX file of any
            model with one input (N, C, H, W).
        path: of the engine.
        image_size: of the images, one number or (height, width); an engine takes no other.
        precision: of a model's weights, input and output: ``"float16"`` (as None), ``"bfloat16"``
            or ``"float32"``. In an ONNX file every tensor states it, so it must be None there.
        min_batch: the smallest batch that the engine takes.
        opt_batch: the batch for which it is fastest; None for the largest.
        max_batch: the largest.
        workspace: bytes of GPU memory that it may use besides its tensors; None for all.
        timing_cache: a file in which TensorRT's measurements are kept, so that a second build
            does without them; it is made where there is none.
        version_compatible: make an engine that other TensorRT versions of the same major number
            load, which contains host code.
        plugins: ``"triton"`` computes depthwise blocks by this package's Triton kernels, compiled
            into the engine; ``"none"`` leaves all to TensorRT.
        capability: the compute capability that they are compiled for, 90 for 9.0; None for that
            of the current GPU.
        preprocessing: how images become inputs; it is only written down.
        example_input: as of :func:`convmixer_fast.optimize`: only for a model that takes images of
            one size alone.
        progress: whether TensorRT's progress is shown on the terminal.

    Returns:
        What was built.

    Raises:
        MissingDependencyError: TensorRT is not installed, or Triton where it is needed.
        TypeError: ``model_or_onnx`` is neither a module nor a path.
        UnsupportedModelError: ``model_or_onnx`` is no ConvMixer that can be exported so.
        ValueError: an argument is none of its values, or contradicts another or the file.
        FileNotFoundError: there is no such ONNX file, or no folder for the engine.
        TensorRTError: TensorRT could not parse the file or build the engine.
    """
    batches = _batches(min_batch, opt_batch, max_batch)
    height, width = _image_size(image_size)
    path = Path(path)
    _check_options(path, precision, workspace, plugins, capability)
    folded = None
    if isinstance(model_or_onnx, str | Path):
        source = str(model_or_onnx)
        _check_onnx(Path(source), precision, plugins)
    else:
        source = type(model_or_onnx).__name__
        precision = precision or "float16"
        folded = _folded(model_or_onnx, example_input, DTYPES[precision])
        plain_head(folded)
        _check_conditions(folded, batches, (height, width))
    trt = trt_bindings.load_tensorrt()
    build = Build(trt)
    if folded is None:
        build.parse(Path(source))
    else:
        op = None
        if plugins == "triton":
            capability = _capability(capability)
            op = _depthwise_op(folded, (batches[1], height, width), capability)
        build.fill(folded, (height, width), op)
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    build.configure(workspace, version_compatible, tf32)
    build.add_profile(batches, (height, width))
    start = time.perf_counter()
    plan = build.run(None if timing_cache is None else Path(timing_cache), progress)
    seconds = time.perf_counter() - start
    inputs, outputs = build.tensors()
    report = EngineReport(
        path=str(path),
        bytes=len(plan),
        seconds=seconds,
        source=source,
        precision=precision,
        plugins=plugins,
        capability=capability if plugins == "triton" else None,
        batches=batches,
        inputs=inputs,
        outputs=outputs,
        tf32=tf32,
        version_compatible=version_compatible,
        versions={
            "convmixer_fast": __version__,
            "tensorrt": str(trt.__version__),
            "torch": torch.__version__,
        },
        preprocessing=None if preprocessing is None else asdict(preprocessing),
        weights=weights_of(model_or_onnx) if isinstance(model_or_onnx, nn.Module) else "",
    )
    write_whole(path, plan)
    said = {key: value for key, value in asdict(report).items() if key != "path"}
    write_whole(metadata_path(path), (json.dumps(said, indent=2) + "\n").encode())
    return report


def _batches(smallest: int, usual: int | None, largest: int) -> tuple[int, int, int]:
    usual = largest if usual is None else usual
    batches = (smallest, usual, largest)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in batches) or not (
        1 <= smallest <= usual <= largest
    ):
        raise ValueError(
            "1 <= min_batch <= opt_batch <= max_batch must hold, got "
            f"min_batch={smallest!r}, opt_batch={usual!r}, max_batch={largest!r}"
        )
    return batches


def _image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"image_size must be a number or (height, width) in pixels, got {size!r}")
    return sides[0], sides[1]


def _check_options(
    path: Path, precision: str | None, workspace: int | None, plugins: str, capability: int | None
) -> None:
    if precision is not None:
        check_choice("precision", precision, FloatPrecision)
    check_choice("plugins", plugins, Plugins)
    if workspace is not None and workspace < 0:
        raise ValueError(f"workspace must be None or a number of bytes, got {workspace!r}")
    if capability is not None and plugins == "none":
        raise ValueError("capability is only for plugins='triton'; leave it out")
    if capability is not None and not 80 <= capability < 1000:
        raise ValueError(f"capability must be at least 80, as 90 for 9.0, got {capability!r}")
    for file in (path, metadata_path(path)):
        new_file(file.absolute())


def _check_onnx(path: Path, precision: str | None, plugins: str) -> None:
    if path.suffix != ".onnx":
        raise ValueError(f"expected a model or the path of an .onnx file, got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no ONNX file {path}")
    if precision is not None:
        raise ValueError(
            f"precision={precision!r} cannot be chosen for an ONNX file, whose tensors state their "
            "types; leave it out, and export the file in that precision"
        )
    if plugins != "none":
        raise ValueError(f"plugins={plugins!r} needs the model itself; pass that instead of a file")


def _folded(model: nn.Module, example_input: Tensor | None, dtype: torch.dtype) -> FoldedConvMixer:
    if isinstance(model, nn.Module) and isinstance(unwrap(model), FusedConvMixer):
        raise UnsupportedModelError("the model is optimized already; pass the one it was made from")
    with torch.inference_mode(False), torch.no_grad():
        return fold(recognize(model, example_input), dtype)


def _check_conditions(
    folded: FoldedConvMixer, batches: tuple[int, int, int], image_size: tuple[int, int]
) -> None:
    """Refuse what the model does not take, or computes something else for."""
    for images in range(batches[0], batches[2] + 1):
        for condition in folded.conditions:
            if not condition.holds(images, *image_size):
                raise ValueError(
                    f"the model's own code asks for {condition.text} of its input (N, C, H, W), "
                    f"which N={images}, H={image_size[0]}, W={image_size[1]} are not; choose "
                    "image_size, min_batch and max_batch accordingly, or pass an example_input of "
                    "the size to be used"
                )


def _capability(wanted: int | None) -> int:
    if not torch.cuda.is_available():
        if wanted is None:
            raise ValueError(
                "plugins='triton' compiles for a GPU and none is here; give its compute "
                "capability, capability=90 for 9.0"
            )
        return wanted
    major, minor = torch.cuda.get_device_capability()
    found = 10 * major + minor
    if wanted is not None and wanted > found:
        raise ValueError(
            f"the current GPU has compute capability {found}, which cannot run code for "
            f"capability={wanted}; leave it out, or give at most {found}"
        )
    return found if wanted is None else wanted


def _depthwise_op(
    folded: FoldedConvMixer, sizes: tuple[int, int, int], capability: int
) -> DepthwiseOp:
    try:
        from convmixer_fast.export.trt_plugin import depthwise_op
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"plugins='triton' needs Triton ({error}): pip install 'convmixer-fast[triton]'"
        ) from error
    images, height, width = sizes
    patch_height, patch_width = folded.stem.weight.shape[2:]
    channels = folded.stem.weight.shape[0]
    shape = (images, channels, height // patch_height, width // patch_width)
    return depthwise_op(shape, capability)
