"""Any ``nn.Module`` -> :class:`spec.ConvMixerSpec`, by what the module computes.

The module is traced to a graph of ATen operations (:mod:`tracing`) and its data
flow is followed from the image: patch convolution, activation, BatchNorm; then
layers ``y = BatchNorm(act(depthwise(x))) + x``, ``BatchNorm(act(pointwise(y)))``
(arXiv 2201.09792, section 2). No class or attribute name is looked at. What stands
before the first convolution, and a head that is not pooling and a linear layer,
become modules that run the source's own graph.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.recognition.aten_graph import Dataflow, arguments, op_name, refuse, where
from convmixer_fast.recognition.surroundings import surroundings
from convmixer_fast.recognition.tracing import trace
from convmixer_fast.spec import BatchNorm, Block, ConvMixerSpec, Layer

__all__ = ["recognize"]


def recognize(model: nn.Module, example_input: Tensor | None = None) -> ConvMixerSpec:
    """Say what ``model`` computes, as a ConvMixer.

    Args:
        model: any module, in eval mode, of one image batch (N, C, H, W). It is only read.
        example_input: a batch that it takes; needed only where its size cannot be guessed.

    Returns:
        The specification; its tensors may be the model's own.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``example_input`` is not a tensor (N, C, H, W).
        UnsupportedModelError: the model is no ConvMixer in eval mode; the message names
            the first place that differs, what was expected there and what was found.
    """
    traced = trace(model, example_input)
    flow = Dataflow(traced.program)
    _refuse_training(flow)
    trunk = _Trunk(flow)
    fixed = [c.text for c in traced.conditions if re.fullmatch(r"[^%]* == \d+", c.text)]
    if traced.guessed and fixed:
        raise UnsupportedModelError(
            f"the model's own code fixes the size of its input ({', '.join(fixed)} when traced on "
            "a guessed one, as int(x.shape[i]) does); pass example_input= with the size to be used"
        )
    head, preprocess = surroundings(
        flow, trunk.stem_conv, trunk.value, trunk.inside, bool(trunk.layers)
    )
    return ConvMixerSpec(
        stem=trunk.stem,
        layers=tuple(trunk.layers),
        head=head,
        prefix=traced.prefix,
        preprocess=preprocess,
        conditions=traced.conditions,
    )


def _refuse_training(flow: Dataflow) -> None:
    for node in flow.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "batch_norm" and arguments(node)["training"]:
            if arguments(node)["running_mean"] is None:
                refuse(
                    where(node),
                    "a BatchNorm with running statistics",
                    "one without (track_running_stats=False), which normalises by the batch",
                )
            refuse(
                where(node), "eval mode", "BatchNorm in training mode", "call model.eval() first"
            )
        if "dropout" in name and arguments(node).get("train"):
            refuse(where(node), "eval mode", "dropout in training mode", "call model.eval() first")
        if name == "wrap_with_autocast":
            refuse(
                where(node),
                "a model without autocast inside",
                "torch.autocast in its forward",
                "use autocast around the call instead",
            )


@dataclass(frozen=True)
class _Convolution:
    """A conv2d node's arguments, with ``padding`` as (before, after) of height and of width."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        return (self.weight.shape[2], self.weight.shape[3])

    def __str__(self) -> str:
        return (
            f"a convolution of kernel {self.kernel}, stride {self.stride}, padding {self.padding}, "
            f"dilation {self.dilation}, groups {self.groups}, "
            f"{self.weight.shape[1] * self.groups} to {self.weight.shape[0]} channels"
        )


class _Trunk:
    """Stem and layers, found by following the value from the image on.

    ``value`` ends as the last layer's output; ``inside`` holds the nodes on the way
    to it, whose values nothing else may use.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.inside: set[fx.Node] = set()
        self.layers: list[Layer] = []
        self._at = "stem"
        self.stem_conv = self._first_convolution()
        self.stem, self.value = self._block(self.stem_conv, _is_patch, _PATCH)
        while (start := self._layer_start()) is not None:
            self._layer(start)

    def _first_convolution(self) -> fx.Node:
        for node in self.flow.nodes:
            if op_name(node) in _CONVOLUTIONS and node in self.flow.depends_on_image:
                return node
        refuse("the model", _PATCH, "no convolution that depends on the image")

    def _layer_start(self) -> fx.Node | None:
        """Return the depthwise convolution that starts the next layer, or None at the head."""
        consumers = self.flow.consumers(self.value)
        for node in consumers:
            if _is_grouped(node) or (self._width() == 1 and op_name(node) == "conv2d"):
                return node
        # The head may hold convolutions of its own, but what has the marks of a
        # ConvMixer layer must be one: running it unfused would be a silent slow path.
        for node in self.flow.nodes[self.flow.order[self.value] + 1 :]:
            if _is_batch_norm_2d(node) or _is_grouped(node):
                first = consumers[0] if consumers else node
                self._at = f"layer {len(self.layers)}"
                self._fail(
                    first,
                    f"{_DEPTHWISE}, or the head",
                    f"{_describe(first)}, and later {_describe(node)} in {where(node)}",
                )
        return None

    def _layer(self, start: fx.Node) -> None:
        index, source = len(self.layers), self.value
        self._at = f"layer {index}, depthwise"
        depthwise, value = self._block(start, _is_depthwise, _DEPTHWISE)
        add = self._only_consumer(value, _RESIDUAL)
        operands = {self.flow.source(operand) for operand in add.args[:2]}
        if op_name(add) not in ("add", "add_") or operands != {value, source}:
            self._fail(add, _RESIDUAL, _describe(add))
        if arguments(add)["alpha"] != 1:
            self._fail(add, _RESIDUAL, f"a sum weighted by {arguments(add)['alpha']}")
        extra = [node for node in self.flow.consumers(source) if node not in (start, add)]
        if extra:
            self._fail(
                extra[0], "a layer's input to be used by that layer alone", _describe(extra[0])
            )
        self.inside.update((source, add))
        self._at = f"layer {index}, pointwise"
        conv = self._only_consumer(add, _POINTWISE)
        pointwise, self.value = self._block(conv, _is_pointwise, _POINTWISE)
        self.layers.append(Layer(depthwise, pointwise))

    def _block(
        self, node: fx.Node, is_right: Callable[[_Convolution], bool], expected: str
    ) -> tuple[Block, fx.Node]:
        """Read convolution, activation and BatchNorm; return them and the BatchNorm's node."""
        conv = self._convolution(node, expected)
        if not is_right(conv):
            self._fail(node, expected, str(conv))
        activation = self._only_consumer(node, _ACTIVATION)
        kind = _activation(activation)
        if kind is None:
            self._fail(activation, _ACTIVATION, _describe(activation))
        norm = self._only_consumer(activation, "BatchNorm")
        if op_name(norm) != "batch_norm":
            self._fail(norm, "BatchNorm", _describe(norm))
        self.inside.update((node, activation))
        given = {
            name: self._constant(norm, value)
            for name, value in arguments(norm).items()
            if name not in ("input", "training")
        }
        batch_norm = BatchNorm(
            mean=given["running_mean"],
            var=given["running_var"],
            weight=given["weight"],
            bias=given["bias"],
            eps=float(given["eps"]),
        )
        return Block(conv.weight, conv.bias, kind, batch_norm), norm

    def _convolution(self, node: fx.Node, expected: str) -> _Convolution:
        if op_name(node) != "conv2d":
            self._fail(node, expected, _describe(node))
        given = arguments(node)
        weight = self._constant(node, given["weight"])
        stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
        if given["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            before = (total[0] // 2, total[1] // 2)
            after = (total[0] - before[0], total[1] - before[1])
        else:
            before = after = (0, 0) if given["padding"] == "valid" else _pair(given["padding"])
        return _Convolution(
            weight=weight,
            bias=self._constant(node, given["bias"]),
            stride=stride,
            padding=((before[0], after[0]), (before[1], after[1])),
            dilation=dilation,
            groups=given["groups"],
        )

    def _constant(self, node: fx.Node, value: Any) -> Any:
        if not self.flow.is_constant(value):
            self._fail(node, "constant weights", "weights that depend on the image")
        if self.flow.is_written(value):
            self._fail(node, "constant weights", "weights that the model's forward writes into")
        return self.flow.constant(value)

    def _only_consumer(self, node: fx.Node, expected: str) -> fx.Node:
        consumers = self.flow.consumers(node)
        if not consumers:
            self._fail(node, f"{expected} after {_describe(node)}", "nothing")
        if len(consumers) > 1:
            self._fail(
                consumers[1],
                f"{expected} alone after {_describe(node)}",
                f"also {_describe(consumers[1])}",
            )
        return consumers[0]

    def _width(self) -> int:
        return int(self.value.meta["val"].shape[1])

    def _fail(self, node: fx.Node, expected: str, found: str) -> NoReturn:
        refuse(f"{self._at} ({where(node)})", expected, found)


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution")
_PATCH = "a patch convolution (stride = kernel size, no padding, one group)"
_DEPTHWISE = (
    "a depthwise convolution (groups = channels, square kernel, stride 1, padded to the same size)"
)
_POINTWISE = "a pointwise convolution (1 x 1, stride 1, one group)"
_RESIDUAL = "the sum with the layer's input"
_ACTIVATION = "an activation (ReLU or GELU)"
_NO_PADDING = ((0, 0), (0, 0))


def _is_patch(conv: _Convolution) -> bool:
    return (conv.stride, conv.padding, conv.dilation, conv.groups) == (
        conv.kernel,
        _NO_PADDING,
        (1, 1),
        1,
    )


def _is_depthwise(conv: _Convolution) -> bool:
    size = conv.kernel[0]
    padding = ((size - 1) // 2, size // 2)
    return (
        conv.kernel == (size, size)
        and conv.weight.shape[:2] == (conv.groups, 1)
        and (conv.stride, conv.padding, conv.dilation) == ((1, 1), (padding, padding), (1, 1))
    )


def _is_pointwise(conv: _Convolution) -> bool:
    return (conv.kernel, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), _NO_PADDING, 1)


def _is_batch_norm_2d(node: fx.Node) -> bool:
    return op_name(node) == "batch_norm" and node.meta["val"].dim() == 4


def _is_grouped(node: fx.Node) -> bool:
    return op_name(node) == "conv2d" and arguments(node)["groups"] > 1


def _activation(node: fx.Node) -> str | None:
    operation = op_name(node).rstrip("_")
    for name, row in ACTIVATIONS.items():
        if row.aten == operation:
            found = arguments(node)
            if all(found[key] == value for key, value in row.aten_arguments.items()):
                return name
    return None


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return (values[0], values[-1])


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    name = op_name(node).rstrip("_")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} operation"
