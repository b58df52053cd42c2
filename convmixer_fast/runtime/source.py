"""What the trunk of a FusedConvMixer is made from, and whether that is still the same.

Noticed at the next call: other modules, parameters or settings, and of changes in place what
:mod:`contents` notices.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.choices import BackendName, CudaGraphs
from convmixer_fast.errors import BackendUnavailableError
from convmixer_fast.models.convmixer import GlobalPool
from convmixer_fast.runtime import backends
from convmixer_fast.runtime.blocks import BranchedBlock, DepthwiseBlock, PatchEmbed, PointwiseBlock
from convmixer_fast.runtime.contents import counts, samples
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Head, Quantization

__all__ = ["Model", "Reason", "Source"]

WEIGHT_LIMIT = 64
"""Of 8-bit weights: where there is no VNNI, two products with numbers up to 255 are added in 16
bits."""
_ENDS = ("global_pool", "head_drop", "head")


class Reason(NamedTuple):
    """Why a call runs op by op."""

    text: str
    said: bool = True
    """Whether a warning tells the user. Not where single operations are what was asked for, and
    not where the ops raise an error, which tells more."""


class Model(Protocol):
    """What is read of a :class:`fused.FusedConvMixer`, whose files this one does not know."""

    stem: nn.Module
    blocks: nn.Sequential
    global_pool: GlobalPool
    head_drop: nn.Module
    head: nn.Module
    source_head: nn.Module | None
    backend: BackendName
    cuda_graphs: CudaGraphs
    static_output: bool
    chunk: int | None
    _modules: dict[str, nn.Module | None]

    @property
    def tuned(self) -> dict[Any, Any]: ...  # noqa: D102


class Source:
    """The modules and tensors that a trunk is made from.

    Checked at every call, and so kept short: views of the modules' own dictionaries are compared
    with what they held, and tensors by address and count of changes in place.
    """

    def __init__(self, model: Model) -> None:
        self.modules = model._modules
        layers = dict(model.blocks._modules)
        self._blocks: dict[str, Any] = {"stem": model.stem}
        for index, layer in layers.items():
            inside = layer._modules if isinstance(layer, nn.Sequential) else {"": None}
            self._blocks |= {f"blocks.{index}.{name}": block for name, block in inside.items()}
        blocks = [block for block in self._blocks.values() if block is not None]
        ends = model.global_pool, model.head_drop, model.head

        self._result = "features"
        """What the trunk can do at most."""
        if model.source_head is None and model.global_pool.pool_type == "avg":
            plain = type(model.head) is nn.Linear and type(model.head_drop) is nn.Identity
            self._result = "logits" if plain else "mean"
        self._head: Any = model.head if self._result == "logits" else None

        named = {"blocks": model.blocks}
        named |= {f"blocks.{index}": layer for index, layer in layers.items()} | self._blocks
        self._watched = _Watched({name: m for name, m in named.items() if m is not None})
        self._ends_watched = _Watched(dict(zip(_ENDS, ends, strict=True)))

        holders = blocks if self._head is None else [*blocks, self._head]
        self._views = [model._modules.values(), model.blocks._modules.values()]
        self._views += [layer._modules.values() for layer in layers.values() if layer is not None]
        self._views += [holder._parameters.values() for holder in holders]
        self._held = list(chain.from_iterable(self._views))
        held = chain.from_iterable(holder._parameters.values() for holder in holders)
        self._tensors = [tensor for tensor in held if tensor is not None]
        # Their memory is held, so that an address is not used again.
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._configured = blocks
        self._pool = model.global_pool
        self._settings = self._read_settings()
        self._counts = counts(self._tensors)
        self._samples: backends.MemorySamples | None = None

    def unchanged(self) -> bool:
        """Whether a trunk made from this may be used again."""
        try:
            return (
                sum(map(len, self._views)) == len(self._held)
                and all(map(operator.is_, chain.from_iterable(self._views), self._held))
                and counts(self._tensors) == self._counts
                and self._read_settings() == self._settings
                # The last, as only memory at known addresses may be read.
                and (self._samples is None or self._samples.unchanged())
            )
        except RuntimeError:  # one has become an inference tensor
            return False

    def misfit(self, backend: BackendName, dtype: torch.dtype) -> Reason | None:
        """Say why no trunk of ``backend`` can be made for ``dtype``; None where one can.

        This stays so while the source is unchanged.
        """
        for name, block in self._blocks.items():
            if isinstance(block, BranchedBlock) or name.endswith(".entry"):
                index = name.split(".")[1]
                return Reason(f"layer {index} has modules of the source's own, which PyTorch runs")
        pairs = [DepthwiseBlock, PointwiseBlock] * ((len(self._blocks) - 1) // 2)
        kinds: list[type] = [PatchEmbed, *pairs]
        for (name, block), kind in zip(self._blocks.items(), kinds, strict=False):
            if type(block) is not kind:
                return Reason(f"{name.rstrip('.')} is no {kind.__name__} any more")
        if len(self._blocks) != len(kinds):
            return Reason("a layer has not two blocks any more")
        device = self._blocks["stem"].weight.device
        for name, block in self._blocks.items():
            other = _resolved(block.backend, device, dtype)
            if other != backend:
                return Reason(
                    f"{name} has the backend {block.backend!r}, and the whole runs on {backend!r}"
                )
        if not backends.row(backend).int8 and any(
            block.quantization is not None for block in self._blocks.values()
        ):
            return Reason(f"8-bit numbers run in one call on a CPU, not on the backend {backend!r}")
        strange = [t for t in self._tensors if type(t) not in (Tensor, nn.Parameter)]
        if strange:
            return Reason(f"a weight is a {type(strange[0]).__name__}, a subclass of Tensor")
        if not self._fits_together():
            # Under autocast the ops take weights of several dtypes.
            return Reason(
                "the weights' shapes, dtypes, devices or activations do not fit together",
                said=torch.is_autocast_enabled(device.type),
            )
        if device.type != "cpu" and any(tensor.is_inference() for tensor in self._tensors):
            return Reason(
                "weights are inference tensors, and nothing would tell that they have changed; "
                "call refresh() once, which replaces them by others"
            )
        return None

    def why_not(self, x: Tensor) -> Reason | None:
        """Say why the trunk cannot stand for the modules now, for ``x``; None where it can."""
        watcher = self._watched.by()
        if watcher is not None:
            return Reason(f"{watcher}, which one call would pass by")
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors):
            return Reason("weights require a gradient, which the ops refuse", said=False)
        if not self._takes(x):
            return Reason(
                f"the ops refuse {x.dtype} {tuple(x.shape)} on {x.device}, and say why", said=False
            )
        return None

    def result(self) -> str:
        """Return the last thing that the trunk may do: ``"features"``, ``"mean"``, ``"logits"``."""
        return self._result if self._ends_watched.by() is None else "features"

    def make_trunk(self, make: Callable[..., Any], dtype: torch.dtype, **options: Any) -> Any:
        """Call what makes a backend's trunk, with the tensors, their weights in ``dtype``."""
        # Before they are read: what is written meanwhile is then noticed.
        self._samples = samples(self._tensors)
        stem = _cast(self._blocks["stem"].folded(), dtype)
        return make(stem, tuple(self._layers(dtype)), self._folded_head(dtype), **options)

    def release(self) -> None:
        """Let go of the weights of stem and layers."""
        for block in self._configured:
            block.release()

    def _layers(self, dtype: torch.dtype) -> Iterator[FoldedLayer]:
        """Yield the layers; one that stands at several positions is one object at each."""
        made: dict[tuple[int, int], FoldedLayer] = {}
        blocks = list(self._blocks.values())
        for depthwise, pointwise in zip(blocks[1::2], blocks[2::2], strict=True):
            key = id(depthwise), id(pointwise)
            if key not in made:
                made[key] = FoldedLayer(
                    _cast(depthwise.folded(), dtype), _cast(pointwise.folded(), dtype)
                )
            yield made[key]

    def _folded_head(self, dtype: torch.dtype) -> Head | None:
        """Return the head, where the trunk can do it."""
        if self._head is None:
            return None
        bias = self._head.bias
        return Head("avg", self._head.weight.to(dtype), None if bias is None else bias.to(dtype))

    def _read_settings(self) -> list[object]:
        own = [getattr(block, "activation", None) for block in self._configured]
        own += [getattr(block, "backend", None) for block in self._configured]
        return [*own, self._pool.pool_type]

    def _takes(self, x: Tensor) -> bool:
        """Whether the ops would take ``x``."""
        weight, dtype = self._blocks["stem"].weight, self._blocks["stem"].dtype
        if x.dim() != 4 or x.device != weight.device:
            return False
        if torch.is_autocast_enabled(x.device.type):
            # Float64, and what is no floating-point number, is not cast.
            if not x.is_floating_point() or torch.float64 in (x.dtype, dtype):
                return False
        elif x.dtype != dtype:
            return False
        _, channels, height, width = x.shape
        _, wanted, patch_h, patch_w = weight.shape
        strided = x.layout == torch.strided
        return channels == wanted and height >= patch_h and width >= patch_w and strided

    def _fits_together(self) -> bool:
        """Whether the ops, and the head, would take the tensors: the kernels trust them."""
        stem, dtype = self._blocks["stem"].weight, self._blocks["stem"].dtype
        if any(t.device != stem.device or t.numel() == 0 for t in self._tensors):
            return False
        channels = stem.shape[0]
        for index, block in enumerate(self._blocks.values()):
            shape = tuple(block.weight.shape)
            depthwise = index % 2 == 1
            size = shape[-1]
            wanted = (channels, 1, size, size) if depthwise else (shape[0], channels, 1, 1)
            if block.dtype != dtype or (index > 0 and shape != wanted):
                return False
            if not _fits_itself(block.weight, block.quantization):
                return False
            if (depthwise and size % 2 == 0) or block.activation not in ACTIVATIONS:
                return False
            channels = shape[0]
            for vector in (block.bias, block.scale, block.shift):
                if vector is None:
                    continue
                if vector.shape != (channels,) or vector.dtype not in (dtype, torch.float32):
                    return False
        if self._head is None:
            return True
        weight, bias = self._head.weight, self._head.bias
        fits = weight.dim() == 2 and weight.shape[1] == channels and weight.dtype == dtype
        return fits and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == dtype))


class _Watched:
    """Modules that one call stands for, and who must be called for each of them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        seen = self._modules.values()
        self._hooks: list[Sequence[object] | Mapping[int, object]]
        self._hooks = [_global_forward_hooks, _global_forward_pre_hooks]
        self._hooks += [module._forward_hooks for module in seen]
        self._hooks += [module._forward_pre_hooks for module in seen]
        self._attributes = [module.__dict__ for module in seen]

    def by(self) -> str | None:
        """Say who looks at which module; None where nobody does."""
        if not (
            any(self._hooks) or any(map(operator.contains, self._attributes, repeat("forward")))
        ):
            return None
        for name, module in self._modules.items():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name} has a forward hook"
            if "forward" in module.__dict__:
                return f"{name} has a forward of its own"
        return "there is a forward hook for all modules"


def _resolved(backend: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        return backends.resolve(backend, device, dtype)
    except (BackendUnavailableError, ValueError):  # for the ops to say
        return None


def _fits_itself(weight: Tensor, quantization: Quantization | None) -> bool:
    """Whether 8-bit weights are what their kernels take: see csrc/cpu/kernels.h."""
    if quantization is None:
        return weight.dtype != torch.int8
    scales = quantization.weight_scale, quantization.input_scale
    return (
        weight.dtype == torch.int8
        and quantization.zero_point.dtype == torch.uint8
        and quantization.weight_scale.shape == weight.shape[:1]
        and all(scale.dtype == torch.float32 and bool((scale > 0).all()) for scale in scales)
        and bool((weight.int().abs() <= WEIGHT_LIMIT).all())
    )


def _cast(block: FoldedBlock, dtype: torch.dtype) -> FoldedBlock:
    # As autocast does to a convolution's weight; the vectors are made for float32.
    if block.quantization is not None:
        return block
    return replace(block, weight=block.weight.to(dtype))
