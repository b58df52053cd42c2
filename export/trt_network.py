"""A folded ConvMixer as a strongly typed TensorRT network, layer by layer.

Every tensor has the type that it is given here: weights, convolutions and activations are of the
run's dtype, scale, shift, the residual sum, pooling and the head float32 between casts, as the
kernels of this package compute them. Activations stay in the dtype of their convolution, because
TensorRT fuses the two where both have one type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convmixer_fast.activations import ACTIVATIONS, Activation
from convmixer_fast.errors import TensorRTError, UnsupportedModelError
from convmixer_fast.export.trt_bindings import data_type
from convmixer_fast.spec import FoldedBlock, FoldedConvMixer, Head

__all__ = ["INPUT_NAME", "OUTPUT_NAME", "DepthwiseOp", "Layers", "add_convmixer", "plain_head"]

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


DepthwiseOp = Callable[[FoldedBlock, Any, Sequence[Any]], Any]
"""``op(block, x, constants)``: what ``network.add_plugin`` takes for a whole depthwise block."""


def plain_head(folded: FoldedConvMixer) -> Head:
    """Return the head of a model that consists of nothing but what a network is made of here.

    Raises:
        UnsupportedModelError: something else stands before or after its layers.
    """
    others = {"prefix": folded.prefix, "preprocess": folded.preprocess}
    names = [name for name, module in others.items() if module is not None]
    if not all(layer.is_plain for layer in folded.layers):
        names.append("modules inside layers")
    if not isinstance(folded.head, Head):
        names.append("head")
    if names or not isinstance(folded.head, Head):
        raise UnsupportedModelError(
            f"the model's {' and '.join(names)} can be any PyTorch code, and a TensorRT network is "
            "made of a stem, layers, global pooling and at most one linear layer; export it to "
            "ONNX first (convmixer_fast.export.to_onnx) and pass that file"
        )
    return folded.head


class Layers:
    """Adds layers to a network, and keeps the memory that the network only refers to.

    Weights are read when the engine is built: whoever builds holds this object until then. NumPy
    arrays would be held by the network itself, but have no bfloat16.

    Args:
        trt: the bindings.
        network: an ``INetworkDefinition``.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt = trt
        self.network = network
        self.kept: list[Tensor] = []

    def added(self, layer: Any, name: str) -> Any:
        """Name a layer and return its output.

        Raises:
            TensorRTError: there is no layer: what TensorRT refuses is None.
        """
        if layer is None:
            raise TensorRTError(f"TensorRT refused the layer {name!r}; its log says why")
        layer.name = name
        output = layer.get_output(0)
        output.name = name
        return output

    def weights(self, tensor: Tensor) -> Any:
        """Return a tensor's numbers as a layer takes them."""
        tensor = tensor.detach().cpu().contiguous()
        self.kept.append(tensor)
        kind = data_type(self.trt, tensor.dtype)
        return self.trt.Weights(kind, tensor.data_ptr(), tensor.numel())

    def constant(self, tensor: Tensor, name: str) -> Any:
        """Add a tensor's numbers as a tensor of the network."""
        weights = self.weights(tensor)
        return self.added(self.network.add_constant(tuple(tensor.shape), weights), name)

    def cast(self, x: Any, source: torch.dtype, target: torch.dtype, name: str) -> Any:
        """Add a conversion, where the dtypes differ: types are never converted implicitly."""
        if source == target:
            return x
        return self.added(self.network.add_cast(x, data_type(self.trt, target)), name)

    def elementwise(self, first: Any, second: Any, operation: str, name: str) -> Any:
        """Add SUM, PROD ... of two tensors of one rank and type, which broadcast over 1."""
        op = getattr(self.trt.ElementWiseOperation, operation)
        return self.added(self.network.add_elementwise(first, second, op), name)

    def reduce(self, x: Any, operation: str, name: str) -> Any:
        """Add a reduction of (N, C, H, W) over its positions, to (N, C)."""
        op = getattr(self.trt.ReduceOperation, operation)
        axes = (1 << 2) | (1 << 3)
        return self.added(self.network.add_reduce(x, op, axes=axes, keep_dims=False), name)

    def convolution(self, x: Any, block: FoldedBlock, name: str, **properties: Any) -> Any:
        """Add a block's convolution and activation.

        Args:
            x: (N, C_in, H, W), dtype of the weight.
            block: its bias is rounded to that dtype, which the layer wants.
            name: of the convolution.
            properties: of the layer: ``stride_nd``, ``num_groups`` ...
        """
        channels, _, *kernel = block.weight.shape
        weight = self.weights(block.weight)
        bias = () if block.bias is None else (self.weights(block.bias.to(block.weight.dtype)),)
        layer = self.network.add_convolution_nd(x, channels, tuple(kernel), weight, *bias)
        if layer is not None:
            for key, value in properties.items():
                setattr(layer, key, value)
        y = self.added(layer, name)
        return self.activation(y, ACTIVATIONS[block.activation], f"{name}.act")

    def activation(self, x: Any, row: Activation, name: str) -> Any:
        """Add an activation: TensorRT's own, or x times a gate of TensorRT's."""
        layer = self.network.add_activation(x, getattr(self.trt.ActivationType, row.tensorrt))
        if layer is not None:
            for key, value in row.tensorrt_parameters.items():
                setattr(layer, key, value)
        y = self.added(layer, name)
        return self.elementwise(x, y, "PROD", f"{name}.gate") if row.tensorrt_gate else y

    def epilogue(self, y: Any, block: FoldedBlock, residual: Any | None, name: str) -> Any:
        """Add ``y * scale + shift``, plus ``residual``, computed in float32 and rounded once."""
        dtype = block.weight.dtype
        vectors = {
            key: self.weights(vector.float())
            for key, vector in (("shift", block.shift), ("scale", block.scale))
            if vector is not None
        }
        if not vectors and residual is None:
            return y
        y = self.cast(y, dtype, torch.float32, f"{name}.float")
        if vectors:
            mode = self.trt.ScaleMode.CHANNEL
            layer = self.network.add_scale_nd(y, mode, **vectors, channel_axis=1)
            y = self.added(layer, f"{name}.norm")
        if residual is not None:
            wide = self.cast(residual, dtype, torch.float32, f"{name}.input.float")
            y = self.elementwise(y, wide, "SUM", f"{name}.sum")
        return self.cast(y, torch.float32, dtype, f"{name}.rounded")


def add_convmixer(
    trt: Any,
    network: Any,
    folded: FoldedConvMixer,
    image_size: tuple[int, int],
    depthwise: DepthwiseOp | None = None,
) -> Layers:
    """Fill ``network`` with a ConvMixer for images of one size and any batch.

    Input ``images`` (N, C_in, H, W) and output ``output`` are of the weights' dtype.

    Args:
        trt: the bindings.
        network: empty and strongly typed.
        folded: fp32, fp16 or bf16.
        image_size: (H, W).
        depthwise: makes the plugin of a depthwise block, residual included; None makes it of
            TensorRT's own layers.

    Returns:
        What must be held until the engine is built.

    Raises:
        UnsupportedModelError: see :func:`plain_head`.
        ValueError: the image is smaller than a patch, or the head's linear layer takes other
            features than it gets.
        TensorRTError: TensorRT refused a layer.
    """
    head = plain_head(folded)
    layers = Layers(trt, network)
    stem = folded.stem
    dtype = stem.weight.dtype
    in_chans, *patch = stem.weight.shape[1:]
    _check_sizes(folded, head, image_size)
    kind = data_type(trt, dtype)
    x = network.add_input(INPUT_NAME, kind, (-1, in_chans, *image_size))
    if x is None:
        raise TensorRTError(f"TensorRT refused an input of {in_chans} x {image_size}")
    x = layers.convolution(x, stem, "stem", stride_nd=tuple(patch))
    x = layers.epilogue(x, stem, None, "stem")
    for i, layer in enumerate(folded.layers):
        x = _add_depthwise(layers, x, layer.depthwise, depthwise, f"layers.{i}.depthwise")
        name = f"layers.{i}.pointwise"
        y = layers.convolution(x, layer.pointwise, name)
        x = layers.epilogue(y, layer.pointwise, None, name)
    output = _add_head(layers, x, head, dtype)
    output.name = OUTPUT_NAME
    network.mark_output(output)
    return layers


def _check_sizes(folded: FoldedConvMixer, head: Head, image_size: tuple[int, int]) -> None:
    patch = folded.stem.weight.shape[2:]
    if any(side < least for side, least in zip(image_size, patch, strict=True)):
        raise ValueError(
            f"image_size {image_size[0]} x {image_size[1]} is smaller than a patch, "
            f"{patch[0]} x {patch[1]} pixels; give a larger one"
        )
    if head.weight is None:
        return
    last = folded.layers[-1].pointwise if folded.layers else folded.stem
    channels = last.weight.shape[0]
    features = {"catavgmax": 2 * channels, "": image_size[1] // patch[1]}
    found = features.get(head.global_pool, channels)
    if found != head.weight.shape[1]:
        raise ValueError(
            f"the head takes {head.weight.shape[1]} features, and images of {image_size[0]} x "
            f"{image_size[1]} give it {found}; pass the image_size that the model is made for"
        )


def _add_depthwise(
    layers: Layers, x: Any, block: FoldedBlock, op: DepthwiseOp | None, name: str
) -> Any:
    if op is None:
        channels, _, *kernel = block.weight.shape
        padding = tuple(side // 2 for side in kernel)
        y = layers.convolution(x, block, name, num_groups=channels, padding_nd=padding)
        return layers.epilogue(y, block, x, name)
    # A plugin takes tensors only, so its weights are constants of the network.
    fields = {key: getattr(block, key) for key in ("weight", "bias", "scale", "shift")}
    constants = [
        layers.constant(tensor, f"{name}.{key}")
        for key, tensor in fields.items()
        if tensor is not None
    ]
    return layers.added(layers.network.add_plugin(op(block, x, constants), aot=True), name)


def _add_head(layers: Layers, x: Any, head: Head, dtype: torch.dtype) -> Any:
    """Add pooling and the linear layer, in float32; the result is rounded to ``dtype``."""
    if not head.global_pool and head.weight is None:
        # The features themselves; an output needs a name of its own.
        return layers.added(layers.network.add_identity(x), "features")
    x = layers.cast(x, dtype, torch.float32, "features.float")
    x, rank = _add_pooling(layers, x, head.global_pool)
    if head.weight is not None:
        ones = (1,) * (rank - 2)
        weight = layers.constant(head.weight.float().reshape(*ones, *head.weight.shape), "head")
        plain, transposed = layers.trt.MatrixOperation.NONE, layers.trt.MatrixOperation.TRANSPOSE
        product = layers.network.add_matrix_multiply(x, plain, weight, transposed)
        x = layers.added(product, "head.product")
        if head.bias is not None:
            bias = layers.constant(head.bias.float().reshape(*ones, 1, -1), "head.bias")
            x = layers.elementwise(x, bias, "SUM", "head.sum")
    return layers.cast(x, torch.float32, dtype, "rounded")


def _add_pooling(layers: Layers, x: Any, kind: str) -> tuple[Any, int]:
    """Add one of :data:`model.POOLS`; return its result and that one's rank."""
    if not kind:
        return x, 4
    if kind in ("avg", "max"):
        return layers.reduce(x, kind.upper(), "pool"), 2
    mean, largest = layers.reduce(x, "AVG", "pool.avg"), layers.reduce(x, "MAX", "pool.max")
    if kind == "catavgmax":
        both = layers.network.add_concatenation([mean, largest])
        if both is not None:
            both.axis = 1
        return layers.added(both, "pool"), 2
    half = layers.constant(torch.full((1, 1), 0.5), "pool.half")
    both = layers.elementwise(mean, largest, "SUM", "pool.sum")
    return layers.elementwise(both, half, "PROD", "pool"), 2
