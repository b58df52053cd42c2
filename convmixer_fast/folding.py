"""BatchNorm in eval mode -> scale and shift, folded forward, in float64.

BatchNorm stands behind the activation, so it does not fold into its own convolution: it
becomes ``v -> s v + t`` per channel, the scale and shift of the fused op's epilogue.

The depthwise shift could move through the residual sum into the pointwise bias,
``b' = b + W t``, and save an addition. It stays, because without it what is stored
between the two ops is not centred: a channel that hardly varies has a large ``s``, and
its ``s v`` alone costs a 16-bit number its digits, or overflows it.

This is the only place that knows BatchNorm's algebra.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer_fast.spec import (
    DTYPES,
    Affine,
    BatchNorm,
    Block,
    ConvMixerSpec,
    FoldedBlock,
    FoldedConvMixer,
    FoldedLayer,
    Head,
)

__all__ = ["fold"]


def fold(spec: ConvMixerSpec, dtype: torch.dtype | None = None) -> FoldedConvMixer:
    """Fold every BatchNorm of ``spec`` away.

    Args:
        spec: what :func:`recognize.recognize` returned; it and its tensors are only read.
        dtype: of the weights; None keeps the stem's. Bias, scale and shift are at least
            float32, because rounding them would cost accuracy and save nothing.

    Returns:
        The folded form; it shares no memory with ``spec``.

    Raises:
        TypeError: ``dtype``, or that of the weights, is none of :data:`spec.DTYPES`.
    """
    weights = spec.stem.weight.dtype if dtype is None else dtype
    if weights not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise TypeError(f"dtype must be one of {known}, got {weights!r}")
    vectors = torch.promote_types(weights, torch.float32)

    def rounded(block: FoldedBlock) -> FoldedBlock:
        cast = _caster(vectors)
        return replace(
            block,
            weight=_caster(weights)(block.weight),
            bias=cast(block.bias),
            scale=cast(block.scale),
            shift=cast(block.shift),
        )

    # Layers that the source shares between positions stay shared.
    done: dict[tuple[object, ...], FoldedLayer] = {}
    layers = []
    for layer in spec.layers:
        key = *_identity(layer.depthwise), *_identity(layer.pointwise)
        key = *key, id(layer.branch), id(layer.entry)
        if key not in done:
            done[key] = FoldedLayer(
                rounded(_fold_depthwise(layer.depthwise)),
                rounded(_fold_block(layer.pointwise)),
                copy.deepcopy(layer.branch),
                copy.deepcopy(layer.entry),
            )
        layers.append(done[key])
    if isinstance(spec.head, Head):
        cast = _caster(weights)
        head: Head | nn.Module = replace(
            spec.head, weight=cast(spec.head.weight), bias=cast(spec.head.bias)
        )
    else:
        head = copy.deepcopy(spec.head)
    return FoldedConvMixer(
        stem=rounded(_fold_block(spec.stem)),
        layers=tuple(layers),
        head=head,
        prefix=copy.deepcopy(spec.prefix),
        preprocess=copy.deepcopy(spec.preprocess),
        conditions=spec.conditions,
        taps=spec.taps,
        input_name=spec.input_name,
        input_layout=spec.input_layout,
    )


def _fold_block(block: Block) -> FoldedBlock:
    weight, bias = block.weight.double(), block.bias
    inner_scale, inner_shift = _composed(block.inner)
    bias = None if bias is None else bias.double()
    if inner_scale is not None:
        weight = weight * inner_scale.expand(len(weight))[:, None, None, None]
        bias = None if bias is None else bias * inner_scale
    if inner_shift is not None:
        bias = inner_shift.expand(len(weight)) if bias is None else bias + inner_shift
    scale, shift = _composed(block.norms)
    return FoldedBlock(
        weight=weight,
        bias=bias,
        scale=None if scale is None else scale.expand(len(weight)),
        shift=None if shift is None else shift.expand(len(weight)),
        activation=block.activation,
    )


def _fold_depthwise(block: Block) -> FoldedBlock:
    folded = _fold_block(block)
    return replace(folded, weight=_odd(_dilated(folded.weight, block.dilation)))


def _composed(norms: Iterable[BatchNorm | Affine]) -> tuple[Tensor | None, Tensor | None]:
    """Return scale and shift of all of them, one after the other."""
    scale: Tensor | None = None
    shift: Tensor | None = None
    for norm in norms:
        s, t = (norm.scale, norm.shift) if isinstance(norm, Affine) else _scale_shift(norm)
        if s is not None:
            scale = s if scale is None else scale * s
            shift = None if shift is None else shift * s
        if t is not None:
            shift = t if shift is None else shift + t
    return scale, shift


def _scale_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    scale = (norm.var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def _dilated(weight: Tensor, dilation: int) -> Tensor:
    # As a kernel of the size that it spans, with zeros between: what every backend and export has.
    if dilation == 1:
        return weight
    channels, _, height, width = weight.shape
    spread = weight.new_zeros(channels, 1, dilation * (height - 1) + 1, dilation * (width - 1) + 1)
    spread[:, :, ::dilation, ::dilation] = weight
    return spread


def _odd(weight: Tensor) -> Tensor:
    # padding="same" gives an even kernel one more row and column after than before, as
    # an odd kernel has whose first row and column are zero.
    return F.pad(weight, (1, 0, 1, 0)) if weight.shape[-1] % 2 == 0 else weight


def _identity(block: Block) -> tuple[object, ...]:
    norms = [
        (*map(id, (norm.scale, norm.shift)),)
        if isinstance(norm, Affine)
        else (*map(id, (norm.mean, norm.var, norm.weight, norm.bias)), norm.eps)
        for norm in (*block.inner, *block.norms)
    ]
    return id(block.weight), id(block.bias), block.activation, len(block.inner), *norms


def _caster(dtype: torch.dtype) -> Callable[[Tensor | None], Any]:
    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)

    return cast
