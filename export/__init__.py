"""Exporters of the folded form: ONNX, OpenVINO, torch.export, TensorRT, Triton Inference Server.

Importing this loads none of what they need: each is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convmixer_fast.export.onnx_export import OnnxReport, to_onnx
    from convmixer_fast.export.onnx_module import OnnxModule
    from convmixer_fast.export.openvino_export import OpenVinoReport, to_openvino
    from convmixer_fast.export.torch_export import TorchExportReport, to_torch_export
    from convmixer_fast.export.triton_server import to_triton_server
    from convmixer_fast.export.trt_engine import EngineReport, to_tensorrt
    from convmixer_fast.export.trt_module import TensorRTModule

__all__ = [
    "EngineReport",
    "OnnxModule",
    "OnnxReport",
    "OpenVinoReport",
    "TensorRTModule",
    "TorchExportReport",
    "to_onnx",
    "to_openvino",
    "to_tensorrt",
    "to_torch_export",
    "to_triton_server",
]

_MODULES = {
    "EngineReport": "trt_engine",
    "OnnxModule": "onnx_module",
    "OnnxReport": "onnx_export",
    "OpenVinoReport": "openvino_export",
    "TensorRTModule": "trt_module",
    "TorchExportReport": "torch_export",
    "to_onnx": "onnx_export",
    "to_openvino": "openvino_export",
    "to_tensorrt": "trt_engine",
    "to_torch_export": "torch_export",
    "to_triton_server": "triton_server",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
