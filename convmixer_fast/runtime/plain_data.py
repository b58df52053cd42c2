"""A folded ConvMixer as named tensors and JSON, and back: files that hold no code.

Names are those of an export: ``stem.weight``, ``layers.0.pointwise.quantization.weight_scale`` ...
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.errors import ExportedFileError, UnsupportedModelError
from convmixer_fast.models.convmixer import POOLS
from convmixer_fast.spec import (
    DTYPES,
    FoldedBlock,
    FoldedConvMixer,
    FoldedLayer,
    Head,
    Quantization,
)

__all__ = ["from_plain_data", "to_plain_data"]

_FORMAT = 1
_VECTORS = ("bias", "scale", "shift")
_NUMBERS = tuple(field.name for field in fields(Quantization))
_MOST_LAYERS = 10_000


def to_plain_data(folded: FoldedConvMixer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a model computes as tensors and what JSON holds.

    Raises:
        UnsupportedModelError: modules of the source's own are a part of it.
    """
    own = {
        "a head of its own": not isinstance(folded.head, Head),
        "modules before the stem": (folded.prefix or folded.preprocess) is not None,
        "modules in a layer": not all(layer.is_plain for layer in folded.layers),
        "conditions on the size of images": bool(folded.conditions),
    }
    found = [name for name, there in own.items() if there]
    if found or not isinstance(folded.head, Head):
        raise UnsupportedModelError(
            f"expected a ConvMixer that tensors and JSON can say, found {', '.join(found)}; "
            "save the module by torch.save, or export it"
        )
    tensors = _tensors("stem", folded.stem)
    # Layers that the source shares between positions are written once.
    places: dict[int, int] = {}
    layers = []
    for layer in folded.layers:
        if id(layer) not in places:
            places[id(layer)] = len(places)
            name = f"layers.{places[id(layer)]}"
            tensors |= _tensors(f"{name}.depthwise", layer.depthwise)
            tensors |= _tensors(f"{name}.pointwise", layer.pointwise)
        layers.append(
            {
                "at": places[id(layer)],
                "depthwise": layer.depthwise.activation,
                "pointwise": layer.pointwise.activation,
            }
        )
    for name in ("weight", "bias"):
        tensor = getattr(folded.head, name)
        if tensor is not None:
            tensors[f"head.{name}"] = tensor
    config = {
        "format": _FORMAT,
        "stem": folded.stem.activation,
        "layers": layers,
        "global_pool": folded.head.global_pool,
        "input_name": folded.input_name,
        "input_layout": folded.input_layout,
    }
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, config


def from_plain_data(tensors: Mapping[str, Tensor], config: Any) -> FoldedConvMixer:
    """Return what :func:`to_plain_data` was given; every shape and dtype is looked at.

    Raises:
        ExportedFileError: it is something else.
    """
    reader = _Reader(tensors)
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ExportedFileError(f"expected a folded ConvMixer of format {_FORMAT}, found {found!r}")
    entries = config.get("layers")
    if not isinstance(entries, list) or len(entries) > _MOST_LAYERS:
        raise ExportedFileError("expected a list of layers")
    stem = reader.block("stem", config.get("stem"))
    made: dict[int, FoldedLayer] = {}
    layers = []
    channels = stem.weight.shape[0]
    for entry in entries:
        at = entry.get("at") if isinstance(entry, dict) else None
        if not isinstance(at, int) or not 0 <= at <= len(made):
            raise ExportedFileError(f"expected a layer with its place, found {entry!r}")
        if at not in made:
            name = f"layers.{at}"
            made[at] = FoldedLayer(
                reader.block(f"{name}.depthwise", entry.get("depthwise"), channels, depthwise=True),
                reader.block(f"{name}.pointwise", entry.get("pointwise"), channels),
            )
        layer = made[at]
        reader.check(
            f"layers.{at}", layer.depthwise.weight.shape[0] == channels, f"{channels} channels"
        )
        layers.append(layer)
        channels = layer.pointwise.weight.shape[0]
    pool, input_name, layout = (
        config.get(n) for n in ("global_pool", "input_name", "input_layout")
    )
    if pool not in POOLS or layout not in ("NCHW", "NHWC") or not isinstance(input_name, str):
        raise ExportedFileError(
            f"found the pooling {pool!r} of images {layout!r}, called {input_name!r}"
        )
    head = reader.head(pool, channels)
    reader.check_all_taken()
    return FoldedConvMixer(
        stem, tuple(layers), head, None, None, (), input_name=input_name, input_layout=layout
    )


def _tensors(name: str, block: FoldedBlock) -> dict[str, Tensor]:
    found = {f"{name}.{part}": getattr(block, part) for part in ("weight", *_VECTORS)}
    for part in _NUMBERS if block.quantization is not None else ():
        found[f"{name}.quantization.{part}"] = getattr(block.quantization, part)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class _Reader:
    """Takes tensors by name, and looks at each."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)
        self._dtype: torch.dtype | None = None

    def check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ExportedFileError(f"{name}: expected {expected}")

    def check_all_taken(self) -> None:
        if self._left:
            raise ExportedFileError(f"found tensors that no part has: {sorted(self._left)[:5]}")

    def block(
        self, name: str, activation: object, channels: int | None = None, *, depthwise: bool = False
    ) -> FoldedBlock:
        """Return a block whose input has so many channels; None for the stem."""
        if activation not in ACTIVATIONS:
            raise ExportedFileError(f"{name}: found the activation {activation!r}")
        weight = self._left.pop(f"{name}.weight", None)
        if weight is None or weight.dim() != 4 or weight.numel() == 0:
            raise ExportedFileError(f"{name}: expected a weight of four dimensions")
        outputs, inputs, height, width = weight.shape
        if depthwise:
            right = (outputs, inputs) == (channels, 1) and height == width and height % 2 == 1
            self.check(name, right, f"a weight ({channels}, 1, K, K) with odd K")
        elif channels is not None:
            right = (inputs, height, width) == (channels, 1, 1)
            self.check(name, right, f"a weight (C, {channels}, 1, 1)")
        quantization = None if depthwise else self._quantization(name, outputs)
        if quantization is None:
            self._same_dtype(name, weight)
        else:
            self.check(name, weight.dtype == torch.int8, "an int8 weight")
        bias, scale, shift = (self._vector(f"{name}.{part}", outputs) for part in _VECTORS)
        return FoldedBlock(weight, bias, scale, shift, str(activation), quantization)

    def head(self, pool: str, channels: int) -> Head:
        weight = self._left.pop("head.weight", None)
        if weight is None:
            return Head(pool)
        features = 2 * channels if pool == "catavgmax" else channels
        right = weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == features and pool
        self.check("head", bool(right), f"a pooling and a weight (classes, {features})")
        self._same_dtype("head", weight)
        return Head(pool, weight, self._vector("head.bias", weight.shape[0]))

    def _vector(self, name: str, size: int) -> Tensor | None:
        vector = self._left.pop(name, None)
        if vector is not None:
            self.check(name, vector.shape == (size,), f"{size} numbers")
            if vector.dtype != torch.float32:  # which vectors may be beside weights of 16 bits
                self._same_dtype(name, vector)
        return vector

    def _quantization(self, name: str, outputs: int) -> Quantization | None:
        found = {part: self._left.pop(f"{name}.quantization.{part}", None) for part in _NUMBERS}
        there = {part: tensor for part, tensor in found.items() if tensor is not None}
        if not there:
            return None
        self.check(name, len(there) == len(_NUMBERS), f"all of {', '.join(_NUMBERS)}, or none")
        for part, tensor in there.items():
            kind = torch.uint8 if part.endswith("zero_point") else torch.float32
            shape = (outputs,) if part == "weight_scale" else ()
            right = tensor.shape == shape and tensor.dtype == kind
            self.check(f"{name}.{part}", right, f"{kind} of shape {shape}")
        return Quantization(**there)

    def _same_dtype(self, name: str, tensor: Tensor) -> None:
        self._dtype = self._dtype or tensor.dtype
        right = tensor.dtype == self._dtype and tensor.dtype in (*DTYPES, torch.float64)
        self.check(name, right, "floating-point numbers of one dtype")
