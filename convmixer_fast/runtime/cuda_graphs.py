"""A function of one tensor by CUDA graphs: captured for each shape, replayed, few at a time.

A ConvMixer of 32 layers is 65 kernels of some microseconds each, and Python takes longer to
launch one than the device to run it. A graph is launched at once. It reads and writes memory of
its own, so that an input is copied in and a result out, and it belongs to one shape, dtype,
layout and device.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CAPTURING", "CapturedCall", "CudaDevice", "CudaGraphs", "GraphDevice"]

Run = Callable[[Tensor, str], Tensor]


class CapturedCall(Protocol):
    """One captured graph."""

    def replay(self, x: Tensor, static_output: bool) -> Tensor:
        """Run on ``x``; return the graph's own result, or a copy of it."""

    def finish(self) -> None:
        """Wait until the device is done with it: it is about to be dropped."""


class GraphDevice(Protocol):
    """What :class:`CudaGraphs` needs of CUDA."""

    def is_capturing(self) -> bool:
        """Whether a graph is being captured on the current stream."""

    def capture(self, call: Callable[[Tensor], Tensor], x: Tensor) -> CapturedCall:
        """Capture ``call`` on a tensor like ``x``."""


class CudaGraphs:
    """``run(x, result)`` by graphs.

    Safe to call from several Python threads and on any stream: calls of one object follow one
    another on the device. While another capture is running on the current stream, the kernels are
    launched one by one, and become part of that.

    Args:
        run: what is captured; it must not depend on anything but shapes and memory that stays.
        first_calls: that many calls of a shape are run without a graph before it is captured,
            because capturing takes tens of milliseconds and memory: 1 spares shapes that come once.
        capacity: graphs kept; the one that was used longest ago goes first.
        static_output: whether the graph's own result is returned: no copy, but the next call
            with the same shape overwrites it, and graphs do not share memory.
        device: CUDA, or what stands in for it in tests.
    """

    def __init__(
        self,
        run: Run,
        *,
        first_calls: int = 1,
        capacity: int = 8,
        static_output: bool = False,
        device: GraphDevice | None = None,
    ) -> None:
        self._run = run
        self._first_calls = first_calls
        self._capacity = capacity
        self._static_output = static_output
        # Results that stay in a graph's memory must not share it with another graph's work.
        self._device = CudaDevice(shared=not static_output) if device is None else device
        self._lock = threading.Lock()
        self._graphs: OrderedDict[object, CapturedCall] = OrderedDict()
        self._seen: OrderedDict[object, int] = OrderedDict()

    def __call__(self, x: Tensor, result: str) -> Tensor:
        """Return ``run(x, result)``."""
        if x.numel() == 0 or self._device.is_capturing():
            return self._run(x, result)
        key = (x.shape, x.stride(), x.dtype, x.device, result)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and not self._is_new(key):
                graph = self._capture(key, x, result)
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph.replay(x, self._static_output)
        return self._run(x, result)

    def _capture(self, key: object, x: Tensor, result: str) -> CapturedCall | None:
        try:
            graph = self._device.capture(lambda static: self._run(static, result), x)
        except torch.OutOfMemoryError:
            # A graph needs an input and a result of its own. Without one it may still fit.
            if self._first_calls == 0:
                raise
            self._seen[key] = -_GIVE_UP
            return None
        self._graphs[key] = graph
        if len(self._graphs) > self._capacity:
            _, oldest = self._graphs.popitem(last=False)
            oldest.finish()
        return graph

    def _is_new(self, key: object) -> bool:
        """Count a call of ``key``, and say whether it is one of the first."""
        calls = self._seen.pop(key, 0)
        self._seen[key] = calls + 1
        if len(self._seen) > 4 * self._capacity:
            self._seen.popitem(last=False)
        return calls < self._first_calls


_GIVE_UP = 1000
"""Calls until a capture for which there was no memory is tried again."""

CAPTURING = threading.Lock()
"""PyTorch can capture one graph at a time."""


class CudaDevice:
    """Graphs of one :class:`CudaGraphs`.

    Args:
        shared: whether they share the memory of all but their inputs.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self._shared = shared
        self._places: dict[torch.device, _Place] = {}

    def is_capturing(self) -> bool:
        """Whether a graph is being captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, call: Callable[[Tensor], Tensor], x: Tensor) -> CapturedCall:
        """Capture ``call`` on a tensor like ``x``, after a call that compiles and allocates."""
        device = x.device
        # Not inference tensors: replays write to them in other modes too.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device), CAPTURING:
            if device not in self._places:
                self._places[device] = _Place()
            place = self._places[device]
            current, side = torch.cuda.current_stream(), place.stream
            static = torch.empty_like(x)
            static.copy_(x)
            current.wait_event(place.order)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                call(static)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=place.pool if self._shared else None,
                stream=side,
                capture_error_mode="thread_local",
            ):
                out = call(static)
        return _CudaCall(graph, static, out, place.order)


class _Place:
    """What the graphs of one device have in common."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        # One for all captures: memory is given again to the stream that it was first given to.
        self.stream = torch.cuda.Stream()
        self.order = torch.cuda.Event()
        """The last replay's end: graphs of one pool must not run at once."""


class _CudaCall:
    def __init__(
        self, graph: torch.cuda.CUDAGraph, x: Tensor, out: Tensor, order: torch.cuda.Event
    ) -> None:
        self._graph, self._x, self._out, self._order = graph, x, out, order

    def replay(self, x: Tensor, static_output: bool) -> Tensor:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            # Graphs of one pool use the same memory, and streams do not wait for each other.
            stream.wait_event(self._order)
            with torch.no_grad():
                self._x.copy_(x)
            self._graph.replay()
            out = self._out if static_output else self._out.clone()
            self._order.record(stream)
        return out

    def finish(self) -> None:
        self._order.synchronize()
