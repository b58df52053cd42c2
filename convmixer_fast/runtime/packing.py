"""Weights as the CPU kernels read them, and what single ops keep of them between calls."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast import _C
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.runtime.backends import MemorySamples
from convmixer_fast.runtime.contents import counts, samples
from convmixer_fast.spec import FoldedBlock, Quantization

__all__ = ["Packed", "kept", "to_float32"]

_ACTIVATIONS = {name: row.cpu for name, row in ACTIVATIONS.items()} | {"none": 0}


class Packed:
    """A block's tensors as the kernels read them: in blocks of channels, zero-padded.

    Args:
        weight: packed.
        block: whose vectors are packed here, as float32.
    """

    numbers: tuple[int, int, float, int] | None = None
    """What a product computes with; see ``_C.pyi``. None: float32."""

    def __init__(self, weight: Tensor, block: FoldedBlock) -> None:
        channels = block.weight.shape[0]
        self._padding = -channels % _C.PANEL
        vectors = [
            torch.full((channels,), fill, dtype=torch.float32, device="cpu")
            if vector is None
            else to_float32(vector)
            for vector, fill in ((block.bias, 0.0), (block.scale, 1.0), (block.shift, 0.0))
        ]
        if block.quantization is not None:
            vectors[0] = self._quantize(block.weight, vectors[0], block.quantization)
        # Kept, as the kernels are given addresses.
        self.tensors = [weight, *(F.pad(vector, (0, self._padding)) for vector in vectors)]
        weight_at, bias_at, scale_at, shift_at = (t.data_ptr() for t in self.tensors)
        self.addresses = weight_at, bias_at, scale_at, shift_at, _ACTIVATIONS[block.activation]

    def _quantize(self, weight: Tensor, bias: Tensor, quantization: Quantization) -> Tensor:
        """Keep what the kernels need, and return the bias that makes up for the zero point."""
        scale, zero = float(quantization.input_scale), int(quantization.zero_point)
        sum_scale = quantization.weight_scale.double() * scale
        self._sum_scale = F.pad(to_float32(sum_scale), (0, self._padding))
        self.numbers = 4, self._sum_scale.data_ptr(), 1 / scale, zero
        return to_float32(bias - zero * weight.flatten(1).sum(1) * sum_scale)

    @classmethod
    def depthwise(cls, block: FoldedBlock) -> "Packed":
        """Pack (C, 1, K, K) as (C / BLOCK, K * K, BLOCK)."""
        return cls(_pack(block.weight, _C.BLOCK), block)

    @classmethod
    def product(cls, block: FoldedBlock, *, bfloat16: bool = False) -> "Packed":
        """Pack (C_out, C_in, P_h, P_w) as (C_out / PANEL, words of the depth, PANEL).

        A word is a number of float32, or two of bfloat16 or four of 8 bits: one channel in each of
        so many blocks.
        """
        if block.quantization is not None:
            return cls(_words(block.weight, 4), block)
        if not bfloat16:
            return cls(_pack(block.weight, _C.PANEL), block)
        packed = cls(_words(block.weight.to(torch.bfloat16), 2), block)
        packed.numbers = 2, 0, 1.0, 0
        return packed


class _Kept(NamedTuple):
    """What was packed of an op's tensors, none of which it keeps alive."""

    tensors: tuple[weakref.ref[Tensor] | None, ...]
    rest: tuple[object, ...]
    counts: list[int]
    samples: MemorySamples | None
    packed: Packed

    def is_of(self, tensors: tuple[Tensor | None, ...], rest: tuple[object, ...]) -> bool:
        """Whether it is of these tensors, as they are now."""
        refs = zip(self.tensors, tensors, strict=True)
        return (
            self.rest == rest
            and all((None if held is None else held()) is tensor for held, tensor in refs)
            and counts(_present(tensors)) == self.counts
            # The last, as only memory at known addresses may be read.
            and (self.samples is None or self.samples.unchanged())
        )


_kept: dict[int, _Kept] = {}
"""By the identity of the weight, with which an entry goes."""


def kept(
    pack: Callable[[FoldedBlock], Packed],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Packed:
    """Return what ``pack`` makes of a block: what it made before, if these tensors hold the same.

    Of changes in place :mod:`contents` says what is noticed.
    """
    tensors, rest = (weight, bias, scale, shift), (pack, activation)
    found = _kept.get(id(weight))
    if found is not None and found.is_of(tensors, rest):
        return found.packed
    # Before they are read: what is written meanwhile is then noticed.
    before = counts(_present(tensors)), samples(_present(tensors))
    packed = pack(FoldedBlock(*tensors, activation))
    key = id(weight)

    def forget(gone: object) -> None:
        _kept.pop(key, None)

    refs = (
        weakref.ref(weight, forget),
        *(None if tensor is None else weakref.ref(tensor) for tensor in tensors[1:]),
    )
    _kept[key] = _Kept(refs, rest, *before, packed)
    return packed


def _present(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _words(weight: Tensor, per_word: int) -> Tensor:
    """Return a weight (C_out, ...) as (C_out / PANEL, words, PANEL, per_word), padded by zeros."""
    rows, group = weight.detach().flatten(1), _C.BLOCK * per_word
    rows = F.pad(rows, (0, -rows.shape[1] % group, 0, -rows.shape[0] % _C.PANEL))
    blocks = rows.view(-1, _C.PANEL, rows.shape[1] // group, per_word, _C.BLOCK)
    return blocks.permute(0, 2, 4, 1, 3).contiguous()


def _pack(weight: Tensor, lanes: int) -> Tensor:
    """Return a weight (C_out, ...) as (C_out / lanes, ..., lanes).

    Not by PyTorch: its worker threads would still be spinning when the kernels begin.
    """
    source = to_float32(weight)
    rows, depth = source.shape[0], source[0].numel()
    # On the CPU whatever the default device is: the kernels are given its address.
    packed = torch.empty(-(-rows // lanes), depth, lanes, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    _C.pack(source.data_ptr(), rows, depth, lanes, packed.data_ptr(), threads)
    return packed


def to_float32(tensor: Tensor) -> Tensor:
    """Return a contiguous float32 tensor, the same one where it is."""
    return tensor.detach().to(torch.float32).contiguous()
