"""What stands around a recognised trunk: a plain head as data, everything else as source graphs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from convmixer_fast.models.convmixer import POOLS
from convmixer_fast.recognition.aten_graph import (
    Dataflow,
    ancestors,
    arguments,
    extract,
    needs,
    op_name,
    refuse,
    where,
)
from convmixer_fast.spec import Head

__all__ = ["Surroundings", "surroundings"]


class Surroundings(NamedTuple):
    """What :func:`surroundings` found."""

    steps: int
    """How many layers are used."""
    head: Head | nn.Module
    taps: tuple[int, ...]
    """Steps before the last that the head takes too."""
    preprocess: nn.Module | None
    """Returns the stem's input, then what else the head takes: the image, or values made of it
    before the stem. None where nothing stands before the stem."""


def surroundings(
    flow: Dataflow, stem_conv: fx.Node, values: Sequence[fx.Node], inside: set[fx.Node]
) -> Surroundings:
    """Return the head, and what stands before the stem. Nothing is computed, or written, twice.

    Args:
        flow: the graph.
        stem_conv: the first convolution.
        values: the outputs of the stem and of each layer.
        inside: the nodes from the stem to the last layer's output.

    Raises:
        UnsupportedModelError: the head uses a value inside a layer, or there is nothing
            of a ConvMixer after the stem.
    """
    source = stem_conv.args[0]
    assert isinstance(source, fx.Node)
    before = flow.writes(0, flow.order[stem_conv])
    writes = [
        node
        for node in flow.writes(flow.order[values[0]], len(flow.nodes))
        if node not in inside and node not in values
    ]
    _refuse_early_writes(flow, writes, values, inside)
    head = _plain_head(flow, values[-1])
    if head is not None:
        rest = _preprocess(flow, source, [], before)
        return Surroundings(len(values) - 1, head, (), rest)
    if len(values) == 1:
        refuse(
            f"layer 0 ({where(values[0])})",
            "a depthwise convolution, or global pooling",
            "neither after the stem",
        )
    steps, source_head, taps, extras = _source_head(flow, stem_conv, values, inside, writes)
    return Surroundings(steps, source_head, taps, _preprocess(flow, source, extras, before))


def _preprocess(
    flow: Dataflow, source: fx.Node, extras: Sequence[fx.Node], writes: Sequence[fx.Node]
) -> nn.Module | None:
    if source is flow.image and not writes and set(extras) <= {flow.image}:
        return None
    return extract(flow, [flow.image], [source, *extras], writes)


def _outputs(flow: Dataflow) -> list[Any]:
    return list(flow.nodes[-1].args[0])  # type: ignore[arg-type]


def _source_head(
    flow: Dataflow,
    stem_conv: fx.Node,
    values: Sequence[fx.Node],
    inside: set[fx.Node],
    writes: Sequence[fx.Node],
) -> tuple[int, nn.Module, tuple[int, ...], list[fx.Node]]:
    """Return the layers that are used, the head as the source's own graph, and what that takes.

    That is the last of those layers' output, those of other steps, and other values.
    """
    start = flow.order[stem_conv]
    wanted = [*_outputs(flow), *writes]

    def is_extra(node: fx.Node) -> bool:
        # Sizes are computed anew, from the image; tensors made before the stem are handed on.
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        return (
            node in flow.depends_on_image
            and flow.order[node] < start
            and (is_tensor or node is flow.image)
        )

    extras = [node for node in flow.nodes if is_extra(node)]
    used = needs([*values, *extras], wanted)
    taken = sorted(used & inside - set(values), key=flow.order.__getitem__)
    if taken:
        refuse(
            where(taken[0]),
            "a head that uses the layers' outputs alone",
            "one that uses a value inside the layers as well",
        )
    steps = [step for step, value in enumerate(values) if value in used] or [0]
    last, taps = steps[-1], tuple(steps[:-1])
    # The image is what a head takes where nothing stands before the stem.
    extras = [node for node in extras if node in used] or [flow.image]
    inputs = [values[last], *(values[step] for step in taps), *extras]
    head = extract(flow, inputs, _outputs(flow), writes, flow.program.call_spec.out_spec)
    return last, head, taps, extras


_VIEWS = frozenset(
    """alias chunk detach expand flatten getitem narrow permute reshape select slice split squeeze
    t transpose unbind unflatten unfold unsqueeze view""".split()  # noqa: SIM905
)


def _refuse_early_writes(
    flow: Dataflow, writes: Sequence[fx.Node], values: Sequence[fx.Node], inside: set[fx.Node]
) -> None:
    """Refuse a head that writes into what the layers have yet to read."""
    for write in writes:
        if flow.order[write] > flow.order[values[-1]]:
            continue
        target: Any = write.args[0]
        while isinstance(target, fx.Node) and op_name(target) in _VIEWS:
            target = target.args[0]
        if target in inside or target in values:
            refuse(
                where(write),
                "layers whose values nothing else writes into",
                f"{op_name(write)} on one of them",
            )


# What pooling is written with. Anything else may agree with it on random maps alone.
_POOL_OPERATIONS = frozenset(
    """adaptive_avg_pool2d adaptive_max_pool2d add amax cat div flatten getitem max mean mul
    reshape select squeeze sum sym_size unsqueeze view""".split()  # noqa: SIM905
)


def _plain_head(flow: Dataflow, features: fx.Node) -> Head | None:
    """Return the head if it is global pooling and at most one linear layer, else None."""
    structure = flow.program.call_spec.out_spec
    start = flow.order[features] + 1  # which may be an operation in place itself
    if not (structure is not None and structure.is_leaf()) or flow.writes(start, len(flow.nodes)):
        return None
    last = flow.source(_outputs(flow)[0])
    weight = bias = None
    if op_name(last) == "linear" and all(map(flow.is_constant, last.args[1:])):
        given = arguments(last)
        weight, bias = flow.constant(given["weight"]), flow.constant(given["bias"])
        last = flow.source(given["input"])
    pooled_from = features.meta["val"]
    pooling = needs([features], [last]) - {features}
    plain = all(
        node.op == "call_function"
        and (op_name(node) in _POOL_OPERATIONS or flow.is_identity(node))
        and ancestors(node) >= {features}
        for node in pooling
    )
    if not plain or last.meta["val"].dtype != pooled_from.dtype:
        return None
    if weight is not None and weight.dtype != pooled_from.dtype:
        return None
    kind = _pool_kind(extract(flow, [features], [last]), pooled_from)
    return None if kind is None else Head(kind, weight, bias)


def _pool_kind(pool: nn.Module, features: Tensor) -> str | None:
    """Return the kind of pooling that ``pool`` computes, by comparing results on random maps.

    The graph holds no weights, so that agreement on maps of several sizes, one of them a
    single image, tells which of the few kinds it is.
    """
    generator = torch.Generator().manual_seed(0)
    possible = list(POOLS)
    for n, h, w in ((1, 1, 1), (1, 5, 3), (3, 4, 6)):
        x = torch.randn(n, features.shape[1], h, w, generator=generator, device="cpu")
        try:
            (found,) = pool(x.to(features.device))
        except (RuntimeError, IndexError, ValueError):
            return None
        expected = {kind: POOLS[kind](x) for kind in possible}
        possible = [
            kind
            for kind, value in expected.items()
            if value.shape == found.shape
            and value.dtype == found.dtype
            and torch.allclose(value, found.cpu(), rtol=1e-5, atol=1e-6)
        ]
    return possible[0] if possible else None
