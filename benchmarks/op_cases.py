"""The fused ops as cases: one op of a one-layer ConvMixer, in PyTorch and in this package."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from convmixer_fast.benchmarks.subjects import Case, Subject
from convmixer_fast.benchmarks.work import Work, block_step
from convmixer_fast.choices import BackendName
from convmixer_fast.folding import fold
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.runtime.blocks import DepthwiseBlock, PatchEmbed, PointwiseBlock
from convmixer_fast.spec import FoldedBlock, FoldedConvMixer

__all__ = ["OPS", "depthwise_case", "patch_embed_case", "pointwise_case"]

Shape = tuple[int, int, int, int]

# By op: the part of the one-layer model that is the op, its folded form, and the module for that.
_PARTS: dict[
    str,
    tuple[
        Callable[[ConvMixer], nn.Module],
        Callable[[FoldedConvMixer], FoldedBlock],
        Callable[[FoldedBlock, BackendName], nn.Module],
    ],
] = {
    "depthwise_block": (
        lambda model: model.blocks[0].get_submodule("0"),
        lambda folded: folded.layers[0].depthwise,
        DepthwiseBlock,
    ),
    "pointwise_block": (
        lambda model: nn.Sequential(*list(model.blocks[0].children())[1:]),
        lambda folded: folded.layers[0].pointwise,
        PointwiseBlock,
    ),
    "patch_embed": (lambda model: model.stem, lambda folded: folded.stem, PatchEmbed),
}
OPS = tuple(_PARTS)


def depthwise_case(
    dim: int,
    side: int,
    kernel_size: int,
    batch: int,
    dtype: torch.dtype,
    activation: str = "gelu",
    only: Sequence[str] | None = None,
) -> Case:
    """Return a case of depthwise convolution, activation, BatchNorm and residual.

    Args:
        dim: channels.
        side: positions in a row and in a column.
        kernel_size: side of the kernel.
        batch: images.
        dtype: of weights and input.
        activation: a name of :data:`activations.ACTIVATIONS`.
        only: see :class:`Case`.
    """
    architecture = Architecture(dim, 1, kernel_size, 1, activation)
    return _case(
        "depthwise_block", architecture, (batch, dim, side, side), dtype,
        {"dim": dim, "side": side, "kernel_size": kernel_size}, only,
    )  # fmt: skip


def pointwise_case(
    dim: int,
    side: int,
    batch: int,
    dtype: torch.dtype,
    activation: str = "gelu",
    only: Sequence[str] | None = None,
) -> Case:
    """Return a case of pointwise convolution, activation and BatchNorm; see the one above."""
    architecture = Architecture(dim, 1, 1, 1, activation)
    return _case(
        "pointwise_block", architecture, (batch, dim, side, side), dtype,
        {"dim": dim, "side": side}, only,
    )  # fmt: skip


def patch_embed_case(
    dim: int,
    image_size: int,
    patch_size: int,
    batch: int,
    dtype: torch.dtype,
    activation: str = "gelu",
    only: Sequence[str] | None = None,
) -> Case:
    """Return a case of patch convolution, activation and BatchNorm, of three-channel images."""
    architecture = Architecture(dim, 1, 1, patch_size, activation)
    return _case(
        "patch_embed", architecture, (batch, 3, image_size, image_size), dtype,
        {"dim": dim, "image_size": image_size, "patch_size": patch_size}, only,
    )  # fmt: skip


_SECONDS_SHARE = 0.35  # what a model of dozens of such ops has is more than one of them needs
_SHORT = {"kernel_size": "k", "patch_size": "p"}


def _case(
    op: str,
    architecture: Architecture,
    shape: Shape,
    dtype: torch.dtype,
    labels: dict[str, str | int],
    only: Sequence[str] | None,
) -> Case:
    sizes = " ".join(f"{_SHORT[name]}{labels[name]}" for name in _SHORT if name in labels)
    side = labels.get("side", labels.get("image_size"))
    name = f"{labels['dim']} x {side}x{side} {sizes}".strip()
    return Case(
        bench=op,
        name=f"{name} {architecture.activation}, batch {shape[0]}",
        labels={**labels, "activation": architecture.activation, "batch": shape[0]},
        dtype=dtype,
        make=lambda device: _subject(op, architecture, shape, dtype, device),
        only=None if only is None else tuple(only),
        seconds_share=_SECONDS_SHARE,
    )


def _subject(
    op: str, architecture: Architecture, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Subject:
    whole = randomize(architecture.build())
    assert isinstance(whole, ConvMixer)
    whole.to(device, dtype)
    part, folded_part, module = _PARTS[op]
    # Of the weights as rounded to the dtype, so that both forms have the same ones.
    with torch.inference_mode(False), torch.no_grad():
        folded = folded_part(fold(recognize(whole)))
    weight = tuple(folded.weight.shape)
    stride = weight[2:] if op == "patch_embed" else (1, 1)
    step, _ = block_step(weight, shape, dtype.itemsize, stride=stride)
    return Subject(
        part(whole), shape, Work((step,), shape[0]), lambda backend: module(folded, backend).eval()
    )
