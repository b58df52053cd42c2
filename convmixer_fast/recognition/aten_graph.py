"""Reading and cutting the ATen graph of an exported program.

:class:`Dataflow` answers who produces and who consumes a value, looking through
operations that change nothing in eval mode; :func:`extract` makes a module of the
part of the graph between two values.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.recognition.outputs import WRAPPED

__all__ = [
    "ONE_TENSOR",
    "Dataflow",
    "SourceGraph",
    "ancestors",
    "arguments",
    "extract",
    "needs",
    "op_name",
    "refuse",
    "where",
]

ONE_TENSOR = pytree.tree_structure(0)
"""The structure of a result that is a single tensor."""

_DROPOUTS = frozenset(
    (
        "dropout",
        "dropout_",
        "feature_dropout",
        "feature_dropout_",
        "alpha_dropout",
        "alpha_dropout_",
    )
)
_COPIES = frozenset(("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "_to_copy", "to"))


def op_name(node: fx.Node) -> str:
    """Return the ATen operation's name without overload, such as ``"conv2d"``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::")
    return str(getattr(node.target, "__name__", node.target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen call by their names in its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def where(node: fx.Node) -> str:
    """Return the name of the submodule that ``node`` came from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if isinstance(path, str)]
    # Exported names of the modules of a Sequential can carry torch.export's own prefix.
    path = paths[-1].removeprefix("L['self'].") if paths else ""
    path = path.removeprefix(WRAPPED).removeprefix(".")
    return path or "the model's forward"


def refuse(place: str, expected: str, found: str, remedy: str = "") -> NoReturn:
    """Raise the ``UnsupportedModelError`` of a place that differs from a ConvMixer."""
    raise UnsupportedModelError(
        f"{place}: expected {expected}, found {found}" + (f"; {remedy}" if remedy else "")
    )


class Dataflow:
    """Producers, consumers and constants in the graph of ``program``."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        signature = program.graph_signature
        self._names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._constants: dict[fx.Node, Any] = {}
        self.image = next(n for n in self.nodes if n.name in signature.user_inputs)
        self.depends_on_image = self._reach(self.image)

    def _reach(self, start: fx.Node) -> set[fx.Node]:
        reached = {start}
        for node in self.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def is_identity(self, node: fx.Node) -> bool:
        """Whether ``node`` passes its first input on unchanged (dropout in eval mode, a copy)."""
        name = op_name(node) if node.op == "call_function" else ""
        if name in _DROPOUTS:
            return arguments(node)["train"] is False
        if name == "slice":  # x[:, :, 0] has two that leave nothing out
            given = arguments(node)
            whole = given["end"] is None or given["end"] == 2**63 - 1
            return whole and not given["start"] and given["step"] == 1
        if name in _COPIES and isinstance(node.args[0], fx.Node):
            before, after = node.args[0].meta.get("val"), node.meta.get("val")
            return (
                isinstance(before, Tensor)
                and isinstance(after, Tensor)
                and (before.dtype, before.device) == (after.dtype, after.device)
            )
        return False

    def source(self, node: Any) -> Any:
        """Follow identities from ``node`` back to what produced its value."""
        while isinstance(node, fx.Node) and self.is_identity(node):
            node = node.args[0]
        return node

    def uses(self, node: fx.Node) -> list[fx.Node]:
        """List what uses the value of ``node``, and not just its shape or dtype."""
        return [u for u in node.users if op_name(u) not in ("sym_size", "_assert_tensor_metadata")]

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """List what uses the value of ``node``, through identities, in the graph's order."""
        found: list[fx.Node] = []
        for user in self.uses(node):
            found.extend(self.consumers(user) if self.is_identity(user) else [user])
        return sorted(dict.fromkeys(found), key=self.order.__getitem__)

    def parameter(self, node: fx.Node) -> Tensor | None:
        """Return the tensor behind a placeholder, or None where ``node`` is not one."""
        name = self._names.get(node.name)
        if node.op != "placeholder" or name is None:
            return None
        state = self.program.state_dict
        value = state[name] if name in state else self.program.constants[name]
        assert isinstance(value, Tensor)
        return value.detach()

    def constant(self, node: Any) -> Any:
        """Evaluate ``node``, which must not depend on the image."""
        if not isinstance(node, fx.Node):
            return node
        assert node not in self.depends_on_image
        if node not in self._constants:
            value: Any = self.parameter(node)
            if value is None:
                args = fx.map_arg(node.args, self.constant)
                kwargs = fx.map_arg(node.kwargs, self.constant)
                with torch.no_grad():
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
            self._constants[node] = value
        return self._constants[node]

    def is_written(self, node: Any) -> bool:
        """Whether the constant ``node`` is made of something that the model writes into."""
        if not isinstance(node, fx.Node):
            return False
        sources = ancestors(node)
        return any(
            not sources.isdisjoint(ancestors(write.args[0]))
            for write in self.writes(0, len(self.nodes))
            if write.args[0] not in self.depends_on_image
        )

    def writes(self, start: int, stop: int) -> list[fx.Node]:
        """List the nodes from position ``start`` to ``stop`` that write into their first input."""
        return [node for node in self.nodes[start:stop] if _is_write(node)]

    def is_constant(self, node: Any) -> bool:
        """Whether ``node`` can be evaluated without an image."""
        return not isinstance(node, fx.Node) or node not in self.depends_on_image


def _is_write(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def ancestors(node: Any) -> set[fx.Node]:
    """Return ``node`` and everything that it is computed from."""
    found: set[fx.Node] = set()
    pending = [node] if isinstance(node, fx.Node) else []
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found


class SourceGraph(nn.Module):
    """A part of a source model's graph, with its own copy of the tensors that it uses.

    ``forward`` takes the graph's inputs in order. It returns a tuple of its outputs, or
    where a structure is given (tensor, tuple, dictionary ...) what the source returns.
    """

    def __init__(self, graph: fx.GraphModule, structure: pytree.TreeSpec | None) -> None:
        super().__init__()
        self.graph = graph
        self.structure = structure

    def __deepcopy__(self, memo: dict[int, Any]) -> "SourceGraph":
        # The structure is shared: it never changes, and PyTorch warns where it is copied.
        copied = SourceGraph(copy.deepcopy(self.graph, memo), self.structure)
        memo[id(self)] = copied
        return copied.train(self.training)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        outputs = self.graph(*inputs)
        if self.structure is None:
            return outputs
        return pytree.tree_unflatten(outputs, self.structure)


def extract(
    flow: Dataflow,
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    writes: Sequence[fx.Node] = (),
    structure: pytree.TreeSpec | None = None,
) -> SourceGraph:
    """Cut the computation of ``outputs`` from ``inputs`` out of the graph, as a module of its own.

    Args:
        flow: the graph.
        inputs: the values that the module takes.
        outputs: the values, or constants, that it returns.
        writes: nodes that write into values and count even where nothing uses their result.
        structure: how the outputs are put together; None returns them as a tuple.
    """
    needed = needs(inputs, [*outputs, *writes])
    graph = fx.Graph()
    root = nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{index}")
    for node in flow.nodes:
        if node not in needed or node in copies:
            continue
        value = flow.parameter(node)
        if value is not None:
            root.register_buffer(node.name, value.clone())
            copies[node] = graph.get_attr(node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            # Shapes and stack traces of the trace would keep its fake tensors alive.
            copies[node].meta = {}
    graph.output(fx.map_arg(tuple(outputs), copies.__getitem__))
    return SourceGraph(fx.GraphModule(root, graph), structure)


def needs(inputs: Iterable[fx.Node], outputs: Iterable[Any]) -> set[fx.Node]:
    """Return the nodes that ``outputs`` are computed with, back to ``inputs``, both included."""
    known = set(inputs)
    found: set[fx.Node] = set()
    pending = [node for node in outputs if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in known:
                pending += node.all_input_nodes
    return found
