"""Checkpoint file -> reference model: the shapes of its tensors say what it is.

:mod:`checkpoint_files` reads the file, :mod:`tensor_names` the names in it: timm's (and this
package's), locuslab's ``Sequential``, the tweetable version's, labml's and mmpretrain's. The
architecture is inferred from the tensors, except the activation, which leaves no trace in them.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.choices import ActivationName
from convmixer_fast.errors import CheckpointError
from convmixer_fast.models.checkpoint_files import read_safetensors, read_torch
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.models.hub import (
    CONFIG,
    WEIGHTS,
    fetch,
    hub_repository,
    metadata_of,
)
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.tensor_names import Named, renamed

__all__ = ["Checkpoint", "build", "is_checkpoint", "load", "read_checkpoint"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file, in this package's names."""

    tensors: dict[str, Tensor]
    architecture: Architecture
    """What is known of the model; ``activation`` is empty where that is not."""
    metadata: Mapping[str, str]
    """The header's strings of a safetensors file."""


def load(
    path: str | Path,
    *,
    activation: ActivationName | None = None,
    global_pool: str | None = None,
) -> ConvMixer:
    """Load a trained ConvMixer from a checkpoint file into the reference model.

    Args:
        path: a name on the Hugging Face hub, ``"hf-hub:timm/convmixer_768_32.in1k"``, whose
            cache, token and offline mode are huggingface_hub's; a ``.safetensors`` file, or one
            that ``torch.save`` wrote (``.pth``, ``.pth.tar``, ``.pt``): a state_dict, or a training
            checkpoint that holds one, by whatever name (of several an exponential average), under
            whatever prefix, with whatever else beside it. What is left out is said through logging.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``. Not needed for the published
            architectures (:data:`published.PUBLISHED`), nor for safetensors files whose
            metadata has ``activation``; weights do not show it.
        global_pool: one of :data:`model.POOLS`; None is average pooling, or ``"catavgmax"``
            where the head takes two features a channel.

    Returns:
        The model, on the CPU, in eval mode, in the dtype of the file. It takes about as much memory
        as the tensors in the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code, or is no ConvMixer's; or it is not in the
            hub's cache, and the hub has none or cannot be reached.
        MissingDependencyError: huggingface_hub is needed and not installed.
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
    with torch.device("meta"):  # takes no memory: only shapes that the file has are ever held
        model = architecture.build()
    tensors = {**_defaults(model, checkpoint.tensors), **checkpoint.tensors}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the weights of a ConvMixer: {reason}") from error
    return model.to(checkpoint.tensors["stem.0.weight"].dtype)


def is_checkpoint(name: str | Path) -> bool:
    """Whether a name is that of a file or of a model on the hub, and no architecture's."""
    return hub_repository(name) is not None or Path(name).is_file()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file's tensors under this package's names, and what they show of the model.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds code, or is no ConvMixer's; or see :func:`load`.
    """
    repository = hub_repository(path)
    if repository is not None:
        said = metadata_of(fetch(repository, CONFIG), repository)
        found = read_checkpoint(fetch(repository, *WEIGHTS))
        # What the file itself says is nearer to its weights.
        known = found.architecture.activation or said.get("activation", "")
        architecture = replace(found.architecture, activation=known)
        return replace(found, architecture=architecture, metadata={**said, **found.metadata})
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        named = renamed(path, tensors)
    else:
        named, metadata = _first_convmixer(path), {}
    for name, tensor in named.tensors.items():
        _check_tensor(path, name, tensor)
    shapes = _infer(path, named.tensors)
    activation = metadata.get("activation") or _published_activation(path, shapes)
    if activation and activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: its metadata names an unknown activation {activation!r}")
    return Checkpoint(named.tensors, replace(shapes, activation=activation), metadata)


def _published_activation(path: Path, shapes: Architecture) -> str:
    for name, architecture in PUBLISHED.items():
        if replace(architecture, activation="") == shapes:
            _log.info("%s: has the shape of %s, so %s", path, name, architecture.activation)
            return architecture.activation
    return ""


def _first_convmixer(path: Path) -> Named:
    """Return the likeliest ConvMixer of a file, or say what its largest set is instead."""
    failure: tuple[int, CheckpointError] | None = None
    for tensors in read_torch(path):
        try:
            return renamed(path, tensors)
        except CheckpointError as error:
            if failure is None or len(tensors) > failure[0]:
                failure = len(tensors), error
    assert failure is not None  # else read_torch would have raised
    raise failure[1]


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Check that a tensor is what it seems, so that no small file makes a large model."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    if not dense or type(tensor) is not Tensor:
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout} {type(tensor).__name__}"
        raise CheckpointError(f"{path}: {name}: expected a dense tensor, found a {kind} one")
    if tensor.numel() == 0:
        raise CheckpointError(f"{path}: {name}: its shape {tuple(tensor.shape)} is empty")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(
            f"{path}: {name}: its shape {tuple(tensor.shape)} is larger than what the file holds"
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
            optional[name] = torch.zeros_like(tensor, device="cpu")
        elif name.endswith("weight") and tensor.dim() == 1:
            optional[name] = torch.ones_like(tensor, device="cpu")
    return optional


def _describe(shapes: Architecture) -> str:
    return (
        f"dim {shapes.dim}, depth {shapes.depth}, kernel {shapes.kernel_size}, "
        f"patch {shapes.patch_size}, {shapes.num_classes} classes"
    )
