"""Computes what a recorded TensorRT network would, in float64, and holds it to strong typing.

``Network(trt)`` is a :class:`tensorrt_double.Double` with a builder's answers. What was added
to it is evaluated from the recorded calls alone: layers, their properties and the bytes of their
weights. As in a strongly typed network, types are never converted implicitly: a layer whose inputs
differ in type is an error.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.export.trt_bindings import DATA_TYPES
from convmixer_fast.export.trt_plugin import DepthwisePlugin
from convmixer_fast.reference import depthwise_block_ref
from tests.export.tensorrt_aot import parameters, plan
from tests.export.tensorrt_double import Double, Recorder

Value = tuple[Tensor, Any]
"""A tensor in float64, and the type that TensorRT would give it."""


class Network(Double):
    """The double of a version, with what a build reads back, and the memory of its weights."""

    def __init__(self, bindings: Any, answers: dict[str, Any] | None = None) -> None:
        super().__init__(bindings, {**self._building(), **(answers or {})})
        self.plugins: dict[str, DepthwisePlugin] = {}
        self._memory: dict[int, tuple[Any, int, int]] = {}
        self._read: dict[int, bytes] = {}
        self._weights: list[Any] = []
        self._made: Recorder | None = None

    def _building(self) -> dict[str, Any]:
        return {
            "Builder.build_serialized_network": self._build,
            "IBuilderConfig.add_optimization_profile": 0,
            "ITimingCache.serialize": b"timings",
            "INetworkDefinition.num_inputs": 1,
            "INetworkDefinition.num_outputs": 1,
            "INetworkDefinition.add_input": self._add_input,
            "INetworkDefinition.get_input": lambda index: self._made,
            "INetworkDefinition.get_output": lambda index: self._output(index),
            "INetworkDefinition.add_plugin": lambda func, aot: Recorder(
                self, self.bindings.IPluginV3Layer
            ),
        }

    def Weights(self, kind: Any, address: int, count: int) -> Any:  # noqa: N802, TensorRT's name
        """Make the real ones, and remember where their numbers are."""
        weights = self.bindings.Weights(kind, address, count)
        self._weights.append(weights)
        self._memory[id(weights)] = (kind, address, count)
        return weights

    def _build(self, network: Any, config: Any) -> bytes:
        # When TensorRT reads them, and the last time that the memory must be there.
        self._read = {key: self._content(key) for key in self._memory}
        return b"plan"

    def _content(self, key: int) -> bytes:
        kind, address, count = self._memory[key]
        return ctypes.string_at(address, count * self._dtype(kind).itemsize)

    def _dtype(self, kind: Any) -> torch.dtype:
        return next(d for d, name in DATA_TYPES.items() if kind == getattr(self.DataType, name))

    def tensor(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Recorder:
        """Make an ITensor that can be read back."""
        made = Recorder(self, self.bindings.ITensor)
        made._values.update(name=name, dtype=dtype, shape=tuple(shape))
        return made

    def _add_input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Recorder:
        self._made = self.tensor(name, dtype, shape)
        return self._made

    def _output(self, index: int) -> Recorder:
        output = self.named("mark_output")[index].arguments["tensor"]
        shape = (2, *self._made._values["shape"][1:])
        value, kind = self.run(torch.zeros(shape, dtype=torch.float64))
        output._values.update(dtype=kind, shape=(-1, *value.shape[1:]))
        return output

    def numbers(self, weights: Any) -> Value:
        """Return weights in float64, flat, and their type."""
        key = id(weights)
        kind = self._memory[key][0]
        content = self._read[key] if key in self._read else self._content(key)
        return torch.frombuffer(bytearray(content), dtype=self._dtype(kind)).double(), kind

    def run(self, images: Tensor) -> Value:
        """Return the marked output for images (N, C, H, W)."""
        (marked,) = self.named("mark_output")
        return _Evaluation(self, images).of(marked.arguments["tensor"])


class _Evaluation:
    def __init__(self, network: Network, images: Tensor) -> None:
        self.network = network
        self.trt = network.bindings
        source = network._made
        self.values: dict[int, Value] = {id(source): (images, source._values["dtype"])}
        self.layers = {
            id(call.result): call for call in network.calls if call.name.startswith("add_")
        }
        self.producers = {
            id(call.result): call.target
            for call in network.calls
            if call.name == "get_output" and id(call.target) in self.layers
        }

    def of(self, tensor: Recorder) -> Value:
        if id(tensor) not in self.values:
            layer = self.producers[id(tensor)]
            call = self.layers[id(layer)]
            compute: Callable[..., Value] = getattr(self, call.name)
            self.values[id(tensor)] = compute(layer, **call.arguments)
        return self.values[id(tensor)]

    def weights(self, weights: Any, kind: Any) -> Tensor:
        found, own = self.network.numbers(weights)
        assert own == kind, f"weights are {own}, the input is {kind}"
        return found

    def add_convolution_nd(
        self, layer, input, num_output_maps, kernel_shape, kernel, bias=None
    ) -> Value:
        x, kind = self.of(input)
        groups = layer._values.get("num_groups", 1)
        weight = self.weights(kernel, kind)
        weight = weight.reshape(num_output_maps, x.shape[1] // groups, *kernel_shape)
        y = F.conv2d(
            x,
            weight,
            None if bias is None else self.weights(bias, kind),
            layer._values.get("stride_nd", (1, 1)),
            layer._values.get("padding_nd", (0, 0)),
            groups=groups,
        )
        return y, kind

    def add_activation(self, layer, input, type) -> Value:
        x, kind = self.of(input)
        alpha, beta = (layer._values.get(name) for name in ("alpha", "beta"))
        functions = {
            self.trt.ActivationType.CLIP: lambda x: x.clamp(alpha, beta),
            self.trt.ActivationType.GELU_ERF: F.gelu,
            self.trt.ActivationType.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
            self.trt.ActivationType.HARD_SIGMOID: lambda x: (alpha * x + beta).clamp(0, 1),
            self.trt.ActivationType.LEAKY_RELU: lambda x: F.leaky_relu(x, alpha),
            self.trt.ActivationType.RELU: F.relu,
            self.trt.ActivationType.SIGMOID: F.sigmoid,
        }
        return functions[type](x), kind

    def add_scale_nd(self, layer, input, mode, channel_axis, shift=None, scale=None) -> Value:
        x, kind = self.of(input)
        assert mode == self.trt.ScaleMode.CHANNEL
        shape = [1] * x.dim()
        shape[channel_axis] = -1
        if scale is not None:
            x = x * self.weights(scale, kind).reshape(shape)
        if shift is not None:
            x = x + self.weights(shift, kind).reshape(shape)
        return x, kind

    def add_cast(self, layer, input, to_type) -> Value:
        return self.of(input)[0], to_type

    def add_identity(self, layer, input) -> Value:
        return self.of(input)

    def add_constant(self, layer, shape, weights) -> Value:
        found, kind = self.network.numbers(weights)
        return found.reshape(shape), kind

    def add_elementwise(self, layer, input1, input2, op) -> Value:
        first, second = self._alike(input1, input2)
        operations = {
            self.trt.ElementWiseOperation.SUM: torch.add,
            self.trt.ElementWiseOperation.PROD: torch.mul,
        }
        return operations[op](first[0], second[0]), first[1]

    def add_matrix_multiply(self, layer, input0, op0, input1, op1) -> Value:
        first, second = self._alike(input0, input1)
        assert op0 == self.trt.MatrixOperation.NONE
        assert op1 == self.trt.MatrixOperation.TRANSPOSE
        return first[0] @ second[0].transpose(-1, -2), first[1]

    def _alike(self, *inputs: Recorder) -> list[Value]:
        values = [self.of(tensor) for tensor in inputs]
        assert len({str(kind) for _, kind in values}) == 1, f"types differ: {values}"
        assert len({value.dim() for value, _ in values}) == 1, f"ranks differ: {values}"
        return values

    def add_reduce(self, layer, input, op, axes, keep_dims) -> Value:
        x, kind = self.of(input)
        found = tuple(axis for axis in range(x.dim()) if axes >> axis & 1)
        reductions = {
            self.trt.ReduceOperation.AVG: torch.mean,
            self.trt.ReduceOperation.MAX: torch.amax,
        }
        return reductions[op](x, found, keepdim=keep_dims), kind

    def add_concatenation(self, layer, inputs) -> Value:
        values = self._alike(*inputs)
        return torch.cat([value for value, _ in values], layer._values["axis"]), values[0][1]

    def add_plugin(self, layer, func, aot) -> Value:
        """Make the plugin as TensorRT does, and check what it would launch for this batch."""
        assert aot is True
        made = func(self.trt.QuickPluginCreationRequest.STRICT_AOT)
        inputs = [self.of(tensor) for tensor in made[0]]
        (x, kind), (weight, _), *vectors = inputs
        own = self.network.plugins[made[2].plugin_name]
        shapes = [(kind, tuple(value.shape)) for value, kind in inputs]
        launch = plan(func, shapes, dynamic=[(0, 0)])
        expected = own.launch(x.shape[0])
        assert launch.grid == (expected.programs, 1, 1)
        assert launch.scalars == expected.sizes
        assert launch.outputs == ((kind, tuple(x.shape)),)
        assert (launch.kernel, launch.shared) == (own.kernel().name, own.kernel().shared)
        assert launch.block == (32 * own.kernel().warps, 1, 1)
        declared = parameters(launch.code, launch.kernel)
        assert declared == ["u64"] * len(inputs) + ["u32"] * len(launch.scalars) + ["u64"]
        assert kind == getattr(self.trt.DataType, DATA_TYPES[own.dtype])
        assert tuple(x.shape[1:]) == (own.channels, own.height, own.width)
        given = iter(value for value, _ in vectors)
        bias, scale, shift = (next(given) if has else None for has in own.vectors)
        assert next(given, None) is None
        y = depthwise_block_ref(x, weight, bias, scale, shift, own.activation, True)
        return y, kind
