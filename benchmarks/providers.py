"""What a user could run a model with, in one table: ours and everything else.

A provider says why it cannot run somewhere, or builds a callable from a subject. Adding a row
to :data:`PROVIDERS` is all that a new one takes.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.benchmarks import runtimes
from convmixer_fast.benchmarks.subjects import Case, Subject
from convmixer_fast.choices import BackendName, Plugins
from convmixer_fast.export.forms import FORMS
from convmixer_fast.runtime import backends

__all__ = ["PROVIDERS", "Provider", "choose"]

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to run a module."""

    name: str
    about: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """Says why it cannot run here; None when it can."""
    build: Callable[[Subject, Tensor], Call]
    """From the subject and an example input, already in the provider's memory format."""
    channels_last: bool = False
    """Whether inputs are in channels-last memory format."""
    graph: bool = True
    """Whether its calls may be captured in a CUDA graph by the harness for micro-benchmarks."""
    capture: bool = False
    """Whether a CUDA graph is what this provider is about: calls are always captured."""
    slow: bool = False
    """Whether building takes minutes: run only when asked for."""
    ops_only: bool = False
    """Whether it replaces an op, and there is nothing of the kind for whole models."""
    models_only: bool = False
    """Whether it is no choice for a single op."""
    int8: bool = False
    """Whether it computes in 8-bit numbers, and so is for cases that allow that."""

    def runs(self, case: Case, device: torch.device) -> bool:
        """Whether ``case`` is to be measured with it on ``device``."""
        kind = not (self.ops_only if case.bench == "model" else self.models_only)
        kind = kind and (case.int8 or not self.int8)
        return kind and case.wants(self.name) and self.why_not(device, case.dtype) is None


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _cpu_float32(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if (device.type, dtype) == ("cpu", torch.float32) else "float32 on a CPU only"


def _needs(*modules: str) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _eager(subject: Subject, example: Tensor) -> Call:
    return subject.module


def _eager_nhwc(subject: Subject, example: Tensor) -> Call:
    return subject.channels_last


def _searching_cudnn(module: nn.Module) -> Call:
    """Run ``module`` with cuDNN's benchmark mode, which times its algorithms at the first call."""

    def call(x: Tensor) -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            out: Tensor = module(x)
            return out
        finally:
            torch.backends.cudnn.benchmark = before

    return call


def _compiled(mode: str | None, channels_last: bool) -> Callable[[Subject, Tensor], Call]:
    def build(subject: Subject, example: Tensor) -> Call:
        import torch._inductor.config as inductor

        module = subject.channels_last if channels_last else subject.module
        # On a CPU freezing lets inductor pack the weights: what a user who cares would set.
        with inductor.patch(freezing=example.device.type == "cpu"):
            compiled: Call = torch.compile(module, mode=mode, dynamic=False)
            compiled(example)
        if mode != "max-autotune":
            return compiled
        # Its results live in a CUDA graph's memory, which the next call overwrites.
        return lambda x: (torch.compiler.cudagraph_mark_step_begin(), compiled(x))[1]

    return build


def _torchscript(subject: Subject, example: Tensor) -> Call:
    traced = torch.jit.trace(subject.module, example)
    frozen: Call = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    frozen(example)
    return frozen


def _tensorrt(name: str, about: str, plugins: Plugins | None) -> Provider:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return _cuda(device, dtype) or _needs("onnx", "onnxscript", "tensorrt")

    def build(subject: Subject, example: Tensor) -> Call:
        return runtimes.tensorrt_engine(subject, example, plugins=plugins)

    return Provider(name, about, why_not, build, slow=True, models_only=True)


def _exported(form: str | None) -> Provider:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return _cpu_float32(device, dtype) or _needs("onnx", "onnxscript", "onnxruntime")

    def build(subject: Subject, example: Tensor) -> Call:
        return runtimes.onnxruntime_cpu(subject, example, exported=True, form=form)

    name = "export-onnxruntime" if form is None else f"export-onnxruntime-{form}"
    about = "ONNX Runtime on the file of to_onnx" + ("" if form is None else f", form {form}")
    return Provider(name, about, why_not, build, slow=True, models_only=True)


def _ours(backend: BackendName) -> Provider:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return backends.why_not(backend, device, dtype)

    def build(subject: Subject, example: Tensor) -> Call:
        return _fused(subject, backend)

    about = f"convmixer_fast, backend {backend}"
    return Provider(f"ours-{backend}", about, why_not, build, slow=backend == "reference")


def _int8(name: str, about: str, build: Callable[[Subject, Tensor], Call], *needs: str) -> Provider:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return _cpu_float32(device, dtype) or _needs("onnx", "onnxscript", "onnxruntime", *needs)

    return Provider(name, about, why_not, build, models_only=True, int8=True)


def _fused_int8(subject: Subject, example: Tensor) -> Call:
    with torch.inference_mode(False):
        images = subject.calibration.clone()
        return _fused(subject, "cpu", precision="int8", calibration=images, progress=False)


def _ours_on_gpu(
    name: str, about: str, build: Callable[[Subject, Tensor], Call], **kind: bool
) -> Provider:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return _cuda(device, dtype) or backends.why_not("triton", device, dtype)

    about = f"convmixer_fast, backend triton, {about}"
    return Provider(f"ours-triton-{name}", about, why_not, build, models_only=True, **kind)


def _fused(subject: Subject, backend: BackendName = "triton", **options: Any) -> nn.Module:
    if subject.fuse is None:
        raise LookupError("this package has no form of it")
    return subject.fuse(backend, **options)


def _in_chunks(subject: Subject, example: Tensor) -> Call:
    """Compute as many images at a time as should stay in the L2 cache."""
    from convmixer_fast.runtime.tuning import chunks_to_try, l2_bytes  # needs Triton

    features, _, patch_h, patch_w = next(_fused(subject).parameters()).shape
    positions = example.shape[2] // patch_h * (example.shape[3] // patch_w)
    activation = features * positions * example.element_size()
    chunks = chunks_to_try(example.shape[0], activation, l2_bytes(example.device))
    if len(chunks) < 3:
        raise LookupError("all of the batch fits into the L2 cache")
    return _fused(subject, chunk=chunks[2])


def _tuned(subject: Subject, example: Tensor) -> Call:
    fused: Any = _fused(subject, chunk=None)
    fused.tune(example, seconds=0.5, progress=False)
    tuned: Call = fused
    return tuned


def _replknet_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16):
        return "float32 and float16 only"
    return _cuda(device, dtype) or _needs("depthwise_conv2d_implicit_gemm")


def _replknet(subject: Subject, example: Tensor) -> Call:
    """Put RepLKNet's large-kernel convolution (arXiv 2203.06717) in the place of PyTorch's."""
    import copy

    from depthwise_conv2d_implicit_gemm import (  # type: ignore[import-not-found]
        DepthWiseConv2dImplicitGEMM,
    )

    module = copy.deepcopy(subject.module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.groups == child.in_channels > 1:
                conv = DepthWiseConv2dImplicitGEMM(
                    child.in_channels, child.kernel_size[0], bias=child.bias is not None
                )
                conv.load_state_dict(child.state_dict())
                setattr(parent, name, conv.to(child.weight))
    return module.eval()


_ALL = (
    Provider("eager", "PyTorch as it is, NCHW", _anywhere, _eager),
    Provider(
        "eager-nhwc", "PyTorch, channels-last", _anywhere, _eager_nhwc, channels_last=True
    ),
    Provider(
        "eager-cudnn-benchmark",
        "PyTorch with cuDNN's benchmark mode",
        _cuda,
        lambda subject, example: _searching_cudnn(subject.module),
    ),
    Provider(
        "eager-graph", "PyTorch, replayed from a CUDA graph", _cuda, _eager,
        capture=True, models_only=True,
    ),
    Provider("compile", "torch.compile", _anywhere, _compiled(None, False)),
    Provider(
        "compile-nhwc", "torch.compile, channels-last", _anywhere, _compiled(None, True),
        channels_last=True,
    ),
    Provider(
        "compile-max-autotune", 'torch.compile(mode="max-autotune")', _anywhere,
        _compiled("max-autotune", False), graph=False, slow=True,
    ),
    Provider(
        "compile-max-autotune-nhwc", 'torch.compile(mode="max-autotune"), channels-last', _anywhere,
        _compiled("max-autotune", True), channels_last=True, graph=False, slow=True,
    ),
    Provider(
        "torchscript", "torch.jit.freeze and optimize_for_inference", _anywhere, _torchscript,
        graph=False, models_only=True,
    ),
    Provider(
        "replknet", "depthwise_conv2d_implicit_gemm of RepLKNet", _replknet_why_not, _replknet,
        ops_only=True,
    ),
    Provider(
        "onnxruntime", "ONNX Runtime on torch.onnx.export's graph",
        lambda device, dtype: _cpu_float32(device, dtype)
        or _needs("onnx", "onnxscript", "onnxruntime"),
        runtimes.onnxruntime_cpu, models_only=True,
    ),
    Provider(
        "onnxruntime-cuda", "ONNX Runtime's CUDA provider, buffers on the device",
        lambda device, dtype: _cuda(device, dtype)
        or _needs("onnx", "onnxscript", "onnxruntime")
        or runtimes.onnxruntime_lacks("CUDAExecutionProvider"),
        runtimes.onnxruntime_cuda, graph=False, models_only=True,
    ),
    Provider(
        "tensorrt", "TensorRT, through ONNX Runtime's provider for it",
        lambda device, dtype: _cuda(device, dtype)
        or _needs("onnx", "onnxscript", "onnxruntime", "tensorrt")
        or runtimes.onnxruntime_lacks("TensorrtExecutionProvider"),
        runtimes.onnxruntime_tensorrt, graph=False, slow=True, models_only=True,
    ),
    Provider(
        "openvino", "OpenVINO on torch.onnx.export's graph",
        lambda device, dtype: _cpu_float32(device, dtype)
        or _needs("onnx", "onnxscript", "openvino"),
        runtimes.openvino_cpu, models_only=True,
    ),
    Provider(
        "openvino-bf16", "OpenVINO on torch.onnx.export's graph, bfloat16 allowed",
        lambda device, dtype: _needs("onnx", "onnxscript", "openvino")
        if (device.type, dtype) == ("cpu", torch.bfloat16)
        else "bfloat16 on a CPU only",
        lambda subject, example: runtimes.openvino_bfloat16(subject), models_only=True,
    ),
    _int8("onnxruntime-int8", "ONNX Runtime on the int8 file of to_onnx",
          lambda subject, example: runtimes.onnxruntime_file(subject.int8_onnx(depthwise=False))),
    _int8("onnxruntime-int8-depthwise", "the same, depthwise convolutions too",
          lambda subject, example: runtimes.onnxruntime_file(subject.int8_onnx(depthwise=True))),
    _int8("openvino-int8", "OpenVINO on the int8 file of to_onnx",
          lambda subject, example: runtimes.openvino_file(subject.int8_onnx(depthwise=False)),
          "openvino"),
    _int8("openvino-int8-depthwise", "the same, depthwise convolutions too",
          lambda subject, example: runtimes.openvino_file(subject.int8_onnx(depthwise=True)),
          "openvino"),
    _int8("ours-int8", 'convmixer_fast, optimize(precision="int8")', _fused_int8),
    _tensorrt("tensorrt-engine", "TensorRT's own API on torch.onnx.export's graph", None),
    _tensorrt("export-tensorrt", "the engine of to_tensorrt", "none"),
    _tensorrt("export-tensorrt-triton", 'that of to_tensorrt(plugins="triton")', "triton"),
    *(_exported(form) for form in (None, *FORMS)),
    *(_ours(backend) for backend in backends.BACKENDS),
    _ours_on_gpu(
        "graph", "replayed from a CUDA graph of the harness",
        lambda subject, example: _fused(subject), capture=True,
    ),
    _ours_on_gpu(
        "launches", "without CUDA graphs",
        lambda subject, example: _fused(subject, cuda_graphs=False), graph=False,
    ),
    _ours_on_gpu("chunks", "as many images at a time as stay in the L2 cache", _in_chunks),
    _ours_on_gpu("tuned", "after tune()", _tuned, slow=True),
)  # fmt: skip

PROVIDERS: Mapping[str, Provider] = {provider.name: provider for provider in _ALL}


def choose(
    names: str | None, device: torch.device, dtypes: Iterable[torch.dtype]
) -> tuple[list[Provider], dict[str, str]]:
    """Return the providers to measure, and why others cannot run here in any of ``dtypes``.

    Args:
        names: comma-separated; ``"all"``, or None for all that do not take minutes to build.
        device: of the run.
        dtypes: of the run.

    Raises:
        ValueError: a name is unknown, or that provider cannot run here.
    """
    reasons: dict[str, str] = {}
    for provider in PROVIDERS.values():
        why = [provider.why_not(device, dtype) for dtype in dtypes]
        if why and None not in why:
            reasons[provider.name] = str(why[0])
    here = [provider for provider in PROVIDERS.values() if provider.name not in reasons]
    if names is None:
        return [provider for provider in here if not provider.slow], reasons
    if names == "all":
        return here, reasons
    for name in names.split(","):
        if name not in PROVIDERS:
            raise ValueError(f"providers must be of {', '.join(PROVIDERS)}, or all, got {name!r}")
        if name in reasons:
            raise ValueError(f"provider {name!r} cannot run here: {reasons[name]}")
    return [PROVIDERS[name] for name in dict.fromkeys(names.split(","))], {}
