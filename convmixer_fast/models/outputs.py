"""What models return: tensors in tuples, lists, dictionaries and dataclasses."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["named_tensors", "with_dictionaries"]


def with_dictionaries(
    value: Any, made: Callable[[Any, dict[str, Any]], Any] = lambda _, fields: fields
) -> Any:
    """Return ``value`` with a dictionary in the place of every dataclass.

    Args:
        value: any structure.
        made: from a dataclass and its fields, those that are None left out, to what stands for it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        given = {name: inner for name, inner in fields.items() if inner is not None}
        return made(value, {name: with_dictionaries(inner, made) for name, inner in given.items()})
    if type(value) in (list, tuple):
        return type(value)(with_dictionaries(inner, made) for inner in value)
    if type(value) is dict:
        return {key: with_dictionaries(inner, made) for key, inner in value.items()}
    return value


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors in ``value``, in order, each with its keys as a name.

    That is ``"logits"`` in ``{"logits": ...}``, ``"maps_0"`` in ``{"maps": [...]}``, ``"0"`` in a
    tuple, and empty for a tensor alone.
    """
    found, _ = pytree.tree_flatten_with_path(with_dictionaries(value))
    return [
        ("_".join(_text(key) for key in path), leaf)
        for path, leaf in found
        if isinstance(leaf, Tensor)
    ]


def _text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
