"""One block in the graph: convolution, activation and what scales and shifts behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.recognition.activation_forms import find_activation
from convmixer_fast.recognition.aten_graph import Dataflow, arguments, op_name, refuse, where
from convmixer_fast.spec import Affine, BatchNorm, Block

__all__ = [
    "DEPTHWISE",
    "PATCH",
    "POINTWISE",
    "BlockReader",
    "Convolution",
    "describe",
    "is_depthwise",
    "is_grouped",
    "is_patch",
    "is_pointwise",
]

PATCH = "a patch convolution (stride = kernel size, no padding, one group)"
DEPTHWISE = (
    "a depthwise convolution (groups = channels, square kernel, stride 1, padded to the same size)"
)
POINTWISE = "a pointwise convolution (1 x 1, stride 1, one group)"
_ACTIVATION = "an activation (ReLU, GELU ...)"
_NO_PADDING = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Convolution:
    """A conv2d node's arguments, with ``padding`` as (before, after) of height and of width."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width."""
        return (self.weight.shape[2], self.weight.shape[3])

    def __str__(self) -> str:
        return (
            f"a convolution of kernel {self.kernel}, stride {self.stride}, padding {self.padding}, "
            f"dilation {self.dilation}, groups {self.groups}, "
            f"{self.weight.shape[1] * self.groups} to {self.weight.shape[0]} channels"
        )


def is_patch(conv: Convolution) -> bool:
    """Whether it cuts the image into patches."""
    return (conv.stride, conv.padding, conv.dilation, conv.groups) == (
        conv.kernel,
        _NO_PADDING,
        (1, 1),
        1,
    )


def is_depthwise(conv: Convolution) -> bool:
    """Whether it is depthwise, and keeps height and width."""
    size, dilation = conv.kernel[0], conv.dilation[0]
    span = dilation * (size - 1)
    padding = (span // 2, span - span // 2)
    return (
        conv.kernel == (size, size)
        and conv.weight.shape[:2] == (conv.groups, 1)
        and (conv.stride, conv.padding, conv.dilation)
        == ((1, 1), (padding, padding), (dilation, dilation))
    )


def is_pointwise(conv: Convolution) -> bool:
    """Whether it is 1 x 1."""
    return (conv.kernel, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), _NO_PADDING, 1)


class BlockReader:
    """Reads blocks of a graph; ``at`` is where, for messages."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow

    def read(
        self, at: str, node: fx.Node, is_right: Callable[[Convolution], bool], expected: str
    ) -> tuple[Block, fx.Node, set[fx.Node]]:
        """Read the block that begins with ``node``; return it, its result, the nodes before that.

        Raises:
            UnsupportedModelError: it is none; says where it differs.
        """
        conv = self._convolution(at, node, expected)
        if not is_right(conv):
            self.fail(at, node, expected, str(conv))
        value, inside = node, {node}
        inner: list[BatchNorm | Affine] = []
        while (found := find_activation(self._flow, value)) is None:
            follower = self._single(value)
            norm = None if follower is None else self._norm(at, follower, value)
            if norm is None or follower is None:
                self._fail_activation(at, node)
            inner.append(norm)
            value = follower
            inside.add(value)
        activation, value, between = found
        inside |= {value, *between}
        norms: list[BatchNorm | Affine] = []
        while (follower := self._single(value)) is not None:
            norm = self._norm(at, follower, value)
            if norm is None:
                break
            norms.append(norm)
            value = follower
            inside.add(value)
        if not norms and not inner:
            follower = self.only_consumer(at, value, "BatchNorm")
            self.fail(at, follower, "BatchNorm", describe(follower))
        dilation = conv.dilation[0]
        block = Block(conv.weight, conv.bias, activation, tuple(norms), tuple(inner), dilation)
        return block, value, inside - {value}

    def only_consumer(self, at: str, node: fx.Node, expected: str) -> fx.Node:
        """Return what alone uses the value of ``node``, or say that it is not alone."""
        consumers = self._flow.consumers(node)
        if not consumers:
            self.fail(at, node, f"{expected} after {describe(node)}", "nothing")
        if len(consumers) > 1:
            self.fail(
                at,
                consumers[1],
                f"{expected} alone after {describe(node)}",
                f"also {describe(consumers[1])}",
            )
        return consumers[0]

    def fail(self, at: str, node: fx.Node, expected: str, found: str) -> NoReturn:
        """Refuse the model, for what stands at ``node``."""
        refuse(f"{at} ({where(node)})", expected, found)

    def _fail_activation(self, at: str, conv: fx.Node) -> NoReturn:
        consumers = self._flow.consumers(conv)
        if len(consumers) > 1 and all(user.op == "call_function" for user in consumers):
            names = " and ".join(dict.fromkeys(op_name(user).rstrip("_") for user in consumers))
            found = f"{names} operations that compute none of {', '.join(ACTIVATIONS)}"
            self.fail(at, consumers[0], _ACTIVATION, found)
        follower = self.only_consumer(at, conv, _ACTIVATION)
        self.fail(at, follower, _ACTIVATION, describe(follower))

    def _single(self, node: fx.Node) -> fx.Node | None:
        consumers = self._flow.consumers(node)
        return consumers[0] if len(consumers) == 1 else None

    def _convolution(self, at: str, node: fx.Node, expected: str) -> Convolution:
        if op_name(node) != "conv2d":
            self.fail(at, node, expected, describe(node))
        given = arguments(node)
        weight = self._constant(at, node, given["weight"])
        stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
        if given["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            before = (total[0] // 2, total[1] // 2)
            after = (total[0] - before[0], total[1] - before[1])
        else:
            before = after = (0, 0) if given["padding"] == "valid" else _pair(given["padding"])
        return Convolution(
            weight=weight,
            bias=self._constant(at, node, given["bias"]),
            stride=stride,
            padding=((before[0], after[0]), (before[1], after[1])),
            dilation=dilation,
            groups=given["groups"],
        )

    def _norm(self, at: str, node: fx.Node, value: fx.Node) -> BatchNorm | Affine | None:
        """Return what ``node`` does to each channel of ``value``; None where it does more."""
        if op_name(node) != "batch_norm":
            return self._affine(node, value)
        given = {
            name: self._constant(at, node, argument)
            for name, argument in arguments(node).items()
            if name not in ("input", "training")
        }
        return BatchNorm(
            mean=given["running_mean"],
            var=given["running_var"],
            weight=given["weight"],
            bias=given["bias"],
            eps=float(given["eps"]),
        )

    def _affine(self, node: fx.Node, value: fx.Node) -> Affine | None:
        """Return a sum or product with constants that are one number for each channel."""
        name = op_name(node).rstrip("_") if node.op == "call_function" else ""
        if name not in ("add", "sub", "rsub", "mul", "div"):
            return None
        given = arguments(node)
        first, second = given["self"], given["other"]
        backwards = self._flow.source(first) is not value
        constant = first if backwards else second
        if not self._flow.is_constant(constant) or self._flow.is_written(constant):
            return None
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            return None
        after, before = node.meta["val"], value.meta["val"]
        number = _by_channel(self._flow.constant(constant), before.shape[1])
        if number is None or after.shape != before.shape or after.dtype != before.dtype:
            return None
        number = number.to(before.device)
        minus = torch.tensor(-1.0, dtype=torch.float64, device=number.device)
        if name == "mul":
            return Affine(number, None)
        if name == "add":
            return Affine(None, number)
        if name == "div":
            return None if backwards else Affine(number.reciprocal(), None)
        # self - other, or for rsub the other way round.
        return Affine(minus, number) if backwards != (name == "rsub") else Affine(None, -number)

    def _constant(self, at: str, node: fx.Node, value: Any) -> Any:
        if not self._flow.is_constant(value):
            self.fail(at, node, "constant weights", "weights that depend on the image")
        if self._flow.is_written(value):
            self.fail(at, node, "constant weights", "weights that the model's forward writes into")
        return self._flow.constant(value)


def _by_channel(constant: Any, channels: int) -> Tensor | None:
    """Return a constant that (N, C, H, W) is combined with, as (C,) or () in float64."""
    if isinstance(constant, int | float) and not isinstance(constant, bool):
        return torch.tensor(float(constant), dtype=torch.float64)
    if not isinstance(constant, Tensor) or not constant.is_floating_point():
        return None
    if constant.numel() == 1 and constant.dim() <= 4:
        return constant.detach().double().reshape(())
    by_channel = constant.dim() in (3, 4) and constant.shape[-3] == channels
    if by_channel and constant.numel() == channels:
        return constant.detach().double().flatten()
    return None


def is_grouped(node: fx.Node) -> bool:
    """Whether it is a convolution of several groups."""
    return op_name(node) == "conv2d" and arguments(node)["groups"] > 1


def describe(node: fx.Node) -> str:
    """Name an operation for a message."""
    if node.op == "output":
        return "the model's output"
    name = op_name(node).rstrip("_")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} operation"


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return (values[0], values[-1])
