"""Stem, layers and head of a folded ConvMixer, kernel after kernel, without the ops between."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.kernels.depthwise_block import depthwise_launch
from convmixer_fast.kernels.launch import BoundLaunch, Epilogue, device_guard
from convmixer_fast.kernels.patch_embed import patches_as_channels
from convmixer_fast.kernels.pointwise_block import aligned_rows, as_matrix, pointwise_launch
from convmixer_fast.kernels.tuned import Problem, Tuned, TunedFor, choices_for
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Head

__all__ = ["TritonTrunk", "even_parts"]

_log = logging.getLogger("convmixer_fast")
_PLANS = 16
_UNTUNED = Tuned(None, {})


class TritonTrunk:
    """What the engine of a FusedConvMixer calls on a GPU.

    Besides weights and its result, a call holds two activations of one chunk of images: each
    kernel reads one and writes the other. They come from PyTorch's allocator and go back to it.
    Launches are bound in advance, for the 16 shapes that were used last.

    Args:
        stem: the patch embedding.
        layers: the layers.
        head: the linear layer on the mean over the positions; without it there are no logits.
        chunk: images computed at a time; None for what was tuned, or else all.
        tuned: what is known to be fast: :meth:`Tuned.to_json`, by what it is for.

    Tensors are taken as they are, not copied, but for matrices whose rows are not aligned, as
    the stem's. Widths must fit together: nothing is checked here.
    """

    def __init__(
        self,
        stem: FoldedBlock,
        layers: Sequence[FoldedLayer],
        head: Head | None = None,
        *,
        chunk: int | None = None,
        tuned: Mapping[TunedFor, Mapping[str, Any]] | None = None,
    ) -> None:
        # Copied here, if at all: a plan is made on whatever stream its first call is on.
        self._stem = _contiguous(stem)
        made: dict[int, FoldedLayer] = {}
        for layer in layers:
            if id(layer) not in made:
                made[id(layer)] = FoldedLayer(
                    _contiguous(layer.depthwise), _contiguous(layer.pointwise)
                )
        self._layers = tuple(made[id(layer)] for layer in layers)
        blocks = [self._stem, *(layer.pointwise for layer in self._layers)]
        # Views, where rows are aligned already. By the block, which may stand at several places.
        self._rows = {id(b): aligned_rows(b.weight.detach().flatten(1)) for b in blocks}
        self._widths = [block.weight.shape[0] for block in blocks]
        """Channels of the patch embedding and of each layer."""
        self._head = head
        self._chunk = chunk
        self._tuned = choices_for(tuned or {}, stem.weight.device, stem.weight.dtype)
        self._plans: OrderedDict[object, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, x: Tensor, result: str) -> Tensor:
        """Map images (N, C, H, W) to ``result``, in the dtype of ``x``.

        Returns:
            ``"features"``: the last layer's output (N, channels, H / P_h, W / P_w); ``"mean"``:
            its mean over the positions (N, channels); ``"logits"``: what the head makes of that
            (N, classes).
        """
        tuned = self._tuned.get(tuple(x.shape), _UNTUNED)
        parts = even_parts(x.shape[0], self._chunk or tuned.chunk)
        with device_guard(x):
            out = self._part(x[: parts[0]], result, tuned)
            if len(parts) > 1:
                first, out = out, out.new_empty(x.shape[0], *out.shape[1:])
                out[: parts[0]] = first
                del first
                done = parts[0]
                for images in parts[1:]:
                    part = slice(done, done + images)
                    out[part] = self._part(x[part], result, tuned)
                    done += images
        if result != "logits":
            return out
        assert self._head is not None
        assert self._head.weight is not None  # else there are no logits to ask for
        return F.linear(out, self._head.weight, self._head.bias)

    @torch.no_grad()
    def intermediates(self, x: Tensor, steps: Sequence[int]) -> list[Tensor]:
        """Map images (N, C, H, W) to the outputs of chosen steps, all images at once.

        Args:
            x: the images.
            steps: 0 for the stem, n for layer n counted from 1; rising. Later ones are not run.

        Returns:
            Each (N, channels, H / P_h, W / P_w), in the dtype of ``x``.
        """
        with device_guard(x):
            return self._outputs(x, self._tuned.get(tuple(x.shape), _UNTUNED), steps)

    def problems(self, x: Tensor) -> Iterator[Problem]:
        """Yield what there is to tune for images like ``x``, as :class:`Tuned` names it."""
        weight = self._stem.weight
        plane = x.shape[2] // weight.shape[2], x.shape[3] // weight.shape[3]
        problems = [_pointwise_problem(self._stem, plane)]
        for layer in self._layers:
            problems.append(_depthwise_problem(layer.depthwise, plane))
            problems.append(_pointwise_problem(layer.pointwise, plane))
        yield from dict.fromkeys(problems)

    def _part(self, x: Tensor, result: str, tuned: Tuned) -> Tensor:
        """Compute features or, for any other result, their mean."""
        (features,) = self._outputs(x, tuned, (len(self._layers),))
        return features if result == "features" else features.mean((2, 3))

    def _outputs(self, x: Tensor, tuned: Tuned, steps: Sequence[int]) -> list[Tensor]:
        """Compute the outputs of rising steps: 0 is the stem, then come the layers."""
        patch = self._stem.weight.shape[2:]
        patches = patches_as_channels(x, *patch)
        images, _, height, width = patches.shape
        if images == 0:
            return [x.new_empty(0, self._widths[step], height, width) for step in steps]
        columns = as_matrix(patches)
        del patches
        plan, is_new = self._plan(columns, (height, width), tuned)
        start = time.perf_counter()
        if is_new:
            _log.info(
                "compiling Triton kernels for %s of shape %s, where they are not in its cache",
                *(x.dtype, tuple(x.shape)),
            )
        a = x.new_empty(plan.elements)
        stem = plan.stem.description
        plan.stem(columns if stem is None else stem.of(columns), a)
        del columns  # before there is memory for b
        b = x.new_empty(plan.elements)
        described: dict[object, Any] = {None: b}
        outs: list[Tensor] = []

        def keep(step: int) -> None:
            if step in steps:
                out = _as_planes(a, (images, self._widths[step], height, width))
                # What comes last stays; what comes after others is written over them.
                outs.append(out if step == steps[-1] else out.clone())

        keep(0)
        for step, (depthwise, pointwise) in enumerate(plan.layers[: steps[-1]], 1):
            depthwise(a, b)
            how = pointwise.description
            if how is not None and how not in described:
                described[how] = how.of(b)
            pointwise(described[how], a)
            keep(step)
        if is_new:
            _log.info("the kernels were ready after %.1f s", time.perf_counter() - start)
        return outs

    def _plan(self, columns: Tensor, plane: tuple[int, int], tuned: Tuned) -> "tuple[_Plan, bool]":
        """Return the launches for a matrix of patches, and whether they are new."""
        # The table looks at addresses; memory of PyTorch's allocator begins at 512 bytes.
        key = (columns.shape, columns.stride(), columns.data_ptr() % 16, plane, id(tuned))
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
                return plan, False
        plan = self._make_plan(columns, plane, tuned)
        with self._lock:
            self._plans[key] = plan
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return plan, True

    def _make_plan(self, columns: Tensor, plane: tuple[int, int], tuned: Tuned) -> "_Plan":
        images = columns.shape[0]
        elements = images * max(self._widths) * plane[0] * plane[1]
        memory = columns.new_empty(elements)  # stands for either activation

        def pointwise(x: Tensor, block: FoldedBlock) -> BoundLaunch:
            tile: Any = tuned.tiles.get(_pointwise_problem(block, plane))
            rows = self._rows[id(block)]
            return BoundLaunch(pointwise_launch(x, rows, _epilogue(block), memory, tile))

        def depthwise(x: Tensor, block: FoldedBlock) -> BoundLaunch:
            tile: Any = tuned.tiles.get(_depthwise_problem(block, plane))
            launch = depthwise_launch(x, block.weight, _epilogue(block), memory, True, tile)
            return BoundLaunch(launch)

        layers = []
        for layer, channels in zip(self._layers, self._widths, strict=False):
            x = _as_planes(memory, (images, channels, *plane))
            layers.append((depthwise(x, layer.depthwise), pointwise(x.flatten(2), layer.pointwise)))
        return _Plan(elements, pointwise(columns, self._stem), tuple(layers))


class _Plan(NamedTuple):
    """The launches for one shape."""

    elements: int
    """Of the larger activation."""
    stem: BoundLaunch
    layers: tuple[tuple[BoundLaunch, BoundLaunch], ...]


def even_parts(images: int, chunk: int | None) -> list[int]:
    """Cut so many images into as few parts as chunks allow, as even as can be.

    An almost empty last part would take almost as long as a full one.
    """
    if not chunk or images <= chunk:
        return [images]
    count = -(-images // chunk)
    return [images * (part + 1) // count - images * part // count for part in range(count)]


def _contiguous(block: FoldedBlock) -> FoldedBlock:
    bias, scale, shift = _epilogue(block).vectors()
    return replace(block, weight=block.weight.contiguous(), bias=bias, scale=scale, shift=shift)


def _as_planes(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory[: torch.Size(shape).numel()].view(shape)


def _epilogue(block: FoldedBlock) -> Epilogue:
    return Epilogue(block.bias, block.scale, block.shift, block.activation)


def _depthwise_problem(block: FoldedBlock, plane: tuple[int, int]) -> Problem:
    channels, _, size, _ = block.weight.shape
    return Problem(
        "depthwise_block", channels, channels, *plane, size, block.activation, _dtype(block)
    )


def _pointwise_problem(block: FoldedBlock, plane: tuple[int, int]) -> Problem:
    channels_out, channels_in = block.weight.flatten(1).shape
    return Problem(
        "pointwise_block", channels_in, channels_out, *plane, 1, block.activation, _dtype(block)
    )


def _dtype(block: FoldedBlock) -> str:
    return str(block.weight.dtype).removeprefix("torch.")
