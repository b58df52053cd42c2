"""The runtimes outside PyTorch, as callables on tensors: ONNX Runtime and OpenVINO."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmixer_fast.benchmarks.subjects import Subject
from convmixer_fast.choices import Plugins, float_precision

__all__ = [
    "onnxruntime_cpu",
    "onnxruntime_cuda",
    "onnxruntime_file",
    "onnxruntime_lacks",
    "onnxruntime_tensorrt",
    "openvino_bfloat16",
    "openvino_cpu",
    "openvino_file",
    "tensorrt_engine",
]

Call = Callable[[Tensor], Tensor]


def onnxruntime_lacks(provider: str) -> str | None:
    """Say that the onnxruntime installed has no such execution provider; None when it has."""
    found = importlib.import_module("onnxruntime").get_available_providers()
    return None if provider in found else f"the onnxruntime installed has no {provider}"


def _session(path: Path, providers: list[Any]) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in session.get_providers():
        raise RuntimeError(f"onnxruntime fell back from {wanted} to {session.get_providers()}")
    return session


def onnxruntime_cpu(
    subject: Subject, example: Tensor, *, exported: bool = False, form: str | None = None
) -> Call:
    """Return ONNX Runtime on the CPU, with as many threads as PyTorch.

    Args:
        subject: the model.
        example: not needed.
        exported: whether the file is this package's export, and not PyTorch's.
        form: of this package's export; None for its choice.
    """
    return onnxruntime_file(subject.exported_onnx(form) if exported else subject.onnx)


def onnxruntime_file(path: Path) -> Call:
    """Return ONNX Runtime on a file, on the CPU, with as many threads as PyTorch."""
    session = _session(path, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def onnxruntime_cuda(subject: Subject, example: Tensor) -> Call:
    """Return ONNX Runtime's CUDA provider on PyTorch's stream, without copies to the host."""
    return _on_device(subject, example, "CUDAExecutionProvider", {})


def onnxruntime_tensorrt(subject: Subject, example: Tensor) -> Call:
    """Return TensorRT inside ONNX Runtime; precision is that of the exported graph."""
    fp16 = {"trt_fp16_enable": "1"} if example.dtype == torch.float16 else {}
    return _on_device(subject, example, "TensorrtExecutionProvider", fp16)


def tensorrt_engine(subject: Subject, example: Tensor, *, plugins: Plugins | None = None) -> Call:
    """Return a TensorRT engine for the example's shape, by TensorRT's own Python API.

    Args:
        subject: the model.
        example: an input.
        plugins: of this package's export; None builds the engine of PyTorch's ONNX export.
    """
    from convmixer_fast.export import TensorRTModule, to_tensorrt

    batch, *_, height, width = example.shape
    path = subject.files() / f"{plugins}.engine"
    to_tensorrt(
        subject.onnx if plugins is None else subject.module,
        path,
        image_size=(height, width),
        precision=None if plugins is None else float_precision(example.dtype),
        min_batch=batch,
        max_batch=batch,
        plugins=plugins or "none",
        progress=False,
    )
    return TensorRTModule(path, device=example.device)


def _on_device(subject: Subject, example: Tensor, provider: str, options: dict[str, str]) -> Call:
    stream = str(torch.cuda.current_stream(example.device).cuda_stream)
    options = {"device_id": str(example.device.index or 0), "user_compute_stream": stream} | options
    session = _session(subject.onnx, [(provider, options), "CUDAExecutionProvider"])
    inputs, outputs = session.get_inputs()[0].name, session.get_outputs()[0].name
    element = {torch.float16: 10, torch.float32: 1, torch.bfloat16: 16}[example.dtype]
    shape = tuple(subject.module(example).shape)

    def call(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        binding = session.io_binding()
        index = x.device.index or 0
        binding.bind_input(inputs, "cuda", index, element, tuple(x.shape), x.data_ptr())
        binding.bind_output(outputs, "cuda", index, element, shape, out.data_ptr())
        session.run_with_iobinding(binding)
        return out

    return call


def openvino_cpu(subject: Subject, example: Tensor) -> Call:
    """Return OpenVINO on the CPU in float32, with as many threads as PyTorch."""
    return openvino_file(subject.onnx)


def openvino_bfloat16(subject: Subject) -> Call:
    """Return OpenVINO on the CPU with bfloat16 allowed, which takes and returns float32."""
    run = openvino_file(subject.float32_onnx, precision="bf16")
    return lambda x: run(x.float()).to(x.dtype)


def openvino_file(path: Path, precision: str = "f32") -> Call:
    """Return OpenVINO on a file, on the CPU, with as many threads as PyTorch.

    Args:
        path: of an ONNX file.
        precision: of what the file does not fix: ``"f32"`` or ``"bf16"``.
    """
    openvino = importlib.import_module("openvino")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(str(path), "CPU", config)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])
