"""Any ``nn.Module`` -> :class:`spec.ConvMixerSpec`, by what the module computes.

The module is traced to a graph of ATen operations (:mod:`tracing`) and its data
flow is followed from the image: patch convolution, activation, BatchNorm; then
layers ``y = BatchNorm(act(depthwise(x))) + x``, ``BatchNorm(act(pointwise(y)))``
(arXiv 2201.09792, section 2). No class or attribute name is looked at. What stands
before the first convolution, and a head that is not pooling and a linear layer,
become modules that run the source's own graph.
"""

import re
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.recognition.activation_forms import find_activation
from convmixer_fast.recognition.aten_graph import (
    ONE_TENSOR,
    Dataflow,
    SourceGraph,
    ancestors,
    arguments,
    extract,
    needs,
    op_name,
    refuse,
    where,
)
from convmixer_fast.recognition.blocks import (
    DEPTHWISE,
    PATCH,
    POINTWISE,
    BlockReader,
    describe,
    is_depthwise,
    is_grouped,
    is_patch,
    is_pointwise,
)
from convmixer_fast.recognition.outputs import WithDataclasses
from convmixer_fast.recognition.surroundings import surroundings
from convmixer_fast.recognition.tracing import trace
from convmixer_fast.spec import ConvMixerSpec, Layer

__all__ = ["recognize"]


def recognize(model: nn.Module, example_input: Tensor | None = None) -> ConvMixerSpec:
    """Say what ``model`` computes, as a ConvMixer.

    Args:
        model: any module, in eval mode, of one image batch (N, C, H, W). It is only read.
        example_input: a batch that it takes; needed only where its size cannot be guessed, or
            where the model looks at its dtype (uint8).

    Returns:
        The specification; its tensors may be the model's own.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``example_input`` is not a tensor (N, C, H, W) or (N, H, W, C).
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
    around = surroundings(flow, trunk.stem_conv, trunk.values, trunk.inside)
    head = around.head
    if traced.types and isinstance(head, nn.Module):  # what is put together is no plain head
        head = WithDataclasses(head, traced.types)
    return ConvMixerSpec(
        stem=trunk.stem,
        # Those behind the last one that is used are not.
        layers=tuple(trunk.layers[: around.steps]),
        head=head,
        prefix=traced.prefix,
        preprocess=around.preprocess,
        conditions=traced.conditions,
        taps=around.taps,
        input_name=traced.input_name,
        input_layout=traced.input_layout,
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


class _Trunk:
    """Stem and layers, found by following the value from the image on.

    ``values`` are the outputs of the stem and of each layer; ``inside`` holds the nodes on the way
    to the last, whose values nothing else may use but those of ``values``.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._reader = BlockReader(flow)
        self.layers: list[Layer] = []
        self.stem_conv = self._first_convolution()
        self.stem, value, self.inside = self._reader.read("stem", self.stem_conv, is_patch, PATCH)
        self.values = [value]
        while (found := self._next_layer()) is not None:
            self.layers.append(found.layer)
            self.inside |= {self.values[-1], *found.inside}
            self.values.append(found.value)

    def _first_convolution(self) -> fx.Node:
        for node in self.flow.nodes:
            if op_name(node) in _CONVOLUTIONS and node in self.flow.depends_on_image:
                return node
        refuse("the model", PATCH, "no convolution that depends on the image")

    def _next_layer(self) -> "_Found | None":
        """Return the layer that comes next, or None where the head does."""
        value = self.values[-1]
        for node in self.flow.consumers(value):
            if self._is_candidate(node) and (not self.layers or self._is_claimed(node, value)):
                return self._layer(node, value)
        self._refuse_layers_of_other_kinds(value)
        # Behind something of the source's own: that is run as it is.
        first_failure: UnsupportedModelError | None = None
        for node in self.flow.nodes[self.flow.order[value] + 1 :]:
            if not is_grouped(node) or node not in self.flow.depends_on_image:
                continue
            start = self.flow.source(node.args[0])
            if start is value or not self._is_made_of(start, value):
                continue
            try:
                found = self._layer(node, start)
            except UnsupportedModelError as failure:
                first_failure = first_failure or failure
                continue
            return self._behind(value, start, found)
        if not self.layers and first_failure is not None:
            raise first_failure
        return None

    def _is_candidate(self, node: fx.Node) -> bool:
        width = self.values[-1].meta["val"].shape[1]
        return is_grouped(node) or (width == 1 and op_name(node) == "conv2d")

    def _is_claimed(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether what begins with the convolution ``node`` is a layer, or one gone wrong.

        It has a layer's marks: activation and BatchNorm, or the sum with its input.
        """
        found = find_activation(self.flow, node)
        if found is not None:
            followers = self.flow.consumers(found[1])
            if any(op_name(follower) == "batch_norm" for follower in followers):
                return True
        return self._has_residual(value, {node})

    def _has_residual(self, value: fx.Node, through: set[fx.Node]) -> bool:
        """Whether ``value`` is added to something that is made of it by one of ``through``."""
        for add in self.flow.consumers(value):
            if op_name(add).rstrip("_") == "add":
                branch = needs([value], [node for node in add.all_input_nodes if node is not value])
                if branch & through:
                    return True
        return False

    def _refuse_layers_of_other_kinds(self, value: fx.Node) -> None:
        """Refuse what has the marks of a ConvMixer's layer: unfused it would be a slow path.

        That is a branch whose first convolution is depthwise and that its input is added to, or
        one of convolution, activation and BatchNorm.
        """
        consumers = self.flow.consumers(value)
        for node in self.flow.nodes[self.flow.order[value] + 1 :]:
            if op_name(node) != "conv2d" or node not in self.flow.depends_on_image:
                continue
            before = needs([value], [node.args[0]])
            if value not in before or any(map(_is_convolution, before - {value})):
                continue
            if self._has_residual(value, {node}) and (is_grouped(node) or self._is_block(node)):
                first = consumers[0]
                expected = f"{DEPTHWISE}, or the head"
                found = f"{describe(first)}, and later {describe(node)} in {where(node)}"
                self._reader.fail(f"layer {len(self.layers)}", first, expected, found)

    def _is_block(self, node: fx.Node) -> bool:
        found = find_activation(self.flow, node)
        followers = self.flow.consumers(found[1]) if found is not None else []
        return len(followers) == 1 and op_name(followers[0]) == "batch_norm"

    def _behind(self, value: fx.Node, start: fx.Node, found: "_Found") -> "_Found":
        """Return a layer with what stands between ``value`` and its input ``start``."""
        flow = self.flow
        writes = [
            node
            for node in flow.writes(flow.order[value], flow.order[start])
            if value in ancestors(node)
        ]
        entry = extract(flow, [value], [start], writes, ONE_TENSOR)
        between = needs([value], [start, *writes]) & flow.depends_on_image
        inside = found.inside | (between - {value})
        return _Found(replace(found.layer, entry=entry), found.value, inside)

    def _layer(self, start: fx.Node, source: fx.Node) -> "_Found":
        """Read the layer whose depthwise convolution is ``start``, of ``source``."""
        reader, at = self._reader, f"layer {len(self.layers)}, depthwise"
        depthwise, value, inside = reader.read(at, start, is_depthwise, DEPTHWISE)
        add, branch = self._sum(at, value, source)
        inside |= (needs([value, source], [add]) & self.flow.depends_on_image) - {source}
        at = f"layer {len(self.layers)}, pointwise"
        conv = reader.only_consumer(at, add, POINTWISE)
        pointwise, value, more = reader.read(at, conv, is_pointwise, POINTWISE)
        return _Found(Layer(depthwise, pointwise, branch), value, inside | more)

    def _sum(self, at: str, value: fx.Node, source: fx.Node) -> tuple[fx.Node, SourceGraph | None]:
        """Return the residual sum behind a depthwise block, and what stands between them."""
        for add in self.flow.consumers(source):
            operands = {self.flow.source(operand) for operand in add.args[:2]}
            if op_name(add).rstrip("_") != "add" or source not in operands:
                continue
            others = list(operands - {source})
            if len(others) != 1 or not self._is_made_of(others[0], value):
                continue
            if arguments(add)["alpha"] != 1:
                found = f"a sum weighted by {arguments(add)['alpha']}"
                self._reader.fail(at, add, _RESIDUAL, found)
            if others[0] is value:
                return add, None
            return add, extract(self.flow, [value], others, structure=ONE_TENSOR)
        follower = self._reader.only_consumer(at, value, _RESIDUAL)
        self._reader.fail(at, follower, _RESIDUAL, describe(follower))

    def _is_made_of(self, node: Any, value: fx.Node) -> bool:
        """Whether ``node`` is computed from ``value``, and otherwise from constants alone."""
        between = needs([value], [node])
        return value in between and self.flow.image not in between


class _Found(NamedTuple):
    """A layer in the graph."""

    layer: Layer
    value: fx.Node
    """Its output."""
    inside: set[fx.Node]
    """The nodes before that."""


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution")
_RESIDUAL = "the sum with the layer's input"


def _is_convolution(node: fx.Node) -> bool:
    return op_name(node) in _CONVOLUTIONS
