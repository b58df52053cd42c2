"""Checkpoint file -> reference model: reads the file, the names in it and the shapes.

Files: ``.safetensors``, and whatever ``torch.save`` wrote, read with
``weights_only=True`` so that nothing in it is executed. Names: timm's (and this
package's), locuslab's ``Sequential``, the tweetable version's and labml's. The
architecture is inferred from the tensors, except the activation, which leaves no
trace in them.
"""

import argparse
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.errors import CheckpointError
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.models.published import PUBLISHED, Architecture

__all__ = ["Checkpoint", "build", "load", "read_checkpoint"]

_log = logging.getLogger(__name__)

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_CONV = r"(weight|bias)"

# Each family of names as patterns and what they are called here. {i} is the layer; in a
# Sequential that holds stem and layers in one row, the row's index less the stem's length.
_FAMILIES: dict[str, tuple[int, dict[str, str]]] = {
    "timm": (
        0,
        {
            rf"stem\.0\.{_CONV}": r"stem.0.\1",
            rf"stem\.2\.{_NORM}": r"stem.2.\1",
            rf"blocks\.(\d+)\.0\.fn\.0\.{_CONV}": r"blocks.{i}.0.fn.0.\2",
            rf"blocks\.(\d+)\.0\.fn\.2\.{_NORM}": r"blocks.{i}.0.fn.2.\2",
            rf"blocks\.(\d+)\.1\.{_CONV}": r"blocks.{i}.1.\2",
            rf"blocks\.(\d+)\.3\.{_NORM}": r"blocks.{i}.3.\2",
            rf"head\.{_CONV}": r"head.\1",
        },
    ),
    "locuslab": (
        3,
        {
            rf"0\.{_CONV}": r"stem.0.\1",
            rf"2\.{_NORM}": r"stem.2.\1",
            rf"(\d+)\.0\.fn\.0\.{_CONV}": r"blocks.{i}.0.fn.0.\2",
            rf"(\d+)\.0\.fn\.2\.{_NORM}": r"blocks.{i}.0.fn.2.\2",
            rf"(\d+)\.1\.{_CONV}": r"blocks.{i}.1.\2",
            rf"(\d+)\.3\.{_NORM}": r"blocks.{i}.3.\2",
            rf"\d+\.{_CONV}": r"head.\1",
        },
    ),
    "tweetable": (
        1,
        {
            rf"0\.0\.{_CONV}": r"stem.0.\1",
            rf"0\.2\.{_NORM}": r"stem.2.\1",
            rf"(\d+)\.0\.0\.0\.{_CONV}": r"blocks.{i}.0.fn.0.\2",
            rf"(\d+)\.0\.0\.2\.{_NORM}": r"blocks.{i}.0.fn.2.\2",
            rf"(\d+)\.1\.0\.{_CONV}": r"blocks.{i}.1.\2",
            rf"(\d+)\.1\.2\.{_NORM}": r"blocks.{i}.3.\2",
            rf"\d+\.{_CONV}": r"head.\1",
        },
    ),
    "labml": (
        0,
        {
            rf"patch_emb\.conv\.{_CONV}": r"stem.0.\1",
            rf"patch_emb\.norm\.{_NORM}": r"stem.2.\1",
            rf"conv_mixer_layers\.(\d+)\.depth_wise_conv\.{_CONV}": r"blocks.{i}.0.fn.0.\2",
            rf"conv_mixer_layers\.(\d+)\.norm1\.{_NORM}": r"blocks.{i}.0.fn.2.\2",
            rf"conv_mixer_layers\.(\d+)\.point_wise_conv\.{_CONV}": r"blocks.{i}.1.\2",
            rf"conv_mixer_layers\.(\d+)\.norm2\.{_NORM}": r"blocks.{i}.3.\2",
            rf"classification\.linear\.{_CONV}": r"head.\1",
        },
    ),
}

# What training scripts wrap around a state_dict, outermost first.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file, in this package's names."""

    tensors: dict[str, Tensor]
    architecture: Architecture
    """What is known of the model; ``activation`` is empty where that is not."""
    metadata: Mapping[str, str]
    """The header's strings of a safetensors file."""


def load(
    path: str | Path, *, activation: str | None = None, global_pool: str | None = None
) -> ConvMixer:
    """Load a trained ConvMixer from a checkpoint file into the reference model.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote (``.pth``,
            ``.pth.tar``, ``.pt``): a state_dict, or a training checkpoint that holds one.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``. Not needed for the published
            architectures (:data:`published.PUBLISHED`), nor for safetensors files whose
            metadata has ``activation``; weights do not show it.
        global_pool: one of :data:`model.POOLS`; None is average pooling, or ``"catavgmax"``
            where the head takes two features a channel.

    Returns:
        The model, on the CPU, in eval mode, in the dtype of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code, or is no ConvMixer's.
        ValueError: the activation is not known and must be given, or a name is unknown.
    """
    checkpoint = read_checkpoint(path)
    return build(checkpoint, path, activation=activation, global_pool=global_pool)


def build(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    activation: str | None = None,
    global_pool: str | None = None,
) -> ConvMixer:
    """Build the reference model of what :func:`read_checkpoint` read; see :func:`load`.

    Raises:
        CheckpointError: the tensors do not make a ConvMixer.
        ValueError: the activation is not known and must be given, or a name is unknown.
    """
    known = ", ".join(map(repr, ACTIVATIONS))
    activation = activation or checkpoint.architecture.activation
    if not activation:
        raise ValueError(
            f"{path}: the activation of this ConvMixer ({_describe(checkpoint.architecture)}) "
            f"cannot be read from its weights; pass activation= (one of {known})"
        )
    known_activation = checkpoint.architecture.activation
    if known_activation and activation != known_activation:
        _log.warning(
            "%s: the activation is %s, as asked, although the checkpoint's is %s",
            path,
            activation,
            known_activation,
        )
    architecture = replace(checkpoint.architecture, activation=activation)
    if global_pool is not None:
        architecture = replace(architecture, global_pool=global_pool)
    model = architecture.build().to(checkpoint.tensors["stem.0.weight"].dtype)
    try:
        model.load_state_dict({**_defaults(model, checkpoint.tensors), **checkpoint.tensors})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the weights of a ConvMixer: {reason}") from error
    return model


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file's tensors under this package's names, and what they show of the model.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code, or is no ConvMixer's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    raw, metadata = (
        _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    )
    tensors = _rename(path, _strip(raw))
    shapes = _infer(path, tensors)
    activation = metadata.get("activation") or _published_activation(path, shapes)
    if activation and activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: its metadata names an unknown activation {activation!r}")
    return Checkpoint(tensors, replace(shapes, activation=activation), metadata)


def _published_activation(path: Path, shapes: Architecture) -> str:
    for name, architecture in PUBLISHED.items():
        if replace(architecture, activation="") == shapes:
            _log.info("%s: has the shape of %s, so %s", path, name, architecture.activation)
            return architecture.activation
    return ""


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (no iterator)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Training scripts save their options, an argparse.Namespace, which is only data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is no PyTorch checkpoint, or holds Python objects beside "
            "tensors, which could run code; save model.state_dict() alone, or as .safetensors "
            f"({type(error).__name__})"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a whole PyTorch checkpoint ({_first_line(error)})"
        ) from error
    return _state_dict(path, loaded)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[c] for c in _CONTAINERS if isinstance(loaded.get(c), Mapping)), None)
        if inner is None:
            tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
            break
        loaded = inner
    raise CheckpointError(
        f"{path}: expected a state_dict of tensors, found {type(loaded).__name__} without any"
    )


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put before every name."""
    while True:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _rename(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    closest: tuple[int, str, list[str]] = (-1, "", [])
    for family, (offset, patterns) in _FAMILIES.items():
        renamed = {}
        for name, tensor in tensors.items():
            for pattern, template in patterns.items():
                match = re.fullmatch(pattern, name)
                if match is not None:
                    layer = int(match[1]) - offset if "{i}" in template else 0
                    renamed[match.expand(template.replace("{i}", str(layer)))] = tensor
                    break
        if len(renamed) == len(tensors):
            return renamed
        if len(renamed) > closest[0]:
            unknown = [n for n in tensors if not any(re.fullmatch(p, n) for p in patterns)]
            closest = (len(renamed), family, unknown)
    _, family, unknown = closest
    raise CheckpointError(
        f"{path}: not a ConvMixer's tensors: expected the names of timm, locuslab, the tweetable "
        f"version or labml; compared with {family}'s, {len(unknown)} of {len(tensors)} do not "
        f"belong, the first {unknown[0]!r}"
        if unknown
        else f"{path}: several of its tensors have one meaning"
    )


def _infer(path: Path, tensors: dict[str, Tensor]) -> Architecture:
    def shape(name: str, dims: int) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(f"{path}: not a ConvMixer's tensors: {name} is missing")
        if tensors[name].dim() != dims:
            raise CheckpointError(
                f"{path}: not a ConvMixer's tensors: {name} has the shape "
                f"{tuple(tensors[name].shape)}, expected {dims} dimensions"
            )
        return tensors[name].shape

    dim, in_chans, patch, patch_w = shape("stem.0.weight", 4)
    dtype = tensors["stem.0.weight"].dtype
    if not dtype.is_floating_point:
        raise CheckpointError(f"{path}: expected floating-point weights, found {dtype}")
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if layers != set(range(len(layers))) or not layers:
        raise CheckpointError(
            f"{path}: not a ConvMixer's tensors: expected layers 0, 1, 2 ..., "
            f"found {sorted(layers)}"
        )
    kernel = shape("blocks.0.0.fn.0.weight", 4)[3]
    if patch != patch_w:
        raise CheckpointError(f"{path}: expected square patches, found {patch} x {patch_w}")
    if "head.weight" not in tensors:
        return Architecture(dim, len(layers), kernel, patch, "", in_chans, 0)
    classes, features = shape("head.weight", 2)
    pool = "catavgmax" if features == 2 * dim else "avg"
    return Architecture(dim, len(layers), kernel, patch, "", in_chans, classes, pool)


def _defaults(model: ConvMixer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model trained without biases or affine parameters leaves out.

    That is taken for a choice only where every layer leaves it out.
    """

    def kind(name: str) -> str:
        return re.sub(r"^blocks\.\d+\.", "blocks.*.", name)

    present = {kind(name) for name in tensors}
    optional = {}
    for name, tensor in model.state_dict().items():
        if kind(name) in present:
            continue
        if name.endswith(("bias", "num_batches_tracked")):
            optional[name] = torch.zeros_like(tensor)
        elif name.endswith("weight") and tensor.dim() == 1:
            optional[name] = torch.ones_like(tensor)
    return optional


def _describe(shapes: Architecture) -> str:
    return (
        f"dim {shapes.dim}, depth {shapes.depth}, kernel {shapes.kernel_size}, "
        f"patch {shapes.patch_size}, {shapes.num_classes} classes"
    )
