"""Plain data between recognition and everything that runs or exports a ConvMixer.

:func:`recognize.recognize` reads a module into a :class:`ConvMixerSpec`: raw
weights and BatchNorm statistics. :func:`folding.fold` turns that into a
:class:`FoldedConvMixer`: what each fused op takes. Neither knows of backends,
files or devices; the tensors of a spec may be the source model's own and are
only read.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DTYPES",
    "Affine",
    "BatchNorm",
    "Block",
    "ConvMixerSpec",
    "FoldedBlock",
    "FoldedConvMixer",
    "FoldedLayer",
    "Head",
    "Layer",
    "Quantization",
    "SizeCondition",
]


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights and activations may be."""


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm in eval mode: ``(v - mean) / sqrt(var + eps) * weight + bias`` per channel."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Affine:
    """``v * scale + shift`` per channel: LayerScale, or BatchNorm frozen by hand."""

    scale: Tensor | None
    """(C,), or () for all channels; float64."""
    shift: Tensor | None


@dataclass(frozen=True)
class Block:
    """Convolution, activation, BatchNorm: the unit of which a ConvMixer is made."""

    weight: Tensor
    """(C_out, C_in / groups, K_h, K_w)."""
    bias: Tensor | None
    activation: str
    """A name of :data:`activations.ACTIVATIONS`."""
    norms: tuple[BatchNorm | Affine, ...]
    """What follows the activation, in its order."""
    inner: tuple[BatchNorm | Affine, ...] = ()
    """What stands between convolution and activation."""
    dilation: int = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1 pickled one BatchNorm.
        if "norm" in state:
            state = {**state, "norms": (state["norm"],)}
            del state["norm"]
        self.__dict__.update(state)


@dataclass(frozen=True)
class Layer:
    """One ConvMixer layer: ``y = depthwise(x) + x``, then ``pointwise(y)``."""

    depthwise: Block
    pointwise: Block
    branch: nn.Module | None = None
    """The source's own graph of what stands between the depthwise block and the sum, such as
    squeeze-and-excite: ``y = branch(depthwise(x)) + x``."""
    entry: nn.Module | None = None
    """The source's own graph of what stands before x, behind the layer before or the stem."""


@dataclass(frozen=True)
class Head:
    """Global pooling, then a linear layer, or none where ``weight`` is None."""

    global_pool: str
    """A name of :data:`model.POOLS`."""
    weight: Tensor | None = None
    """(num_classes, F)."""
    bias: Tensor | None = None


@dataclass(frozen=True)
class SizeCondition:
    """A condition on the input's N, H and W under which the recognised computation holds.

    A model whose Python code looks at the size of its input computes something else,
    or nothing, where the condition is false.

    Args:
        text: a Python expression in N, H and W, such as ``"(H % 7) == 0"``.
    """

    text: str

    def __post_init__(self) -> None:
        # Compiled once, here, because torch.compile cannot trace an eval().
        names = {"math": math, "torch": torch}
        object.__setattr__(self, "_holds", eval(f"lambda N, H, W: {self.text}", names))

    def __reduce__(self) -> tuple[type["SizeCondition"], tuple[str]]:
        return SizeCondition, (self.text,)

    def holds(self, n: int, h: int, w: int) -> bool:
        """Whether the condition is true of an input (n, channels, h, w)."""
        return bool(self._holds(n, h, w))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ConvMixerSpec:
    """What a module computes: ``head(layers(stem(preprocess(prefix(image)))))``."""

    stem: Block
    layers: tuple[Layer, ...]
    head: Head | nn.Module
    """A :class:`Head`, or where the source has another one, the source's own graph:
    called with the features (N, C, H, W), then the outputs of ``taps``, then what
    ``preprocess`` returns besides the stem's input, or where there is no ``preprocess`` the
    image."""
    prefix: nn.Module | None
    """The source's own modules, untraced, that stand before everything else; None for none."""
    preprocess: nn.Module | None
    """The source's own graph of what stands before the stem: returns the stem's input, then
    what the head takes too. None where nothing does."""
    conditions: tuple[SizeCondition, ...]
    taps: tuple[int, ...] = ()
    """Steps before the last whose outputs the head takes too, rising: 0 is the stem, n layer n."""
    input_name: str = "x"
    """What the source's forward calls the image."""
    input_layout: str = "NCHW"
    """Of the image: ``"NCHW"`` or ``"NHWC"``."""


@dataclass(frozen=True)
class Quantization:
    """Of a convolution on numbers of 8 bits, as QuantizeLinear and DequantizeLinear of ONNX say it.

    Its weight is ``weight * weight_scale``, with int8 ``weight``; its input
    ``(q - zero_point) * input_scale``, with ``q = round(x / input_scale) + zero_point`` from 0 to
    255, halves to even.
    """

    weight_scale: Tensor
    """(C_out,), float32."""
    input_scale: Tensor
    """(), float32."""
    zero_point: Tensor
    """(), uint8."""
    output_scale: Tensor
    """(), float32: of the convolution's result in a file, where it has 8 bits too; the engine
    does not round it."""
    output_zero_point: Tensor
    """(), uint8."""

    def input(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to what 8 bits hold, in its own dtype."""
        scale, zero = self.input_scale.to(x.dtype), self.zero_point.to(x.dtype)
        rounded = (x / scale).round().clamp(-zero, 255 - zero)
        return rounded * scale

    def weight(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights that ``numbers`` (C_out, ...), int8, stand for."""
        return numbers.to(dtype) * self.weight_scale.to(dtype)[:, None, None, None]


@dataclass(frozen=True)
class FoldedBlock:
    """What one fused op takes: ``act(conv(x, weight) + bias) * scale + shift``."""

    weight: Tensor
    """(C_out, C_in / groups, K_h, K_w); int8 where there is a ``quantization``."""
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: str
    quantization: Quantization | None = None

    def in_float32(self) -> "FoldedBlock":
        """Return it with the weights that 8-bit numbers stand for; its input is not rounded."""
        if self.quantization is None:
            return self
        weight = self.quantization.weight(self.weight, torch.float32)
        return replace(self, weight=weight, quantization=None)


@dataclass(frozen=True)
class FoldedLayer:
    """The two fused ops of a layer; the first one also adds its input."""

    depthwise: FoldedBlock
    pointwise: FoldedBlock
    branch: nn.Module | None = None
    """See :class:`Layer`; the depthwise op then adds nothing."""
    entry: nn.Module | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but the two ops."""
        return self.branch is None and self.entry is None


@dataclass(frozen=True)
class FoldedConvMixer:
    """A :class:`ConvMixerSpec` with every BatchNorm folded away; owns its tensors.

    Layers that the source shares between positions are one object at each of them.
    """

    stem: FoldedBlock
    layers: tuple[FoldedLayer, ...]
    head: Head | nn.Module
    prefix: nn.Module | None
    preprocess: nn.Module | None
    conditions: tuple[SizeCondition, ...]
    taps: tuple[int, ...] = ()
    input_name: str = "x"
    input_layout: str = "NCHW"

    def quantized_blocks(self) -> dict[str, FoldedBlock]:
        """Return the blocks of 8-bit numbers, by the names that an export gives them."""
        blocks = {"stem": self.stem}
        blocks |= {f"layers.{i}.pointwise": one.pointwise for i, one in enumerate(self.layers)}
        return {name: block for name, block in blocks.items() if block.quantization is not None}

    def in_float32(self) -> "FoldedConvMixer":
        """Return it with the weights that 8-bit numbers stand for; no inputs are rounded."""
        layers = (replace(one, pointwise=one.pointwise.in_float32()) for one in self.layers)
        return replace(self, stem=self.stem.in_float32(), layers=tuple(layers))
