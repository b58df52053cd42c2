"""What stands around a recognised trunk: a plain head as data, everything else as source graphs."""

from typing import Any

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

__all__ = ["surroundings"]


def surroundings(
    flow: Dataflow,
    stem_conv: fx.Node,
    features: fx.Node,
    inside: set[fx.Node],
    has_layers: bool,
) -> tuple[Head | nn.Module, nn.Module | None]:
    """Return the head, and the graph of what stands before the stem, None where nothing does.

    The latter returns the stem's input, then what else the head takes: the image, or values
    made of it before the stem. Nothing is computed, or written, twice.

    Args:
        flow: the graph.
        stem_conv: the first convolution.
        features: the last layer's output.
        inside: the nodes between the two, whose values the head may not use.
        has_layers: whether there are any; with none, only a plain head makes a ConvMixer.

    Raises:
        UnsupportedModelError: the head uses a value inside the layers, or there is nothing
            of a ConvMixer after the stem.
    """
    source = stem_conv.args[0]
    assert isinstance(source, fx.Node)
    before = flow.writes(0, flow.order[stem_conv])
    head: Head | nn.Module | None = _plain_head(flow, features)
    extras: list[fx.Node] = []
    if head is None:
        if not has_layers:
            refuse(
                f"layer 0 ({where(features)})",
                "a depthwise convolution, or global pooling",
                "neither after the stem",
            )
        head, extras = _source_head(flow, stem_conv, features, inside)
    if source is flow.image and not before and set(extras) <= {flow.image}:
        return head, None
    return head, extract(flow, [flow.image], [source, *extras], before)


def _outputs(flow: Dataflow) -> list[Any]:
    return list(flow.nodes[-1].args[0])  # type: ignore[arg-type]


def _source_head(
    flow: Dataflow, stem_conv: fx.Node, features: fx.Node, inside: set[fx.Node]
) -> tuple[nn.Module, list[fx.Node]]:
    """Return the head as the source's own graph, and what it takes besides the features."""
    start = flow.order[stem_conv]
    writes = flow.writes(flow.order[features], len(flow.nodes))
    outputs = _outputs(flow)

    def is_extra(node: fx.Node) -> bool:
        # Sizes are computed anew, from the image; tensors made before the stem are handed on.
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        return (
            node in flow.depends_on_image
            and flow.order[node] < start
            and (is_tensor or node is flow.image)
        )

    extras = [node for node in flow.nodes if is_extra(node)]
    used = needs([features, *extras], [*outputs, *writes])
    taken = sorted(used & inside, key=flow.order.__getitem__)
    if taken:
        refuse(
            where(taken[0]),
            "a head that uses the last layer's output alone",
            "one that uses a value inside the layers as well",
        )
    # The image is what a head takes where nothing stands before the stem.
    extras = [node for node in extras if node in used] or [flow.image]
    structure = flow.program.call_spec.out_spec
    return extract(flow, [features, *extras], outputs, writes, structure), extras


# What pooling is written with. Anything else may agree with it on random maps alone.
_POOL_OPERATIONS = frozenset(
    """adaptive_avg_pool2d adaptive_max_pool2d add amax cat div flatten getitem max mean mul
    reshape select squeeze sum sym_size unsqueeze view""".split()  # noqa: SIM905
)


def _plain_head(flow: Dataflow, features: fx.Node) -> Head | None:
    """Return the head if it is global pooling and at most one linear layer, else None."""
    structure = flow.program.call_spec.out_spec
    start = flow.order[features]
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
