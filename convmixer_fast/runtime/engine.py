"""The engine of a FusedConvMixer: its trunk in one call, where a backend has such a call.

What a backend makes of the weights (packed for the CPU, CUDA graphs on a GPU) is derived from
the module's parameters and kept beside them. It is made again whenever they are not the same any
more: other tensors, or changed in place, as ``load_state_dict`` does. What PyTorch does not
count, such as ``weight.data.mul_(2)`` or writing through a NumPy view, is not noticed. It is no
part of ``state_dict``, copies and pickles.

Where one call would not do what the ops one by one do, :meth:`Engine.trunk` returns None: while
something looks at single operations (compiling, exporting, dispatch and function modes, autocast on
a CPU, function transforms, hooks on layers), and for inputs and weights that the ops refuse, with
their own errors.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from convmixer_fast.errors import BackendUnavailableError
from convmixer_fast.models.convmixer import GlobalPool
from convmixer_fast.runtime import backends
from convmixer_fast.runtime.blocks import DepthwiseBlock, PatchEmbed, PointwiseBlock
from convmixer_fast.runtime.cuda_graphs import CudaGraphs
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Head

__all__ = ["Engine"]

Trunk = Callable[..., Tensor]

_DEVICES = ("cpu", "cuda")
_KEPT = 3
"""Trunks of one module: with autocast to either dtype, and without."""
_AUTOCAST_DEVICES = ("cuda",)
"""Where a trunk follows autocast. On a CPU the ops do, one by one: that is not worth a second copy
of packed weights."""


class Model(Protocol):
    """What is read of a :class:`fused.FusedConvMixer`, whose files this one does not know."""

    stem: nn.Module
    blocks: nn.Sequential
    global_pool: GlobalPool
    head_drop: nn.Module
    head: nn.Module
    source_head: nn.Module | None
    backend: str
    cuda_graphs: str | bool
    static_output: bool
    chunk: int | None
    _modules: dict[str, nn.Module | None]
    _tuned: dict[Any, Any]


class Engine:
    """Makes, keeps and renews the trunk of one module.

    A copy begins without one: what is kept belongs to the tensors that it was made from.
    """

    def __init__(self) -> None:
        # By what a call asks for, such as autocast's dtype. Replaced and not changed, so that
        # several Python threads see all of it or nothing.
        self._made: dict[object, tuple[_Source, Trunk]] = {}

    def __deepcopy__(self, memo: object) -> "Engine":
        return Engine()

    def __reduce__(self) -> tuple[type["Engine"], tuple[()]]:
        return Engine, ()

    def trunk(self, model: Model, x: Tensor) -> tuple[Trunk, str] | None:
        """Return what computes stem and layers of ``model`` for ``x``, or None for the ops.

        The trunk is called with an image batch (N, C, H, W) and what to return: ``"features"``,
        or if the head begins so ``"mean"`` (over the positions), or if it is so ``"logits"``.
        The last of these that it can do comes with it.
        """
        if torch.compiler.is_compiling() or not _is_plain(x):
            return None
        dtype = _working_dtype(x)
        where: tuple[object, ...] = (
            *(model.backend, model.cuda_graphs, model.static_output, model.chunk),
            *(x.device, x.dtype, dtype),
        )
        if x.is_cuda:
            where = *where, *_float32_products()  # compiled in
        made = self._made.get(where)
        # A shallow copy has another module's engine.
        if made is not None and made[0].modules is model._modules and made[0].unchanged():
            source, trunk = made
            return (trunk, source.result) if source.takes(x) else None
        try:
            backend = backends.resolve(model.backend, x.device, dtype)
            make = backends.trunk_maker(backend)
        except BackendUnavailableError:
            return None  # what is wrong with the input is for the ops to say first
        if make is None or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None  # what is made while a graph is captured has no values before its replay
        source = _Source(model)
        if not (source.usable() and source.takes(x)):
            return None
        # Before memory for another one is asked for; the others that stay are still right.
        kept = {key: made for key, made in self._made.items() if made[0].unchanged()}
        self._made = dict(list(kept.items())[1 - _KEPT :])
        with torch.inference_mode(False), torch.no_grad():
            options: dict[str, Any] = {}
            if backend == "triton":
                options = {"chunk": model.chunk, "tuned": model._tuned}
            trunk = source.make_trunk(make, dtype, **options)
            if x.is_cuda:  # other threads may use it on other streams
                torch.cuda.current_stream(x.device).synchronize()
        if dtype != x.dtype:
            trunk = _casting(trunk, dtype)
        if model.cuda_graphs is not False and _has_graphs(x.device):
            trunk = CudaGraphs(
                trunk,
                first_calls=0 if model.cuda_graphs is True else 1,
                static_output=model.static_output,
            )
        self._made = {**self._made, where: (source, trunk)}
        return trunk, source.result

    def bare_trunks(self, model: Model, x: Tensor) -> tuple[Callable[..., Trunk], Tensor]:
        """Return what makes Triton trunks of ``model`` with given options, and their input.

        Raises:
            BackendUnavailableError: ``x`` is not for Triton, or the trunk is not for ``x``.
        """
        dtype = _working_dtype(x)
        backend = backends.resolve(model.backend, x.device, dtype)
        if backend != "triton":
            raise BackendUnavailableError(
                f"tune() measures Triton kernels, and {x.dtype} on {x.device} runs on the backend "
                f"{backend!r}, which has nothing to tune. Move model and example to a CUDA device; "
                "convmixer_fast.backend_info() says what can run here"
            )
        source, make = _Source(model), backends.trunk_maker(backend)
        if make is None or not (_is_plain(x) and source.usable() and source.takes(x)):
            raise BackendUnavailableError(
                f"the model's layers do not run in one call for {x.dtype} {tuple(x.shape)} on "
                f"{x.device}: the example does not fit the weights, or hooks, a changed layer or a "
                "function transform look at single layers. Tune the module as optimize() returned "
                "it, with an example like its later inputs"
            )

        def trunk(**options: Any) -> Trunk:
            with torch.inference_mode(False), torch.no_grad():
                return source.make_trunk(make, dtype, **options)

        return trunk, x.to(dtype)


class _Source:
    """The modules and tensors that a trunk is made from, and whether they are still the same.

    Checked at every call, and so kept short: views of the modules' own dictionaries are compared
    with what they held, and tensors by address and count of changes in place.
    """

    def __init__(self, model: Model) -> None:
        self.modules = model._modules
        layers = list(model.blocks._modules.values())
        self.blocks: list[Any] = [model.stem]
        for layer in layers:
            self.blocks += layer._modules.values() if isinstance(layer, nn.Sequential) else [None]
        end = [model.global_pool, model.head_drop, model.head]
        modules = [model.stem, model.blocks, *layers, *self.blocks[1:], *end]
        seen = [module for module in modules if module is not None]
        self._hooks = [_global_forward_hooks, _global_forward_pre_hooks]
        self._hooks += [module._forward_hooks for module in seen]
        self._hooks += [module._forward_pre_hooks for module in seen]
        self._attributes = [module.__dict__ for module in seen]
        fused = [block for block in self.blocks if block is not None]
        self.result = "features"
        if model.source_head is None and model.global_pool.pool_type == "avg":
            plain = type(model.head) is nn.Linear and type(model.head_drop) is nn.Identity
            self.result = "logits" if plain else "mean"
        self._head: Any = model.head if self.result == "logits" else None
        holders = fused if self._head is None else [*fused, self._head]
        self._views = [model._modules.values(), model.blocks._modules.values()]
        self._views += [layer._modules.values() for layer in layers if layer is not None]
        self._views += [holder._parameters.values() for holder in holders]
        self._held = list(chain.from_iterable(self._views))
        held = chain.from_iterable(holder._parameters.values() for holder in holders)
        self._tensors = [tensor for tensor in held if tensor is not None]
        # Their memory is held, so that an address is not used again.
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._pool = model.global_pool
        self._settings = self._read_settings()
        # Inference tensors do not count their changes.
        self._counted = not any(tensor.is_inference() for tensor in self._tensors)
        self._changes = self._count_changes() if self._counted else []

    def usable(self) -> bool:
        """Whether one call can stand for the modules: as they were made, and nobody looking."""
        pairs = [DepthwiseBlock, PointwiseBlock] * ((len(self.blocks) - 1) // 2)
        as_made = [type(block) for block in self.blocks] == [PatchEmbed, *pairs]
        return (
            as_made
            and self._counted
            and not self._watched()
            and self._needs_no_gradient()
            and self._fits_together()
        )

    def unchanged(self) -> bool:
        """Whether a trunk made from this may be used again."""
        try:
            return (
                sum(map(len, self._views)) == len(self._held)
                and all(map(operator.is_, chain.from_iterable(self._views), self._held))
                and self._count_changes() == self._changes
                and self._read_settings() == self._settings
                and not self._watched()
                and self._needs_no_gradient()
            )
        except RuntimeError:  # one has become an inference tensor
            return False

    def takes(self, x: Tensor) -> bool:
        """Whether the ops would take ``x``."""
        weight = self.blocks[0].weight
        if x.dim() != 4 or x.device != weight.device:
            return False
        if torch.is_autocast_enabled(x.device.type):
            # Float64, and what is no floating-point number, is not cast.
            if not x.is_floating_point() or torch.float64 in (x.dtype, weight.dtype):
                return False
        elif x.dtype != weight.dtype:
            return False
        _, channels, height, width = x.shape
        _, wanted, patch_h, patch_w = weight.shape
        strided = x.layout == torch.strided
        return channels == wanted and height >= patch_h and width >= patch_w and strided

    def make_trunk(self, make: Callable[..., Trunk], dtype: torch.dtype, **options: Any) -> Trunk:
        """Call what makes a backend's trunk, with the tensors, their weights in ``dtype``."""
        stem = _cast(self.blocks[0].folded(), dtype)
        return make(stem, tuple(self.layers(dtype)), self.head(dtype), **options)

    def layers(self, dtype: torch.dtype) -> Iterator[FoldedLayer]:
        """Yield the layers; one that stands at several positions is one object at each."""
        made: dict[tuple[int, int], FoldedLayer] = {}
        for depthwise, pointwise in zip(self.blocks[1::2], self.blocks[2::2], strict=True):
            key = id(depthwise), id(pointwise)
            if key not in made:
                made[key] = FoldedLayer(
                    _cast(depthwise.folded(), dtype), _cast(pointwise.folded(), dtype)
                )
            yield made[key]

    def head(self, dtype: torch.dtype) -> Head | None:
        """Return the head, where the trunk can do it."""
        if self._head is None:
            return None
        bias = self._head.bias
        return Head("avg", self._head.weight.to(dtype), None if bias is None else bias.to(dtype))

    def _watched(self) -> bool:
        return any(self._hooks) or any(map(operator.contains, self._attributes, repeat("forward")))

    def _read_settings(self) -> list[object]:
        blocks = [block for block in self.blocks if block is not None]
        own = [getattr(block, "activation", None) for block in blocks]
        own += [getattr(block, "backend", None) for block in blocks]
        return [*own, self._pool.pool_type]

    def _fits_together(self) -> bool:
        """Whether the ops, and the head, would take the tensors: the kernels trust them."""
        stem = self.blocks[0].weight
        if any(type(t) not in (Tensor, nn.Parameter) for t in self._tensors):
            return False
        if any(t.device != stem.device or t.numel() == 0 for t in self._tensors):
            return False
        channels = stem.shape[0]
        for index, block in enumerate(self.blocks):
            shape = tuple(block.weight.shape)
            depthwise = index % 2 == 1
            size = shape[-1]
            wanted = (channels, 1, size, size) if depthwise else (shape[0], channels, 1, 1)
            if block.weight.dtype != stem.dtype or (index > 0 and shape != wanted):
                return False
            if depthwise and size % 2 == 0:
                return False
            channels = shape[0]
            for vector in (block.bias, block.scale, block.shift):
                if vector is None:
                    continue
                if vector.shape != (channels,) or vector.dtype not in (stem.dtype, torch.float32):
                    return False
        if self._head is None:
            return True
        weight, bias = self._head.weight, self._head.bias
        fits = weight.dim() == 2 and weight.shape[1] == channels and weight.dtype == stem.dtype
        return fits and (
            bias is None or (bias.shape == weight.shape[:1] and bias.dtype == stem.dtype)
        )

    def _count_changes(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]

    def _needs_no_gradient(self) -> bool:
        # Weights that require one are left to the ops, which refuse them.
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in self._tensors)


def _float32_products() -> tuple[str, str]:
    """Return how products of float32 are to be made: in convolutions, and in the head."""
    conv, linear = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return conv.fp32_precision, linear.fp32_precision


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return what the trunk computes in: the dtype of autocast, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(block: FoldedBlock, dtype: torch.dtype) -> FoldedBlock:
    # As autocast does to a convolution's weight; the vectors are made for float32.
    return replace(block, weight=block.weight.to(dtype))


def _casting(trunk: Trunk, dtype: torch.dtype) -> Trunk:
    def cast_first(x: Tensor, result: str) -> Tensor:
        return trunk(x.to(dtype), result)

    return cast_first


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_plain(x: Tensor) -> bool:
    """Whether nothing but the arithmetic happens to operations on ``x``."""
    device = x.device.type
    return (
        type(x) in (Tensor, nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and device in _DEVICES
        and (device in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device))
        and not torch._C._is_tracing()
    )
