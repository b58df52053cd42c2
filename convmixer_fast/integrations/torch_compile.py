"""``torch.compile(model, backend="convmixer_fast")``: the optimized module, by Dynamo.

PyTorch finds it by its entry point, once the package is installed.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.optimize import optimize

__all__ = ["convmixer_fast"]


class _Captured(nn.Module):
    """A graph of Dynamo's, which takes parameters, images and their sizes, as a module of images.

    Args:
        graph: what was captured.
        inputs: what it takes, in order: a tensor of the model's, a dimension of the images whose
            size it is, or None for the images.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor | int | None]) -> None:
        super().__init__()
        self.graph = graph
        self._sizes: dict[int, int] = {}
        self._count = len(inputs)
        for index, value in enumerate(inputs):
            if isinstance(value, Tensor):
                self.register_buffer(f"input_{index}", value.detach(), persistent=False)
            elif value is not None:
                self._sizes[index] = value
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Map images to what the graph returns, a tuple."""
        arguments = []
        for index in range(self._count):
            size = self._sizes.get(index)
            other = getattr(self, f"input_{index}", x)
            arguments.append(other if size is None else x.shape[size])
        return self.graph(*arguments)


def convmixer_fast(
    graph: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """Compile a captured model in eval mode; the weights are those that it has now.

    Args:
        graph: what Dynamo captured.
        example_inputs: parameters, buffers and one batch of images; and its sizes, where these are
            open.
        options: of :func:`optimize`, as ``torch.compile(..., options={...})`` passes them.

    Returns:
        What runs it; its first call makes it, and raises what :func:`optimize` does.

    Raises:
        UnsupportedModelError: it takes more than images.
    """
    chosen = {**options.pop("options", {}), **options}
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    own = [_is_the_models(node, value) for node, value in zip(nodes, example_inputs, strict=True)]
    free = [index for index, is_own in enumerate(own) if not is_own]
    images = [index for index in free if isinstance(example_inputs[index], Tensor)]
    if len(images) != 1:
        raise UnsupportedModelError(
            f"expected a model of one batch of images, found {len(images)} tensors beside its "
            "parameters"
        )
    (place,) = images
    inputs: list[Tensor | int | None] = list(example_inputs)
    for index in free:
        inputs[index] = None if index == place else _dimension(nodes[index])
    captured = _Captured(graph, inputs)
    # Made at the first call: while Dynamo compiles, what it notes of our own tracing would become
    # a condition on the user's call.
    made: list[nn.Module] = []
    making = threading.Lock()

    def run(*arguments: Any) -> Any:
        images = arguments[place]
        if not made:
            with making, torch.no_grad():
                if not made:
                    made.append(optimize(captured, example_input=images, **chosen))
        return made[0](images)

    return run


def _source(node: fx.Node) -> Any:
    """Return where Dynamo took an input of the graph from."""
    return getattr(node.meta.get("grapharg"), "source", None)


def _dimension(node: fx.Node) -> int:
    dimension = getattr(_source(node), "idx", None)
    if not isinstance(dimension, int):
        raise UnsupportedModelError(
            f"expected a model of images and their sizes alone, found the input {node.name}"
        )
    return dimension


def _is_the_models(node: fx.Node, value: Any) -> bool:
    """Whether an input of the graph is a module's, and not the call's."""
    named = isinstance(value, nn.Parameter) or "'_buffers'" in repr(_source(node))
    return isinstance(value, Tensor) and named
