"""What an exported file says about itself: model, versions, how its images are prepared, labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convmixer_fast._version import __version__
from convmixer_fast.errors import ExportedFileError
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.recognition.tracing import unwrap

__all__ = [
    "Description",
    "describe",
    "metadata_path",
    "preprocessing_of",
    "read_description",
    "read_engine_metadata",
    "weights_of",
]


@dataclass(frozen=True)
class Description:
    """Facts about a model that its graph does not hold."""

    model: str
    precision: str
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    """Empty where they are not known."""
    weights: str = ""
    """``"random"`` where they are known to be; else empty."""

    def of_size(self, plane: tuple[int, int]) -> "Description":
        """Return it for a file that takes images of one size alone."""
        height, width = plane
        if self.preprocessing is None or height != width:
            return self
        return replace(self, preprocessing=replace(self.preprocessing, image_size=height))

    def check_classes(self, classes: int) -> None:
        """Check that there are as many labels as classes.

        Raises:
            ValueError: there are not.
        """
        if self.labels and len(self.labels) != classes:
            raise ValueError(
                f"expected {classes} labels, one for each class, got {len(self.labels)}"
            )

    def properties(self) -> dict[str, str]:
        """Return it as ONNX's metadata, text by name."""
        found = {
            "model": self.model,
            "precision": self.precision,
            "producer": f"convmixer_fast {__version__}, torch {torch.__version__}",
        }
        if self.preprocessing is not None:
            found["preprocessing"] = json.dumps(asdict(self.preprocessing))
        if self.labels:
            found["labels"] = json.dumps(self.labels)
        if self.weights:
            found["weights"] = self.weights
        return found


def metadata_path(path: str | Path) -> Path:
    """Return where the metadata of an engine stands: beside it, with ``.json`` at the end."""
    return Path(f"{path}.json")


def read_engine_metadata(path: str | Path) -> dict[str, Any]:
    """Return what :func:`to_tensorrt` wrote beside an engine; nothing where there is no such file.

    Raises:
        ExportedFileError: it is something else.
    """
    beside = metadata_path(path)
    if not beside.is_file():
        return {}
    try:
        said = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ExportedFileError(f"{beside} is no metadata of an engine: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("versions", {}), dict):
        raise ExportedFileError(f"{beside} is no metadata of an engine: expected an object")
    return said


def _names(labels: object) -> tuple[str, ...]:
    if not isinstance(labels, list | tuple) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"labels must be a list of names, got {labels!r}")
    return tuple(labels)


def describe(
    model: nn.Module,
    precision: str,
    preprocessing: Preprocessing | None,
    labels: Sequence[str] | None,
) -> Description:
    """Describe ``model``; what is not given is taken from timm's ``pretrained_cfg``, if it has one.

    Raises:
        ValueError: ``labels`` is no list of names.
    """
    model = unwrap(model)
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names, got the text {labels!r}")
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if preprocessing is None:
        preprocessing = preprocessing_of(known)
    names = tuple(labels or known.get("label_names") or ())
    # An optimized model says what it was made from.
    name = known.get("architecture") or getattr(model, "made_from", "") or type(model).__name__
    return Description(str(name), precision, preprocessing, names, weights_of(model))


def weights_of(model: nn.Module) -> str:
    """Return ``"random"`` for a model of :func:`models.randomize.randomize`, else nothing."""
    return "random" if getattr(unwrap(model), "random_weights", False) else ""


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing | None:
    """Return what timm's ``pretrained_cfg`` says of images; None where it does not."""
    if not {"input_size", "mean", "std"} <= set(config):
        return None
    return Preprocessing(
        image_size=int(config["input_size"][-1]),
        crop_pct=float(config.get("crop_pct") or 1.0),
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
    )


def read_description(properties: Mapping[str, str]) -> Description:
    """Return what :meth:`Description.properties` wrote.

    Raises:
        ExportedFileError: it is something else.
    """
    preprocessing = None
    try:
        if "preprocessing" in properties:
            data = json.loads(properties["preprocessing"])
            data |= {name: tuple(map(float, data[name])) for name in ("mean", "std")}
            preprocessing = Preprocessing(**data)
        labels = _names(json.loads(properties.get("labels", "[]")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportedFileError(
            f"the file's metadata states its preprocessing or labels wrongly: {error!r}"
        ) from error
    model, precision = properties.get("model", ""), properties.get("precision", "")
    return Description(model, precision, preprocessing, labels, properties.get("weights", ""))
