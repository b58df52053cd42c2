"""Scales of patch embedding and pointwise blocks, moved into the next layer's weights."""

from dataclasses import replace

import torch
from torch import Tensor

from convmixer_fast.spec import FoldedConvMixer, FoldedLayer

__all__ = ["scales_forward"]

_LEAST = 1e-3
"""Of the largest scale: what is smaller would make weights and shifts that lose their digits."""


def scales_forward(folded: FoldedConvMixer) -> FoldedConvMixer:
    """Return the same function with ``act(.) + shift / scale`` stored between layers.

    With ``z = s v`` between two layers, ``w`` becomes ``w s`` in the depthwise convolution, whose
    scale and shift are divided by ``s`` because its residual is ``v``; the pointwise weights
    take ``s`` back. A layer before which a scale is too small, or missing, stays as it is; so do
    one that holds modules of the source's own, and scales of what the head reads.
    """
    stem = before = folded.stem
    layers: list[FoldedLayer] = []
    for index, layer in enumerate(folded.layers):
        scale = before.scale if layer.is_plain and index not in folded.taps else None
        if scale is not None and scale.abs().min() > _LEAST * scale.abs().max():
            bare = replace(before, scale=None, shift=_divided(before.shift, scale))
            if index == 0:
                stem = bare
            else:
                layers[-1] = replace(layers[-1], pointwise=bare)
            layer = _rescaled(layer, scale)
        layers.append(layer)
        before = layer.pointwise
    return replace(folded, stem=stem, layers=tuple(layers))


def _rescaled(layer: FoldedLayer, scale: Tensor) -> FoldedLayer:
    depthwise, pointwise = layer.depthwise, layer.pointwise
    ones = torch.ones_like(scale)
    return FoldedLayer(
        replace(
            depthwise,
            weight=_times(depthwise.weight, scale[:, None, None, None]),
            scale=_divided(ones if depthwise.scale is None else depthwise.scale, scale),
            shift=_divided(depthwise.shift, scale),
        ),
        replace(pointwise, weight=_times(pointwise.weight, scale[:, None, None])),
    )


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.double() * scale.double()).to(weight.dtype)


def _divided(vector: Tensor | None, scale: Tensor) -> Tensor | None:
    return None if vector is None else (vector.double() / scale.double()).to(vector.dtype)
