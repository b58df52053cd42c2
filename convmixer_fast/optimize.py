"""optimize(model): the way in."""

import copy
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from convmixer_fast.choices import (
    BackendName,
    CalibrationMethod,
    CudaGraphs,
    InTraining,
    Verify,
    check_choice,
)
from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.folding import fold
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.recognition.tracing import unwrap
from convmixer_fast.runtime import backends, self_check
from convmixer_fast.runtime.fused import FusedConvMixer

if TYPE_CHECKING:
    from convmixer_fast.export.quantized import QuantizationReport

__all__ = ["optimize"]


def optimize(
    model: nn.Module,
    *,
    backend: BackendName = "auto",
    dtype: torch.dtype | None = None,
    example_input: Tensor | None = None,
    cuda_graphs: CudaGraphs = "auto",
    static_output: bool = False,
    chunk: int | None = None,
    in_training: InTraining = "raise",
    release: bool = False,
    precision: Literal["int8"] | None = None,
    calibration: Tensor | None = None,
    calibration_method: CalibrationMethod = "minmax",
    validation: tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
    verify: Verify = "auto",
) -> FusedConvMixer:
    """Return a module that computes what ``model`` does, faster.

    Args:
        model: a trained ConvMixer in eval mode: timm's, locuslab's, labml's, this package's,
            or a variation; see :mod:`recognize`. It is only read, but other threads cannot
            run it while PyTorch traces it, for a fraction of a second.
        backend: ``"auto"`` takes the fastest that runs where the input is, ``"triton"``,
            ``"cpu"`` or ``"reference"`` that one or an error; see ``backend_info()``.
        dtype: of the weights and so of the input; None keeps the model's.
        example_input: an input batch that the model takes; needed only for a model that
            takes images of one size alone, or does more than a cast with another dtype (uint8).
            Its values do not matter.
        cuda_graphs: on a GPU, whether an input shape's kernels are captured once and then
            launched together: ``"auto"`` from the second call of a shape on, True from the
            first, False never. At most 8 shapes are kept.
        static_output: whether results may be a graph's own memory, which the next call with the
            same shape overwrites: saves a copy.
        chunk: on a GPU, how many images are computed at a time, which bounds the memory of
            activations; on an H100 it costs some 10 %. None computes all together, or as many as
            :meth:`FusedConvMixer.tune` found to be fastest.
        in_training: what ``train()``, of the module or of one that it is a part of, does:
            ``"raise"``: a call in training mode raises; ``"stay"``: it stays in eval mode, as the
            frozen part of a module that is trained. No gradient flows into it either way.
        release: on a CPU, whether the weights are held in packed form alone: see
            :meth:`FusedConvMixer.release`.
        precision: ``"int8"``: stem and pointwise convolutions in 8-bit numbers, for the CPU
            backend: on a processor with VNNI two to three times as fast as float32. Depthwise
            convolutions, activations and the head stay in float32, as input and outputs do.
            The numbers are those of the file that :func:`export.to_onnx` writes of the same
            images, or of this module. A NaN in an image is lost. Needs
            ``pip install 'convmixer-fast[onnx]'``.
        calibration: int8: images (N, C, H, W) as the model takes them, some hundred: they say
            which numbers occur.
        calibration_method: int8: how the range of what occurs is chosen.
        validation: int8: images and their classes (N,), on which accuracy is measured.
        progress: int8: whether to show on the terminal what is going on, which takes seconds for a
            small model and minutes for a large one.
        verify: whether the result is compared with ``model`` in float64, on a small random input,
            before it is returned: a backend that this machine's compiler or driver gets wrong never
            serves. ``"auto"``: on a GPU, the first time that such a model meets such a device,
            driver and versions, which is kept on disk. With ``backend="auto"`` the next one takes
            the place of one that is wrong, with a warning.

    Returns:
        The optimized module, on the model's device, for inference only. Its ``quantization`` says
        what 8-bit numbers cost: a :class:`QuantizationReport`.

    Raises:
        TypeError: ``model`` is no module, or ``dtype`` none that the fused ops take.
        UnsupportedModelError: ``model`` is no ConvMixer in eval mode; says where it differs.
        ValueError: there is no backend of that name, ``example_input`` or ``calibration`` is not a
            tensor of four dimensions, ``cuda_graphs``, ``chunk``, ``in_training`` or ``precision``
            is none of its values, or there is a ``calibration`` without ``precision="int8"``.
        MissingDependencyError: int8 needs onnx, onnxscript and onnxruntime.
        BackendUnavailableError: the backend named cannot run here, or ``release`` is not for it.
        MismatchError: ``verify`` found the backend named wrong; the message has the numbers.
    """
    if cuda_graphs not in ("auto", True, False):
        raise ValueError(f"cuda_graphs must be 'auto', True or False, got {cuda_graphs!r}")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or a number of images, at least 1, got {chunk!r}")
    check_choice("in_training", in_training, InTraining)
    check_choice("calibration_method", calibration_method, CalibrationMethod)
    if verify not in ("auto", True, False):
        raise ValueError(f"verify must be 'auto', True or False, got {verify!r}")
    if precision not in (None, "int8"):
        raise ValueError(f"precision must be 'int8' or None, got {precision!r}; see dtype")
    if (precision is None) != (calibration is None):
        raise ValueError(
            "calibration must be images (N, C, H, W) for precision='int8', and None otherwise"
        )
    if precision is not None and dtype not in (None, torch.float32):
        raise ValueError(f"precision='int8' computes in float32 besides; got dtype={dtype!r}")
    if isinstance(unwrap(model), FusedConvMixer):
        raise UnsupportedModelError(
            "the model is optimized already; pass the "
            f"{unwrap(model).made_from or 'model'} that it was made from"
        )
    # Not inference tensors, even when called under inference_mode().
    quantization: QuantizationReport | None = None
    with torch.inference_mode(False), torch.no_grad():
        if calibration is None:
            folded = fold(recognize(model, example_input), dtype)
        else:
            # What it needs is installed where it is asked for.
            from convmixer_fast.export.quantized import quantized

            dtype = torch.float32
            folded, quantization = quantized(
                model,
                calibration,
                method=calibration_method,
                validation=validation,
                example_input=example_input,
                progress=progress,
            )
        fused = FusedConvMixer(
            folded,
            backend,
            cuda_graphs=cuda_graphs,
            static_output=static_output,
            chunk=chunk,
            in_training=in_training,
        )
        if dtype is not None:
            # The source's own modules around the trunk follow, as by model.to(dtype).
            fused.to(dtype)
    fused.quantization = quantization
    stem: Any = fused.stem
    device, dtype = stem.weight.device, stem.dtype
    chosen = backends.resolve(backend, device, dtype)
    if backend == "auto" and chosen == "reference" and dtype != torch.float64:
        reasons = "; ".join(
            f"{name}: {backends.why_not(name, device, dtype)}"
            for name in backends.BACKENDS
            if name != chosen
        )
        warnings.warn(
            f"no fast backend can run {dtype} on {device}, so the model runs on plain PyTorch "
            f"({reasons})",
            RuntimeWarning,
            stacklevel=2,
        )
    if verify is True or (verify == "auto" and chosen == "triton" and device.type == "cuda"):
        self_check.ensure(fused, model, example_input, once=verify == "auto")
    source = unwrap(model)
    named = (getattr(source, "pretrained_cfg", None) or {}).get("architecture")
    fused.made_from = f"{type(source).__name__} ({named})" if named else type(source).__name__
    # What timm and transformers read to choose the preprocessing of images and the classes' names.
    for name in ("pretrained_cfg", "default_cfg", "config"):
        config = getattr(source, name, None)
        if config is not None:
            setattr(fused, name, copy.deepcopy(config))
    if release:
        fused.release()
    return fused
