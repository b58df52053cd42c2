"""A folded ConvMixer as an ordinary module of PyTorch's own operations: what exporters trace."""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.export.forms import Form
from convmixer_fast.export.rescale import scales_forward
from convmixer_fast.models.convmixer import POOLS
from convmixer_fast.models.outputs import with_dictionaries
from convmixer_fast.spec import FoldedBlock, FoldedConvMixer, FoldedLayer, Head

__all__ = ["PlainConvMixer"]


class PlainConvMixer(nn.Module):
    """What a :class:`FoldedConvMixer` computes, in one of the forms of :mod:`forms`.

    In 16 bits convolutions and activations are of that dtype; scale, shift, the residual sum,
    pooling and the classifier (not a head of the source's own) are of float32: eager BatchNorm's
    are, and a channel that hardly varies has a large scale, which would lose its digits.

    Args:
        folded: the folded form; its tensors are copied where they change.
        form: how scales and shifts are written.
        float32_io: whether 16-bit models take and return float32.
    """

    def __init__(self, folded: FoldedConvMixer, form: Form, *, float32_io: bool = False) -> None:
        super().__init__()
        if form.scales_forward:
            folded = scales_forward(folded)
        self.dtype = folded.stem.weight.dtype
        self.float32_io = float32_io
        self.prefix = folded.prefix
        self.preprocess = folded.preprocess
        self.stem = _Block(folded.stem, form)
        self.layers = nn.Sequential(*(_Layer(layer, form) for layer in folded.layers))
        self.taps = folded.taps
        self.source_head: nn.Module | None = None
        self.classifier: nn.Linear | None = None
        if isinstance(folded.head, Head):
            self.pool = folded.head.global_pool
            self.classifier = _linear(folded.head)
        else:
            self.source_head = folded.head
        layers = [(layer.entry, layer.branch) for layer in folded.layers]
        for modules in (self.prefix, self.preprocess, self.source_head, *chain(*layers)):
            if modules is not None:
                modules.to(self.dtype)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Any:
        """Map images (N, C, H, W) to what the source module returns."""
        if x.is_floating_point():
            x = x.to(self.dtype)
        if self.prefix is not None:
            x = self.prefix(x)
        extras: tuple[Any, ...] = (x,)
        if self.preprocess is not None:
            x, *rest = self.preprocess(x)
            extras = tuple(rest)
        # The source's own code may have its own idea of the dtype.
        features = self.stem(x.to(self.dtype))
        values = [features]
        for layer in self.layers:
            features = layer(features)
            values.append(features)
        if self.source_head is not None:
            taps = [values[step] for step in self.taps]
            # Exporters know no dataclasses.
            outputs = with_dictionaries(self.source_head(features, *taps, *extras))
            return pytree.tree_map(_to_float32, outputs) if self.float32_io else outputs
        # Wide, because it costs next to nothing.
        out = POOLS[self.pool](features if self.pool == "" else features.float())
        if self.classifier is not None:
            out = self.classifier(out.float())
        return out.float() if self.float32_io else out.to(self.dtype)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Layer(nn.Module):
    """The two blocks of a layer, and what the source has before and between them."""

    def __init__(self, layer: FoldedLayer, form: Form) -> None:
        super().__init__()
        self.entry, self.branch = layer.entry, layer.branch
        self.depthwise = _Block(layer.depthwise, form, depthwise=True)
        self.depthwise.residual = layer.branch is None
        self.pointwise = _Block(layer.pointwise, form)

    def forward(self, x: Tensor) -> Tensor:
        if self.entry is not None:
            x = self.entry(x)
        y: Tensor = self.depthwise(x)
        if self.branch is not None:
            y = self.branch(y) + x
        out: Tensor = self.pointwise(y)
        return out


class _Block(nn.Module):
    """``act(conv(x) + bias) * scale + shift``, plus x where it has a residual."""

    def __init__(self, block: FoldedBlock, form: Form, depthwise: bool = False) -> None:
        super().__init__()
        self.residual = depthwise
        weight, bias, scale, shift = block.weight, block.bias, block.scale, block.shift
        positive = scale is not None and bool((scale > 0).all())
        activation = ACTIVATIONS[block.activation]
        if form.fold_scales and activation.homogeneous and scale is not None and positive:
            weight = (weight.to(scale.dtype) * scale[:, None, None, None]).to(weight.dtype)
            bias = None if bias is None else bias * scale
            scale = None
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.dtype))
        self.activation = (form.in_parts and activation.parts) or activation.function
        self.depthwise = depthwise
        kind = "affine" if form.scales_forward and scale is None else form.norm
        self.norm = _norm(kind, len(weight), scale, shift)

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[2:]
        out = F.conv2d(
            x,
            self.weight,
            self.bias,
            stride=1 if self.depthwise else tuple(size),
            padding=size[0] // 2 if self.depthwise else 0,
            groups=len(self.weight) if self.depthwise else 1,
        )
        out = self.activation(out)
        if self.norm is None:
            return out + x if self.residual else out
        wide: Tensor = self.norm(out.to(torch.promote_types(out.dtype, torch.float32)))
        if self.residual:
            wide = wide + x.to(wide.dtype)
        return wide.to(x.dtype)


def _norm(kind: str, channels: int, scale: Tensor | None, shift: Tensor | None) -> nn.Module | None:
    if scale is None and shift is None:
        return None
    if kind == "affine":
        return _Affine(scale, shift)
    like = scale if scale is not None else shift
    assert like is not None
    scale = torch.ones_like(like) if scale is None else scale
    shift = torch.zeros_like(like) if shift is None else shift
    norm: nn.Module
    if kind == "depthwise":
        norm = nn.Conv2d(channels, channels, 1, groups=channels, device="cpu", dtype=like.dtype)
        norm.weight = nn.Parameter(scale[:, None, None, None])
    else:
        # Mean 0 and variance 1: nothing is left of BatchNorm's own algebra.
        norm = nn.BatchNorm2d(channels, eps=0.0, device="cpu", dtype=like.dtype)
        norm.weight = nn.Parameter(scale)
    norm.bias = nn.Parameter(shift)
    return norm


class _Affine(nn.Module):
    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(scale[:, None, None])
        self.shift = None if shift is None else nn.Parameter(shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = x * self.scale
        return x if self.shift is None else x + self.shift


def _linear(head: Head) -> nn.Linear | None:
    if head.weight is None:
        return None
    classes, features = head.weight.shape
    linear = nn.Linear(features, classes, bias=head.bias is not None, device="meta")
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    linear.weight = nn.Parameter(head.weight.to(wide))
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.to(wide))
    return linear
