"""Activations in the graph: one operation, or written by hand from several.

What is written by hand is told by what it computes: the operations between two values, if they
are elementwise and hold no numbers but single ones, are run on a grid of float64 and compared
with every activation that the fused ops know.
"""

import torch
from torch import Tensor, fx

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.recognition.aten_graph import Dataflow, arguments, extract, needs, op_name

__all__ = ["find_activation"]

_ELEMENTWISE = frozenset(
    """_to_copy abs add clamp clamp_max clamp_min clone div erf erfc exp expm1 gelu hardsigmoid
    hardtanh leaky_relu log1p maximum minimum mul neg pow reciprocal relu relu6 rsub sigmoid silu
    softplus sqrt square sub tanh to where gt ge lt le zeros_like ones_like full_like""".split()  # noqa: SIM905
)
_MOST_OPERATIONS = 32


def find_activation(flow: Dataflow, value: fx.Node) -> tuple[str, fx.Node, set[fx.Node]] | None:
    """Return the activation of ``value``: its name, its result, and the nodes in between.

    None where what follows is none of :data:`activations.ACTIVATIONS`.
    """
    consumers = flow.consumers(value)
    if len(consumers) == 1:
        name = _operation(consumers[0])
        if name is not None:
            return name, consumers[0], set()
    inside: set[fx.Node] = set()
    for node in flow.nodes[flow.order[value] + 1 :]:
        if node not in flow.depends_on_image or (not inside and node not in consumers):
            continue
        if not any(source is value or source in inside for source in node.all_input_nodes):
            continue
        if not flow.is_identity(node) and not _is_elementwise(flow, node, value, inside):
            continue
        inside.add(node)
        if len(inside) > _MOST_OPERATIONS:
            return None
        if not flow.is_identity(node) and _is_only_way(flow, value, node):
            name = _computed(flow, value, node)
            if name is not None:
                return name, node, (needs([value], [node]) & flow.depends_on_image) - {value, node}
    return None


def _operation(node: fx.Node) -> str | None:
    operation = op_name(node).rstrip("_")
    for name, row in ACTIVATIONS.items():
        if row.aten == operation:
            found = arguments(node)
            if all(found[key] == value for key, value in row.aten_arguments.items()):
                return name
    return None


def _is_elementwise(flow: Dataflow, node: fx.Node, value: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether ``node`` works number by number, on ``value`` and what was made of it alone."""
    if node.op != "call_function" or op_name(node).rstrip("_") not in _ELEMENTWISE:
        return False
    before, after = value.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    if after.shape != before.shape:
        return False
    for source in node.all_input_nodes:
        if source is value or source in inside:
            continue
        constant = source.meta.get("val")
        single = isinstance(constant, Tensor) and constant.numel() == 1
        if not (flow.is_constant(source) and single) or flow.is_written(source):
            return False
    return True


def _is_only_way(flow: Dataflow, value: fx.Node, result: fx.Node) -> bool:
    """Whether what stands between the two, and ``value``, is used for ``result`` alone."""
    if result.meta["val"].dtype != value.meta["val"].dtype:
        return False
    between = needs([value], [result])
    return all(
        user in between
        for node in (between & flow.depends_on_image) - {result}
        for user in flow.uses(node)
    )


def _computed(flow: Dataflow, value: fx.Node, result: fx.Node) -> str | None:
    """Return the activation that agrees with the graph between the two on a grid."""
    device, dtype = value.meta["val"].device, value.meta["val"].dtype
    grid = torch.cat([torch.linspace(-14, 14, 2801), torch.tensor([-100.0, 100.0])])
    x = grid.double().to(device)[None, None, None]
    try:
        (found,) = extract(flow, [value], [result])(x.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    # Half precision may be left, and come back to, in between.
    coarse = max(1e-6, torch.finfo(dtype).eps) if found.dtype != torch.float64 else 1e-6
    for name, row in ACTIVATIONS.items():
        if torch.allclose(found.double(), row.function(x), rtol=coarse, atol=coarse):
            return name
    return None
