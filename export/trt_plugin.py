"""A depthwise block as a TensorRT layer: this package's Triton kernel, compiled ahead of time.

The kernel and tile are those that :mod:`convmixer_fast.kernels.depthwise_block` chooses for the
batch that the engine is optimized for. Its PTX goes into the engine, which then needs neither
Triton nor Python to run.

Tiles are not offered to TensorRT as tactics, although ``tensorrt.plugin.autotune`` has them: how
the timing cache tells the tactics of such plugins apart is not documented, every one of them must
be compiled, and the table's choice is what the package runs everywhere else.
"""

import functools
import inspect
import re
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convmixer_fast.errors import BackendUnavailableError
from convmixer_fast.export.trt_bindings import load_plugin_package
from convmixer_fast.kernels.depthwise_block import choose_config, depthwise_launch
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.launch import (
    FIRST_SIZE,
    INT32_ELEMENTS,
    Epilogue,
    Launch,
    is_interpreted,
)
from convmixer_fast.spec import FoldedBlock

__all__ = ["DepthwisePlugin", "Kernel", "adapt", "depthwise_op"]

_NAMESPACE = "convmixer_fast"
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_VECTORS = ("bias", "scale", "shift")

_PTX_VERSIONS = ((100, 86), (120, 87))
"""The PTX version for devices up to a capability: the oldest that knows them, for old drivers."""
_NEWEST_PTX_VERSION = 88

Expression = Any
"""An int, or one of ``tensorrt.plugin``'s symbolic integers."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, PTX as :func:`adapt` leaves it, warps and bytes of shared memory."""

    name: str
    ptx: bytes
    warps: int
    shared: int


@dataclass(frozen=True)
class DepthwisePlugin:
    """What a depthwise block is compiled for: all but its weights and the batch."""

    channels: int
    height: int
    width: int
    kernel_size: int
    dtype: torch.dtype
    activation: str
    vectors: tuple[bool, bool, bool]
    """Whether there are a bias, a scale and a shift."""
    tile: ToeplitzTile | DirectTile
    capability: int
    """Of the device, 90 for 9.0."""

    @classmethod
    def of(cls, block: FoldedBlock, shape: Sequence[int], capability: int) -> "DepthwisePlugin":
        """Return the plugin of a block for x of ``shape`` (N, C, H, W), N the usual batch."""
        _, channels, height, width = shape
        kernel_size = block.weight.shape[3]
        x = torch.empty(tuple(shape), dtype=block.weight.dtype, device="meta")
        bias, scale, shift = (getattr(block, name) is not None for name in _VECTORS)
        return cls(
            *(channels, height, width, kernel_size, block.weight.dtype, block.activation),
            vectors=(bias, scale, shift),
            tile=choose_config(x, kernel_size).tile,
            capability=capability,
        )

    @property
    def name(self) -> str:
        """A name that no other plugin has: TensorRT tells them apart by it alone."""
        shape = f"c{self.channels}_{self.height}x{self.width}_k{self.kernel_size}"
        given = [name for name, is_given in zip(_VECTORS, self.vectors, strict=True) if is_given]
        tile = [type(self.tile).__name__, *("x" if n is None else str(n) for n in self.tile)]
        words = ["depthwise", shape, str(self.dtype).removeprefix("torch."), self.activation]
        return "_".join([*words, *given, *tile, f"sm{self.capability}"])

    def inputs(self) -> tuple[str, ...]:
        """Return the names of the tensors that it takes."""
        given = [name for name, is_given in zip(_VECTORS, self.vectors, strict=True) if is_given]
        return ("x", "weight", *given)

    def launch(self, images: int) -> Launch:
        """Return the launch for a batch, whose tensors have no memory."""

        def tensor(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, out = (tensor(images, self.channels, self.height, self.width) for _ in range(2))
        weight = tensor(self.channels, 1, self.kernel_size, self.kernel_size)
        bias, scale, shift = (
            tensor(self.channels, dtype=torch.float32) if is_given else None
            for is_given in self.vectors
        )
        epilogue = Epilogue(bias, scale, shift, self.activation)
        return depthwise_launch(x, weight, epilogue, out, True, self.tile)

    def grid(self, images: Expression, cdiv: Callable[[Any, Any], Any]) -> Expression:
        """Return how many programs a batch takes, in ``*`` and ``cdiv``, which expressions have."""
        if isinstance(self.tile, ToeplitzTile):
            one = self.tile._replace(BLOCK_N=1)
            windows = one.programs(self.kernel_size, (1, 1, self.height, self.width))
            return cdiv(images * windows, self.tile.BLOCK_N) * self.channels
        return images * self.launch(1).programs

    def scalars(self, images: Expression) -> list[Expression]:
        """Return the integers that the kernel takes."""
        launch = self.launch(1)
        names = _sizes_of(launch)
        return [
            images if name == "images" else size
            for name, size in zip(names, launch.sizes, strict=True)
        ]

    @functools.cache  # noqa: B019, there are few, and compiling one takes seconds
    def kernel(self) -> Kernel:
        """Compile the kernel.

        Raises:
            BackendUnavailableError: Triton is in its interpreter, which compiles nothing.
            ValueError: an image has more numbers than the kernel's integers can count.
        """
        launch = self.launch(1)
        if is_interpreted(launch.kernel):
            raise BackendUnavailableError(
                "Triton runs in its interpreter (TRITON_INTERPRET=1), which compiles nothing; "
                "unset that for plugins='triton'"
            )
        if self.channels * self.height * self.width >= INT32_ELEMENTS:
            raise ValueError(f"plugins='triton': x is too large for 32-bit strides in {self.name}")
        version = next(
            (version for limit, version in _PTX_VERSIONS if self.capability <= limit),
            _NEWEST_PTX_VERSION,
        )
        source, options = _source(launch)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={**options, "ptx_version": version},
        )
        name, found = compiled.metadata.name, compiled.metadata
        ptx = adapt(compiled.asm["ptx"], name, len(self.inputs()))
        return Kernel(name, ptx, found.num_warps, found.shared)


def _sizes_of(launch: Launch) -> list[str]:
    """Return the names of the kernel's integers."""
    return list(launch.kernel.arg_names[FIRST_SIZE : FIRST_SIZE + len(launch.sizes)])


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Return what Triton compiles for a launch, and the compiler's options."""
    constants = {**launch.constants, "PTX": True}
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    arguments = (launch.x, launch.weight, *launch.epilogue.vectors(), launch.out, *launch.sizes)
    given: dict[str, Any] = dict(zip(launch.kernel.arg_names, arguments, strict=False))
    constants |= {name: None for name, value in given.items() if value is None}
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            # TensorRT aligns activations to 256 bytes; of constants nothing is said.
            aligned = name in ("x_ptr", "out_ptr")
        else:
            signature[name] = "i32"
            aligned = name != "images" and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def adapt(ptx: str, name: str, inputs: int) -> bytes:
    """Make Triton's PTX of a kernel (pointers to inputs and output, integers) one for TensorRT.

    TensorRT passes the inputs, then the integers, then the output. Parameters are read by name,
    so it is enough to declare them in that order. The two pointers to scratch memory that Triton
    appends are left out, because nothing reads them. So is the ``a`` of ``sm_90a``, which TensorRT
    is said to refuse: kernels with wgmma cannot do without it, those here can.

    Args:
        ptx: of one kernel.
        name: the kernel's.
        inputs: how many pointers precede the output's.

    Raises:
        ValueError: there is no such kernel in it, or it needs scratch memory.
    """
    entry = re.search(rf"(\.entry\s+{re.escape(name)}\s*\()(.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError(f"the PTX has no kernel {name!r}")
    declared = [parameter.strip() for parameter in entry[2].split(",")]
    pointers = [parameter for parameter in declared if ".u64" in parameter]
    integers = [parameter for parameter in declared if parameter not in pointers]
    hidden = [parameter.split()[-1] for parameter in pointers[inputs + 1 :]]
    if used := [scratch for scratch in hidden if re.search(rf"\[{scratch}\b", ptx)]:
        raise ValueError(f"{name} uses scratch memory, which TensorRT has none of: {used}")
    ordered = ",\n".join([*pointers[:inputs], *integers, pointers[inputs]])
    ptx = ptx[: entry.start(2)] + ordered + ptx[entry.end(2) :]
    return re.sub(r"(\.target sm_\d+)a\b", r"\1", ptx).encode()


def depthwise_op(
    shape: Sequence[int], capability: int
) -> Callable[[FoldedBlock, Any, Sequence[Any]], Any]:
    """Return what makes the plugins of depthwise blocks for x of ``shape`` (N, C, H, W).

    The result, ``op(block, x, constants)``, compiles and registers the plugin, once in a process,
    and returns what ``network.add_plugin(..., aot=True)`` takes.

    Args:
        shape: N is the batch to optimize for; C is taken from the block.
        capability: of the device, 90 for 9.0.

    Raises:
        ValueError: the kernels need compute capability 8.0.
    """
    if capability < 80:
        raise ValueError(
            f"plugins='triton' needs compute capability 8.0 or above, got {capability}; "
            "use plugins='none'"
        )

    def op(block: FoldedBlock, x: Any, constants: Sequence[Any]) -> Any:
        images, _, height, width = shape
        sizes = (images, block.weight.shape[0], height, width)
        plugin = DepthwisePlugin.of(block, sizes, capability)
        plugin.kernel()  # what TensorRT's own call raises is printed and lost
        return _register(plugin)(x, *constants)

    return op


_registered: dict[str, Callable[..., Any]] = {}
_registering = threading.Lock()


def _register(plugin: DepthwisePlugin) -> Callable[..., Any]:
    """Register a plugin where that was not done, and return its op, ``op(*tensors)``.

    It has no attributes on purpose: what it needs to know is in the plugin. TensorRT 10.13 to
    10.15 garble attributes under NumPy 2, all versions pass those that ``aot_impl`` left out, and
    none of them would go into the engine.
    """
    with _registering:
        if plugin.name not in _registered:
            _registered[plugin.name] = _declare(plugin)
        return _registered[plugin.name]


def _declare(plugin: DepthwisePlugin) -> Callable[..., Any]:
    trtp = load_plugin_package()

    def describe(*tensors: Any) -> Any:
        return tensors[0].like()

    def implement(*arguments: Any) -> tuple[str, bytes, Any, Any]:
        images = arguments[0].shape_expr[0]
        kernel = plugin.kernel()
        grid = plugin.grid(images, trtp.cdiv)
        launch = trtp.KernelLaunchParams(grid, 1, 1, kernel.warps * 32, shared_mem=kernel.shared)
        # Nothing but 32-bit integers is accepted, and arithmetic makes others of them.
        scalars = tuple(trtp.SymInt32(value) for value in plugin.scalars(images))
        return kernel.name, kernel.ptx, launch, trtp.SymIntExprs.from_tuple(scalars)

    result = types.GenericAlias(tuple, (str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
    tensors = dict.fromkeys(plugin.inputs(), trtp.TensorDesc)
    others = {"outputs": types.GenericAlias(tuple, (trtp.TensorDesc,)), "tactic": int}
    _sign(describe, tensors, trtp.TensorDesc)
    _sign(implement, {**tensors, **others}, result)
    plugin_id = f"{_NAMESPACE}::{plugin.name}"
    trtp.register(plugin_id)(describe)
    trtp.aot_impl(plugin_id)(implement)
    made: Callable[..., Any] = getattr(getattr(trtp.op, _NAMESPACE), plugin.name)
    return made


def _sign(function: Any, parameters: dict[str, Any], result: Any) -> None:
    """Give a function the signature that the decorators demand, for any number of tensors."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [inspect.Parameter(name, kind, annotation=a) for name, a in parameters.items()]
    function.__signature__ = inspect.Signature(found, return_annotation=result)
