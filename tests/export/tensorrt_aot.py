"""Drives an ahead-of-time plugin as TensorRT's builder does: what would be launched, for a shape?

Import it after `tensorrt_bindings.load`. It takes the calls and their order from the C++ interface
(NvInferPythonPlugin.h); everything that it calls is the real `tensorrt.plugin`.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import tensorrt as trt
from tensorrt.plugin import _tensor

Shape = tuple[int, ...]

OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: operator.add,
    trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.MAX: max,
    trt.DimensionOperation.MIN: min,
    trt.DimensionOperation.SUB: operator.sub,
    trt.DimensionOperation.EQUAL: lambda a, b: int(a == b),
    trt.DimensionOperation.LESS: lambda a, b: int(a < b),
    trt.DimensionOperation.FLOOR_DIV: operator.floordiv,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Registry(dict[tuple[str, str], Any]):
    """Stands for the plugin registry, by `trt.get_plugin_registry = Registry().itself`."""

    def itself(self) -> "Registry":
        """Return the registry."""
        return self

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        """Keep a creator."""
        self[creator.name, plugin_namespace] = creator
        return True

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        """Return the creator of a plugin, or None."""
        return self.get((type, plugin_namespace))


class Number(trt.IDimensionExpr):
    """A dimension at one shape; symbolic, that is unknown to the plugin, where it is dynamic."""

    value: int
    symbolic: bool

    @classmethod
    def of(cls, value: int, symbolic: bool = False) -> "Number":
        """Make one: the class has no constructor that Python may call."""
        number = trt.IDimensionExpr.__new__(cls)
        number.value, number.symbolic = value, symbolic
        return number  # type: ignore[no-any-return]

    def is_constant(self) -> bool:
        """Tell whether a plugin may read the value."""
        return not self.symbolic

    def get_constant_value(self) -> int:
        """Return the value."""
        if self.symbolic:
            raise ValueError("a dynamic dimension has no value when the engine is built")
        return self.value


class Numbers(trt.IExprBuilder):
    """Computes at once what TensorRT would keep as an expression."""

    def constant(self, value: int) -> Number:
        """Return a constant."""
        return Number.of(value)

    def operation(self, op: Any, first: Number, second: Number) -> Number:
        """Return the value of an operation."""
        value = OPERATIONS[op](first.value, second.value)
        return Number.of(value, first.symbolic or second.symbolic)


@dataclass(frozen=True)
class Launch:
    """What TensorRT would launch."""

    kernel: str
    code: bytes
    grid: Shape
    block: Shape
    shared: int
    scalars: Shape
    outputs: tuple[tuple[Any, Shape], ...]


class _Settings(dict[int, Number]):
    """Both what launch parameters and what scalar arguments are written into."""

    nbSymExprs = 0  # noqa: N815, TensorRT's name


def plan(
    make_plugin: Callable[[Any], Any],
    inputs: Sequence[tuple[Any, Shape]],
    dynamic: Sequence[tuple[int, int]] = (),
    tactic: int = 0,
) -> Launch:
    """Return what an op, as `trt.plugin.op.namespace.name(*tensors)` gives it, would launch.

    `inputs` are types and shapes, `dynamic` the (input, axis) pairs that are dynamic.
    """
    plugin = make_plugin(trt.QuickPluginCreationRequest.STRICT_AOT)[2]
    numbers, count = Numbers(), len(inputs)
    dims = [
        [Number.of(size, (i, axis) in dynamic) for axis, size in enumerate(shape)]
        for i, (_, shape) in enumerate(inputs)
    ]
    types = plugin.get_output_data_types([kind for kind, _ in inputs], [len(d) for d in dims])
    plugin.get_output_shapes(dims, [], numbers)
    made = [[size._expr for size in desc.shape_expr] for desc in plugin.output_descs]
    tensors = [
        _describe(kind, found)
        for kind, found in zip([*(kind for kind, _ in inputs), *types], dims + made, strict=True)
    ]
    plugin.get_supported_format_combinations(tensors, count)
    plugin.configure_plugin(tensors[:count], tensors[count:])
    if tactic not in (plugin.get_valid_tactics() or [0]):
        raise ValueError(f"tactic {tactic} is not one of {plugin.get_valid_tactics()}")
    plugin.set_tactic(tactic)
    settings, scalars = _Settings(), _Settings()
    # The bindings' own class for a number on its way to TensorRT cannot be read back.
    with mock.patch.object(_tensor, "SymExprImpl", lambda symbol: symbol._expr):
        plugin.get_launch_params(dims, tensors, count, settings, scalars, numbers)
    kernel, code = plugin.get_kernel(
        [tensor.desc for tensor in tensors[:count]], [tensor.desc for tensor in tensors[count:]]
    )

    def value(name: str, number: Number | None) -> int:
        if number is None:  # a float, or one of NumPy's integers, becomes nothing at all
            raise TypeError(f"{name} is neither an int nor a symbolic integer")
        return number.value

    def three(name: str) -> Shape:
        return tuple(value(f"{name}_{axis}", getattr(settings, f"{name}_{axis}")) for axis in "xyz")

    return Launch(
        kernel,
        code,
        three("grid"),
        three("block"),
        value("shared_mem", settings.shared_mem),  # type: ignore[attr-defined]
        tuple(value(f"scalar {i}", scalars[i]) for i in range(scalars.nbSymExprs)),
        tuple((t, tuple(size.value for size in m)) for t, m in zip(types, made, strict=True)),
    )


def parameters(ptx: bytes, kernel: str) -> list[str]:
    """Return the types of a kernel's parameters, as PTX has them."""
    found = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\((.*?)\)", ptx.decode(), re.DOTALL)
    if found is None:
        raise ValueError(f"the PTX has no kernel {kernel!r}")
    return re.findall(r"\.param\s+\.(\w+)", found[1])


def _describe(kind: Any, dims: Sequence[Number]) -> Any:
    tensor, desc = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
    desc.dims = [-1 if size.symbolic else size.value for size in dims]
    desc.type, desc.format, desc.scale = kind, trt.TensorFormat.LINEAR, 1.0
    tensor.desc = desc
    tensor.min = tensor.opt = tensor.max = [size.value for size in dims]
    return tensor
