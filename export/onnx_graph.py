"""What is done to a graph that PyTorch has written: names, an older opset, a count."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["count_operators", "lower", "name_nodes"]


def name_nodes(graph: Any) -> None:
    """Name each node by its module, as ``layers.3.depthwise/Conv``; drop what else is noted there.

    The exporter's notes hold its stack, with the paths of this machine.
    """
    used: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = scopes[-2] if len(scopes) > 1 else ""
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def lower(path: Path, opset: int, external_data: bool) -> None:
    """Write the file anew for an opset that PyTorch does not write."""
    import onnx
    from onnx import version_converter

    model = version_converter.convert_version(onnx.load(path), opset)
    for node in model.graph.node:  # the converter leaves what reductions have had since
        for attribute in [a for a in node.attribute if a.name == "noop_with_empty_axes"]:
            node.attribute.remove(attribute)
    onnx.save(
        model,
        path,
        save_as_external_data=external_data,
        location=f"{path.name}.data" if external_data else None,
    )


def count_operators(path: Path) -> dict[str, int]:
    """Return how many nodes of each kind a file has, the most frequent first."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())
