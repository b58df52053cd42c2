"""TensorRTModule: an engine as an ``nn.Module`` that takes and returns PyTorch's CUDA tensors."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.errors import BackendUnavailableError, InferenceOnlyError
from convmixer_fast.export import trt_bindings
from convmixer_fast.export.metadata import read_engine_metadata
from convmixer_fast.export.trt_bindings import Log, torch_dtype
from convmixer_fast.runtime.cuda_graphs import CudaGraphs

__all__ = ["Streams", "TensorRTModule"]

_ALIGNMENT = 256
"""Bytes; what memory allocators give, and engines count on. A slice may lie elsewhere."""


class Streams:
    """PyTorch's current stream on one device, and the order of calls on different ones.

    Args:
        device: a CUDA device; None for the current one.

    Raises:
        ValueError: it is no CUDA device.
        BackendUnavailableError: PyTorch finds none here.
    """

    def __init__(self, device: str | torch.device | None) -> None:
        found = torch.device("cuda" if device is None else device)
        if found.type != "cuda":
            raise ValueError(f"TensorRT engines run on CUDA devices, got device={str(found)!r}")
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                "TensorRT engines run on NVIDIA GPUs, and PyTorch finds none here"
            )
        index = torch.cuda.current_device() if found.index is None else found.index
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self._order = torch.cuda.Event()

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Let what is launched inside follow, on the device, what was launched in here before."""
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                yield
                return
            stream = torch.cuda.current_stream()
            stream.wait_event(self._order)
            try:
                yield
            finally:
                self._order.record(stream)

    def current(self) -> int:
        """Return the handle of the current stream."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def finish(self) -> None:
        """Wait until the device is done with all that was launched."""
        self._order.synchronize()


class TensorRTModule(nn.Module):
    """Runs an engine that :func:`convmixer_fast.export.to_tensorrt` built, or any other.

    The input is read and the output written in place, in PyTorch's memory, on its current stream;
    the engine's own memory is PyTorch's too. It may be called from several threads and on several
    streams: calls of one module follow one another on the device. Copies and pickles load the
    engine again, from the same path. ``.to()`` changes nothing: an engine stays where it is.

    Args:
        path: of the engine; ``<path>.json`` beside it says whether it is version compatible.
            An engine is code: load none that you would not run.
        device: a CUDA device; None for the current one.
        cuda_graph: whether an input shape's work is captured in a CUDA graph when it comes
            again, and then launched at once; see :class:`runtime.cuda_graphs.CudaGraphs`.

    Raises:
        FileNotFoundError: there is no such file.
        MissingDependencyError: TensorRT is not installed.
        BackendUnavailableError: PyTorch finds no GPU.
        TensorRTError: TensorRT cannot load the engine: it is of another version or GPU, or
            no engine at all.
        ValueError: ``device`` is no CUDA device, or the engine has several inputs, or several
            outputs with ``cuda_graph``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.path = Path(path).absolute()
        self.cuda_graph = cuda_graph
        plan = self.path.read_bytes()
        trt = trt_bindings.load_tensorrt()
        self._trt = trt
        self._log = Log(trt)
        self._streams = Streams(device)
        self.device: torch.device = self._streams.device
        self._lock = threading.Lock()
        with self._streams.ordered():
            self._engine = self._load(plan)
            size = max(1, self._engine.device_memory_size_v2)
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._read_tensors()
        if cuda_graph and len(self._outputs) > 1:
            raise ValueError(f"cuda_graph=True takes one output, the engine has {self._outputs}")
        self._graphs = CudaGraphs(self._run) if cuda_graph else None
        self._contexts: dict[tuple[int, ...], Any] = {}
        # Before contexts and memory go, the device must be done with them.
        weakref.finalize(self, self._streams.finish).atexit = False
        self.eval()

    def _load(self, plan: bytes) -> Any:
        # Kept, because the engine refers to it.
        self._runtime = self._trt.Runtime(self._log.logger)
        said = read_engine_metadata(self.path)
        if said.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            built = said.get("versions", {}).get("tensorrt")
            hint = f", built by TensorRT {built}" if built else ""
            raise self._log.error(
                f"TensorRT {self._trt.__version__} cannot load the engine {self.path}{hint}"
            )
        return engine

    def _read_tensors(self) -> None:
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {
            name: engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names
        }
        inputs = [name for name in names if is_input[name]]
        if len(inputs) != 1:
            raise ValueError(f"expected an engine with one input, {self.path} has {inputs}")
        self._input = inputs[0]
        self._outputs = [name for name in names if not is_input[name]]
        self._dtypes = {
            name: torch_dtype(self._trt, engine.get_tensor_dtype(name)) for name in names
        }
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(self._input, 0)]
        self._smallest, self._largest = shapes[0], shapes[-1]

    def forward(self, x: Tensor) -> Any:
        """Run the engine.

        Args:
            x: (N, C, H, W), of the engine's dtype and device; copied first if it is not
                contiguous, or a slice that begins between two multiples of 256 bytes.

        Returns:
            The output, or a tuple of them if the engine has several.

        Raises:
            ValueError: the shape is outside of what the engine was built for, or the device
                another one.
            TypeError: the dtype is another one.
            InferenceOnlyError: x requires a gradient.
            TensorRTError: TensorRT refused the call.
        """
        self._check(x)
        x = x.detach().contiguous()
        if x.data_ptr() % _ALIGNMENT:
            x = x.clone()
        with self._lock, self._streams.ordered():
            return self._run(x, "") if self._graphs is None else self._graphs(x, "")

    def _check(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise InferenceOnlyError("a TensorRT engine has no gradients; call it under no_grad()")
        limits = list(zip(self._smallest, self._largest, strict=True))
        if x.dim() != len(limits) or not all(
            least <= size <= most for size, (least, most) in zip(x.shape, limits, strict=True)
        ):
            sizes = [str(a) if a == b else f"{a} to {b}" for a, b in limits]
            raise ValueError(
                f"the engine takes inputs ({', '.join(sizes)}), got {tuple(x.shape)}; build one "
                "for such inputs with to_tensorrt"
            )
        wanted = self._dtypes[self._input]
        if x.dtype != wanted:
            raise TypeError(f"the engine takes {wanted}, got {x.dtype}; convert it with x.to()")
        if x.device != self.device:
            raise ValueError(f"the engine is on {self.device}, got an input on {x.device}")

    def _run(self, x: Tensor, _result: str) -> Any:
        shape = tuple(x.shape)
        context = self._context(shape)
        self._accept(context.set_input_shape(self._input, shape), f"the input shape {shape}")
        outputs = [
            torch.empty(
                tuple(context.get_tensor_shape(name)),
                dtype=self._dtypes[name],
                device=self.device,
            )
            for name in self._outputs
        ]
        for name, tensor in zip((self._input, *self._outputs), (x, *outputs), strict=True):
            address = tensor.data_ptr()
            self._accept(context.set_tensor_address(name, address), f"the memory of {name}")
        self._accept(context.execute_async_v3(self._streams.current()), "to run the engine")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _context(self, shape: tuple[int, ...]) -> Any:
        """Return what runs inputs of a shape: a graph keeps to the shape of its context."""
        key = shape if self._graphs is not None else ()
        if key not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise self._log.error("TensorRT could not make an execution context")
            # Calls follow one another, so that all contexts can use the same memory.
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
            # Only the first context has the profile of itself.
            stream = self._streams.current()
            self._accept(context.set_optimization_profile_async(0, stream), "its profile")
            self._contexts[key] = context
        return self._contexts[key]

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise self._log.error(f"TensorRT refused {what}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_module, (self.path, self.device, self.cuda_graph)

    def extra_repr(self) -> str:
        """Return the path and the shapes that it takes."""
        return f"{str(self.path)!r}, {self._smallest} to {self._largest}"


def _load_module(path: Path, device: torch.device, cuda_graph: bool) -> TensorRTModule:
    return TensorRTModule(path, device=device, cuda_graph=cuda_graph)
