"""The blocks of a fused network as modules: one fused op each, and the tensors that it takes.

The tensors are parameters that require no gradient, so that ``.to()``, ``state_dict``,
``deepcopy``, ``pickle`` and ``next(model.parameters()).device`` do what they do on any module.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from convmixer_fast import ops
from convmixer_fast.choices import ActivationName, BackendName
from convmixer_fast.errors import ReleasedWeightsError
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Quantization

__all__ = [
    "BranchedBlock",
    "DepthwiseBlock",
    "FusedBlock",
    "PatchEmbed",
    "PointwiseBlock",
    "folded_layer",
    "fused_layer",
]


_QUANTIZATION = tuple(field.name for field in fields(Quantization))


class FusedBlock(nn.Module):
    """One fused op and the tensors that it takes.

    Where it is quantised, ``weight`` is int8, and the tensors of its :class:`Quantization` are
    parameters too.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: nn.Parameter | None
    shift: nn.Parameter | None
    released = False

    def __init__(self, block: FoldedBlock, backend: BackendName) -> None:
        super().__init__()
        tensors = {name: getattr(block, name) for name in ("weight", "bias", "scale", "shift")}
        if block.quantization is not None:
            # First, as a module's dtype is read off its first parameter.
            own = {name: getattr(block.quantization, name) for name in _QUANTIZATION}
            tensors = own | tensors
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)
        self.activation = cast(ActivationName, block.activation)
        self.backend = backend

    @property
    def quantization(self) -> Quantization | None:
        """Scales and zero points, where it is quantised."""
        if "weight_scale" not in self._parameters:
            return None
        return Quantization(**{name: getattr(self, name) for name in _QUANTIZATION})

    @property
    def dtype(self) -> torch.dtype:
        """Of its input."""
        return self.weight.dtype if self.quantization is None else torch.float32

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and weight of the op: where it is quantised, what their 8 bits stand for."""
        self.need_weights("running op by op")
        quantization = self.quantization
        if quantization is None:
            return x, self.weight
        return quantization.input(x), quantization.weight(self.weight, x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.need_weights("a change of dtype or device")

        # .half() and .to(bfloat16) leave the per-channel vectors in float32: the kernels
        # take them so, and rounding them would cost accuracy and save nothing.
        def keep_vectors(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dim() <= 1 and result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device, torch.float32)
            return result

        super()._apply(keep_vectors, recurse)
        return self

    def release(self) -> None:
        """Let go of the numbers. Tensors keep shape, dtype and device, and hold one NaN, or 0."""
        for parameter in self.parameters():
            nothing = float("nan") if parameter.is_floating_point() else 0
            parameter.data = parameter.new_full((), nothing).expand(parameter.shape)
        self.released = True

    def need_weights(self, what: str) -> None:
        """Raise ReleasedWeightsError where they are gone."""
        if self.released:
            raise ReleasedWeightsError(
                f"{what} needs the weights, which this module has let go of; call optimize() "
                "without release=True"
            )

    def __getstate__(self) -> dict[str, Any]:
        self.need_weights("a copy")
        return self.__dict__

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.need_weights("state_dict()")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.need_weights("load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def folded(self) -> FoldedBlock:
        """Return the tensors as plain data; they are not copied.

        Raises:
            ReleasedWeightsError: they are gone.
        """
        self.need_weights("a call other than that which they were packed for")
        return FoldedBlock(
            *(self.weight, self.bias, self.scale, self.shift, self.activation, self.quantization)
        )

    def extra_repr(self) -> str:
        """Return the weight's shape, the activation and the backend."""
        shape = "x".join(map(str, self.weight.shape))
        kind = "" if self.quantization is None else "int8, "
        return f"{shape}, {kind}activation={self.activation!r}, backend={self.backend!r}"


class PatchEmbed(FusedBlock):
    """:func:`ops.patch_embed` on folded tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C_in, H, W) to (N, C_out, H // P_h, W // P_w)."""
        x, weight = self.operands(x)
        return ops.patch_embed(
            x, weight, self.bias, self.scale, self.shift,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip


class DepthwiseBlock(FusedBlock):
    """:func:`ops.depthwise_block` on folded tensors."""

    residual = True
    """Whether it adds its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        self.need_weights("running op by op")
        return ops.depthwise_block(
            x, self.weight, self.bias, self.scale, self.shift,
            activation=self.activation, residual=self.residual, backend=self.backend,
        )  # fmt: skip


class PointwiseBlock(FusedBlock):
    """:func:`ops.pointwise_block` on folded tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H, W)."""
        x, weight = self.operands(x)
        return ops.pointwise_block(
            x, weight, self.bias, self.scale, self.shift,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip


class BranchedBlock(nn.Module):
    """A depthwise block, then a module of the source's own, then the sum with the input."""

    def __init__(self, depthwise: DepthwiseBlock, branch: nn.Module) -> None:
        super().__init__()
        depthwise.residual = False
        self.depthwise, self.branch = depthwise, branch

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        y: Tensor = self.branch(self.depthwise(x))
        return y + x


def fused_layer(layer: FoldedLayer, backend: BackendName) -> nn.Sequential:
    """Return the two blocks of a layer in a row, behind what the source has before them."""
    depthwise = DepthwiseBlock(layer.depthwise, backend)
    first = depthwise if layer.branch is None else BranchedBlock(depthwise, layer.branch)
    blocks: dict[str, nn.Module] = {"0": first, "1": PointwiseBlock(layer.pointwise, backend)}
    if layer.entry is not None:
        blocks = {"entry": layer.entry, **blocks}
    return nn.Sequential(OrderedDict(blocks))


def folded_layer(layer: nn.Sequential) -> FoldedLayer:
    """Return what :func:`fused_layer` made ``layer`` of; tensors are not copied."""
    parts: dict[str, Any] = dict(layer.named_children())
    first, branch = parts["0"], None
    if isinstance(first, BranchedBlock):
        branched: Any = first
        first, branch = branched.depthwise, branched.branch
    return FoldedLayer(first.folded(), parts["1"].folded(), branch, parts.get("entry"))
