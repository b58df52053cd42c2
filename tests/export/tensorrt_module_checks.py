"""Checks of trt_module.py, on a double of an engine and with the CPU in the place of CUDA."""

import copy
import ctypes
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import tensorrt as trt
import torch
from torch import nn

from convmixer_fast.errors import InferenceOnlyError, TensorRTError
from convmixer_fast.export import trt_module
from convmixer_fast.export.metadata import metadata_path
from convmixer_fast.runtime.cuda_graphs import CudaGraphs
from tests.export.tensorrt_driving import raised, using
from tests.export.tensorrt_interpreter import Network
from tests.runtime.test_cuda_graphs import FakeDevice


class FakeStreams:
    """Stands for CUDA: the CPU, where everything has happened already."""

    def __init__(self, device: Any) -> None:
        self.device = torch.device("cpu")
        self.entered = 0

    @contextmanager
    def ordered(self) -> Any:
        self.entered += 1
        yield

    def current(self) -> int:
        return 77

    def finish(self) -> None:
        pass


def runner(answers: dict[str, Any] | None = None) -> Network:
    """Return a double with an engine that adds up the positions of (N, 3, 2, 2), N from 2 to 4."""
    state: dict[str, Any] = {}

    def execute(stream_handle: int) -> bool:
        assert stream_handle == 77
        images, output = state["images"], state["logits"]
        x = view(images, (state["batch"], 3, 2, 2))
        view(output, (state["batch"], 3)).copy_(x.sum((2, 3)))
        return True

    def shape(name: str, shape: tuple[int, ...]) -> bool:
        state["batch"] = shape[0]
        return True

    def address(name: str, memory: int) -> bool:
        state[name] = memory
        return True

    return Network(
        trt,
        {
            "ICudaEngine.num_io_tensors": 2,
            "ICudaEngine.device_memory_size_v2": 1000,
            "ICudaEngine.get_tensor_name": lambda index: ("logits", "images")[index],
            "ICudaEngine.get_tensor_mode": lambda name: (
                trt.TensorIOMode.INPUT if name == "images" else trt.TensorIOMode.OUTPUT
            ),
            "ICudaEngine.get_tensor_dtype": lambda name: trt.float32,
            "ICudaEngine.get_tensor_profile_shape": lambda name, profile_index: [
                (n, 3, 2, 2) for n in (2, 3, 4)
            ],
            "IExecutionContext.get_tensor_shape": lambda name: (state["batch"], 3),
            "IExecutionContext.set_input_shape": shape,
            "IExecutionContext.set_tensor_address": address,
            "IExecutionContext.execute_async_v3": execute,
            **(answers or {}),
        },
    )


def view(address: int, shape: tuple[int, ...]) -> torch.Tensor:
    """View memory as float32."""
    content = (ctypes.c_float * math.prod(shape)).from_address(address)
    return torch.frombuffer(content, dtype=torch.float32).reshape(shape)


@contextmanager
def loaded(network: Network, said: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """Write an engine, and load it from a double."""
    with using(network) as folder, mock.patch.object(trt_module, "Streams", FakeStreams):
        path = folder / "engine"
        path.write_bytes(b"plan")
        if said is not None:
            metadata_path(path).write_text(json.dumps(said))
        yield trt_module.TensorRTModule(path, **options)


def check_module_runs() -> None:
    network = runner()
    # PyTorch aligns to 64 bytes on a CPU, and to 512 on a GPU.
    with mock.patch.object(trt_module, "_ALIGNMENT", 64), loaded(network) as module:
        assert isinstance(module, nn.Module)
        assert not module.training
        for n in (2, 3, 4, 2):
            x = torch.randn(n, 3, 2, 2)
            torch.testing.assert_close(module(x), x.sum((2, 3)))
        x = torch.randn(9, 3, 2, 2)[3:7]  # begins between two multiples of 64 bytes
        torch.testing.assert_close(module(x), x.sum((2, 3)))
        x = torch.randn(2, 2, 2, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(module(x), x.sum((2, 3)))
        assert len(network.named("create_execution_context")) == 1
        (memory,) = network.named("set_device_memory")
        assert memory.arguments["size"] == 1000
        (given,) = network.named("deserialize_cuda_engine")
        assert given.arguments == {"serialized_engine": b"plan"}
        assert not network.named("engine_host_code_allowed =")
        addresses = [call.arguments for call in network.named("set_tensor_address")]
        assert all(a["memory"] % 64 == 0 for a in addresses if a["name"] == "images")
        x = torch.zeros(256, 3, 2, 2)[:4]
        module(x)
        assert network.named("set_tensor_address")[-2].arguments["memory"] == x.data_ptr()
        assert "engine" in repr(module)


def check_module_refuses() -> None:
    with loaded(runner()) as module:
        good = torch.zeros(2, 3, 2, 2)
        takes = "takes inputs (2 to 4, 3, 2, 2)"
        for x, kind, message in (
            (torch.zeros(1, 3, 2, 2), ValueError, takes),
            (torch.zeros(5, 3, 2, 2), ValueError, takes),
            (torch.zeros(2, 3, 2, 3), ValueError, takes),
            (torch.zeros(3, 2, 2), ValueError, takes),
            (good.half(), TypeError, "takes torch.float32, got torch.float16"),
            (good.to("meta"), ValueError, "is on cpu, got an input on meta"),
            (good.clone().requires_grad_(), InferenceOnlyError, "no gradients"),
        ):
            found = raised(kind, lambda x=x: module(x))
            assert message in found, found
    for name, what in (
        ("set_input_shape", "the input shape (2, 3, 2, 2)"),
        ("set_tensor_address", "the memory of images"),
        ("execute_async_v3", "to run the engine"),
        ("set_optimization_profile_async", "its profile"),
    ):
        refusing = runner({f"IExecutionContext.{name}": False})
        with loaded(refusing) as module:
            found = raised(TensorRTError, lambda module=module: module(good))
            assert f"refused {what}" in found, found
    with loaded(runner({"ICudaEngine.create_execution_context": None})) as module:
        assert "execution context" in raised(TensorRTError, lambda module=module: module(good))


def check_module_loading() -> None:
    with loaded(network := runner(), {"version_compatible": True}):
        (allowed,) = network.named("engine_host_code_allowed =")
        assert allowed.arguments == {"value": True}
    broken = runner({"Runtime.deserialize_cuda_engine": None})
    said = {"versions": {"tensorrt": "9.9"}}
    message = raised(TensorRTError, lambda: loaded(broken, said).__enter__())
    assert "built by TensorRT 9.9" in message, message
    assert str(trt.__version__) in message
    inputs = {"ICudaEngine.get_tensor_mode": lambda name: trt.TensorIOMode.INPUT}
    message = raised(ValueError, lambda: loaded(runner(inputs)).__enter__())
    assert "expected an engine with one input" in message
    names = {
        "ICudaEngine.num_io_tensors": 3,
        "ICudaEngine.get_tensor_name": lambda index: ("logits", "images", "mask")[index],
    }
    message = raised(ValueError, lambda: loaded(runner(names), cuda_graph=True).__enter__())
    assert "cuda_graph=True takes one output" in message
    with loaded(runner(names)) as module:
        outputs = module(torch.ones(2, 3, 2, 2))
        assert [tuple(output.shape) for output in outputs] == [(2, 3), (2, 3)]


def check_module_copies() -> None:
    with loaded(network := runner()) as module:
        x = torch.randn(2, 3, 2, 2)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other is not module
            assert other._engine is not module._engine
            torch.testing.assert_close(other(x), x.sum((2, 3)))
        assert len(network.named("deserialize_cuda_engine")) == 3


def check_module_graphs() -> None:
    device = FakeDevice()
    graphs = partial(CudaGraphs, device=device)
    network = runner()
    with (
        mock.patch.object(trt_module, "CudaGraphs", graphs),
        loaded(network, cuda_graph=True) as module,
    ):
        for n in (2, 4, 2, 4, 2, 4):
            x = torch.randn(n, 3, 2, 2)
            torch.testing.assert_close(module(x), x.sum((2, 3)))
    assert device.captured == [(2, 3, 2, 2), (4, 3, 2, 2)]
    assert device.replays == 4
    # A graph refers to its context, and a context to its shape; memory is shared.
    assert len(network.named("create_execution_context")) == 2
    assert len({call.arguments["memory"] for call in network.named("set_device_memory")}) == 1
