"""``to_triton_server``: a model repository for NVIDIA's Triton Inference Server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer_fast.choices import ServerDevice, check_choice
from convmixer_fast.errors import ExportedFileError
from convmixer_fast.export.files import external_weights
from convmixer_fast.export.metadata import (
    metadata_path,
    read_description,
    read_engine_metadata,
)
from convmixer_fast.support.files import new_file, write_whole

__all__ = ["to_triton_server"]

_BACKENDS = {".onnx": ("onnxruntime", "model.onnx"), ".plan": ("tensorrt", "model.plan")}
"""By the file's ending: the server's backend, and what it wants the file to be called."""
# By ONNX's names and by PyTorch's.
_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "DOUBLE": "TYPE_FP64",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    data_type: str
    dims: tuple[int, ...]
    """With the batch; -1 where a size is open."""


@dataclass(frozen=True)
class _Model:
    """What a file takes and returns."""

    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    max_batch: int | None
    """None where the batch is open without an end."""
    labels: tuple[str, ...]
    weights: tuple[str, ...] = ()
    """Files beside it that hold its weights."""


def to_triton_server(
    model: str | Path,
    repository: str | Path,
    *,
    name: str = "convmixer",
    version: int = 1,
    max_batch: int | None = None,
    preferred_batches: Sequence[int] = (),
    max_delay_us: int = 500,
    instances: int = 1,
    device: ServerDevice = "auto",
    gpus: Sequence[int] = (),
    labels: Sequence[str] | None = None,
    warmup: bool = True,
) -> Path:
    """Write the folder that the server serves ``model`` from.

    ::

        repository/name/config.pbtxt
        repository/name/labels.txt
        repository/name/version/model.onnx

    Args:
        model: a file of :func:`to_onnx` (``.onnx``) or :func:`to_tensorrt` (``.plan``).
        repository: the server's ``--model-repository``; made if it is not there.
        name: of the model there.
        version: of this file. Others of the same model stay.
        max_batch: images that the server may put together; None is 64, or what an engine takes.
            A file of one fixed batch is served as it is.
        preferred_batches: sizes at which it stops waiting for more.
        max_delay_us: microseconds that a request waits for others.
        instances: copies that run at once, on each GPU.
        device: ``"gpu"``, ``"cpu"``, or ``"auto"`` for what the server has.
        gpus: numbers of the GPUs; none means all.
        labels: of the classes; None takes those in the file.
        warmup: whether the server runs one image and a full batch of zeros before it says that it
            is ready, where a file's images are of one size: first calls are slow.

    Returns:
        The model's folder.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: the version's folder has files that no export wrote.
        ValueError: an argument is none of its values.
        ExportedFileError: the file, or the metadata of the engine, is something else.
    """
    path = Path(model)
    if path.suffix not in _BACKENDS:
        raise ValueError(
            f"model must be an .onnx file or a .plan engine, which the server tells by their "
            f"ending, got {path.name}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    _check(name, version, max_batch, preferred_batches, max_delay_us, instances, device, gpus)
    found = _read_onnx(path) if path.suffix == ".onnx" else _read_engine(path)
    for tensor in (*found.inputs, *found.outputs):
        if not tensor.dims:
            raise ExportedFileError(f"{path}: {tensor.name!r} has no dimensions, not even a batch")
    batch = _max_batch(found, max_batch)
    if any(size > batch for size in preferred_batches):
        raise ValueError(
            f"preferred_batches must be at most max_batch, {batch}, got {list(preferred_batches)}"
        )
    if device == "cpu" and any(tensor.data_type == "TYPE_BF16" for tensor in found.inputs):
        raise ValueError("device='cpu' cannot serve bfloat16: ONNX Runtime has no such Conv there")
    names = tuple(labels) if labels is not None else found.labels
    classes = found.outputs[0].dims[-1] if len(found.outputs[0].dims) == 2 else -1
    if names and classes not in (-1, len(names)):
        raise ValueError(f"expected {classes} labels, one for each class, got {len(names)}")
    missing = [file for file in found.weights if not path.with_name(file).is_file()]
    if missing:
        raise FileNotFoundError(f"the weights of {path} are missing beside it: {missing}")
    backend, filename = _BACKENDS[path.suffix]
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "max_batch_size": batch,
        "input": [_tensor(tensor, batch) for tensor in found.inputs],
        "output": [
            _tensor(tensor, batch) | ({"label_filename": "labels.txt"} if names and i == 0 else {})
            for i, tensor in enumerate(found.outputs)
        ],
        "instance_group": [_instances(instances, device, gpus)],
    }
    if batch > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(preferred_batches),
            "max_queue_delay_microseconds": max_delay_us,
        }
    if warmup:
        config["model_warmup"] = _warmup(found, batch)
    folder = Path(repository) / name
    place = folder / str(version)
    earlier = _check_place(place, folder, {filename, *found.weights})
    place.mkdir(parents=True, exist_ok=True)
    # What the model needs before the model: a server may be polling.
    for file in found.weights:
        write_whole(place / file, path.with_name(file).read_bytes())
    if names:
        write_whole(folder / "labels.txt", "".join(f"{label}\n" for label in names).encode())
    write_whole(folder / "config.pbtxt", _text(config).encode())
    write_whole(place / filename, path.read_bytes())
    if not names:
        (folder / "labels.txt").unlink(missing_ok=True)
    for left in earlier - {filename, *found.weights}:
        (place / left).unlink(missing_ok=True)
    return folder


def _check_place(place: Path, folder: Path, new: set[str]) -> set[str]:
    """Return what an earlier export of this version left in its folder.

    Raises:
        FileExistsError: something else is there.
    """
    for file in (folder / "config.pbtxt", folder / "labels.txt"):
        if file.parent.is_dir():
            new_file(file)
    if not place.is_dir():
        return set()
    earlier = {filename for _, filename in _BACKENDS.values() if (place / filename).is_file()}
    for filename in tuple(earlier):
        earlier |= external_weights(place / filename)
    # What was being written when a process was killed.
    earlier |= {file.name for file in place.glob(".*.new")}
    strange = sorted({file.name for file in place.iterdir()} - earlier)
    if strange:
        raise FileExistsError(
            f"{place} is a version's folder, and has {', '.join(strange)}, which no export wrote "
            "there; move that, or export another version"
        )
    return earlier


def _check(
    name: str,
    version: int,
    max_batch: int | None,
    preferred_batches: Sequence[int],
    max_delay_us: int,
    instances: int,
    device: str,
    gpus: Sequence[int],
) -> None:
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"name must be the name of a folder, got {name!r}")
    for what, value, least in (
        ("version", version, 1),
        ("max_batch", max_batch, 1),
        ("max_delay_us", max_delay_us, 0),
        ("instances", instances, 1),
        *(("preferred_batches", size, 1) for size in preferred_batches),
        *(("gpus", number, 0) for number in gpus),
    ):
        if value is not None and value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    check_choice("device", device, ServerDevice)
    if gpus and device == "cpu":
        raise ValueError(f"device must be 'auto' or 'gpu' where gpus are given, got {device!r}")


def _max_batch(found: _Model, wanted: int | None) -> int:
    """Return the server's ``max_batch_size``: 0 where the batch is no dimension of its own."""
    if found.inputs[0].dims[0] != -1:
        return 0
    if found.max_batch is not None and wanted is not None and wanted > found.max_batch:
        raise ValueError(f"max_batch must be at most the engine's, {found.max_batch}, got {wanted}")
    return wanted or found.max_batch or 64


def _tensor(tensor: _Tensor, batch: int) -> dict[str, Any]:
    dims = list(tensor.dims[1:] if batch > 0 else tensor.dims)
    entry = {"name": tensor.name, "data_type": _Name(tensor.data_type), "dims": dims or [1]}
    # The server has no tensors without a dimension.
    return entry if dims else {**entry, "reshape": {"shape": _Name("[]")}}


def _warmup(found: _Model, batch: int) -> list[dict[str, Any]]:
    """Return requests of zeros; none where sizes are open."""
    inputs = []
    for tensor in found.inputs:
        dims = list(tensor.dims[1:] if batch > 0 else tensor.dims)
        if -1 in dims:
            return []
        zeros = {
            "data_type": _Name(tensor.data_type),
            "dims": dims or [1],
            "zero_data": _Name("true"),
        }
        inputs.append({"key": tensor.name, "value": zeros})
    return [
        {"name": f"{images} at once", "batch_size": images, "inputs": inputs}
        for images in dict.fromkeys((1, max(1, batch)))
    ]


def _instances(count: int, device: str, gpus: Sequence[int]) -> dict[str, Any]:
    kind = "gpu" if gpus else device
    return {"count": count, "kind": _Name(f"KIND_{kind.upper()}"), "gpus": list(gpus)}


def _read_onnx(path: Path) -> _Model:
    import onnx

    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's, which has no public name
        raise ExportedFileError(f"{path} is no ONNX file: {error}") from error
    if not model.graph.input or not model.graph.output:
        raise ExportedFileError(f"{path} is no ONNX model: it has no input or no output")

    def tensors(values: Sequence[Any]) -> tuple[_Tensor, ...]:
        found = []
        for value in values:
            kind = value.type.tensor_type
            dims = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
            dtype = names.get(kind.elem_type, str(kind.elem_type))
            if dtype not in _TYPES:
                raise ExportedFileError(
                    f"{value.name} is of type {dtype}, which is not supported here"
                )
            found.append(_Tensor(value.name, _TYPES[dtype], dims))
        return tuple(found)

    properties = {entry.key: entry.value for entry in model.metadata_props}
    labels = read_description(properties).labels
    return _Model(
        tensors(model.graph.input),
        tensors(model.graph.output),
        None,
        labels,
        tuple(sorted(external_weights(model))),
    )


def _read_engine(path: Path) -> _Model:
    """Read the metadata that :func:`to_tensorrt` writes beside an engine."""
    beside = metadata_path(path)
    if not beside.is_file():
        raise FileNotFoundError(f"no metadata of the engine at {beside}, where to_tensorrt puts it")
    data = read_engine_metadata(path)

    def tensors(key: str) -> tuple[_Tensor, ...]:
        return tuple(
            _Tensor(str(entry["name"]), _TYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            for entry in data[key]
        )

    try:
        labels = tuple(map(str, data.get("labels") or ()))
        found = _Model(tensors("inputs"), tensors("outputs"), int(data["batches"][2]), labels)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ExportedFileError(f"{beside} is no metadata of an engine: {error!r}") from error
    if not found.inputs or not found.outputs or found.max_batch is None or found.max_batch < 1:
        raise ExportedFileError(f"{beside}: the engine has no input, no output or no batch")
    return found


class _Name(str):
    """A name of an enumeration, which stands without quotes."""


def _text(config: dict[str, Any], indent: str = "") -> str:
    """Return ``config`` in protobuf's text format; fields that are empty are left out."""
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                lines.append(f"{indent}{key} {{\n{_text(item, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list):
            if value:
                lines.append(f"{indent}{key}: [{', '.join(map(str, value))}]\n")
        elif isinstance(value, str) and not isinstance(value, _Name):
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
        else:
            lines.append(f"{indent}{key}: {value}\n")
    return "".join(lines)
