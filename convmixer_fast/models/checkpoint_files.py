"""Checkpoint files: the sets of named tensors in them, without running code that they hold.

``.safetensors``, and whatever ``torch.save`` wrote, read with ``weights_only=True``. What is
returned has been looked at: tensors are dense, not empty, and no larger than what the file holds.
"""

import argparse
import collections
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convmixer_fast.errors import CheckpointError

__all__ = ["first_line", "read_safetensors", "read_torch"]

_MOST_TENSORS = 20_000
_MOST_MAPPINGS = 1_000
_DEEPEST = 6

# What training scripts wrap around a state_dict; of several, the first is meant.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params")

# Training scripts save their options and figures beside the weights. All of these are only data.
_DATA = (
    argparse.Namespace,
    collections.defaultdict,
    pathlib.PosixPath,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    list,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the strings of the header.

    Raises:
        CheckpointError: the file is damaged, or has no tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            _check_count(path, len(names))
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    return _checked(path, tensors), metadata


def read_torch(path: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the sets of tensors that may be a model's, the likeliest first.

    Raises:
        CheckpointError: the file is damaged, holds code, or has no tensors.
    """
    try:
        with torch.serialization.safe_globals(list(_DATA)):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is no PyTorch checkpoint, or holds Python objects beside "
            "tensors, which could run code; save model.state_dict() alone, or as .safetensors "
            f"({type(error).__name__})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make the reader raise anything
        raise CheckpointError(
            f"{path}: not a whole PyTorch checkpoint ({first_line(error)})"
        ) from error
    found = False
    for mapping in _mappings(loaded):
        tensors = {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            found = True
            _check_count(path, len(tensors))
            yield tensors
    if not found:
        raise CheckpointError(
            f"{path}: expected a state_dict of tensors, found {type(loaded).__name__} without any"
        )


def first_line(error: Exception) -> str:
    """Return what an error says in its first line, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _mappings(loaded: Any) -> Iterator[Mapping[Any, Any]]:
    """Yield ``loaded`` and the mappings in it, each once, weights of an average first."""
    pending: list[tuple[int, Any]] = [(0, loaded)]
    seen: set[int] = set()
    while pending and len(seen) < _MOST_MAPPINGS:
        depth, value = pending.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if depth < _DEEPEST:
            inner = [(key, part) for key, part in value.items() if isinstance(part, Mapping)]
            inner.sort(key=lambda item: _rank(item[0]))
            pending = [(depth + 1, part) for _, part in inner] + pending


def _rank(key: object) -> tuple[bool, int]:
    name = str(key)
    known = _CONTAINERS.index(name) if name in _CONTAINERS else len(_CONTAINERS)
    return "ema" not in name.lower().split("_"), known


def _check_count(path: Path, count: int) -> None:
    if count > _MOST_TENSORS:
        raise CheckpointError(f"{path}: {count} tensors are more than any ConvMixer has")


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        raise CheckpointError(f"{path}: expected the tensors of a model, found none")
    return tensors
