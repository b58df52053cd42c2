"""Where an ONNX file has its weights, if they are files of their own."""

from pathlib import Path
from typing import Any

from convmixer_fast.errors import ExportedFileError

__all__ = ["external_weights", "weights_beside"]


def weights_beside(path: Path) -> Path:
    """Return where an ONNX file has its weights, if they are a file of their own."""
    return path.with_name(f"{path.name}.data")


def external_weights(model: Any) -> set[str]:
    """Return the names of the files in which an ONNX model has weights.

    Args:
        model: a ``ModelProto``, or the path of a file; of what is no ONNX file there are none.

    Raises:
        ExportedFileError: they are not beside it.
    """
    if isinstance(model, Path):
        import onnx

        try:
            model = onnx.load(model, load_external_data=False)
        except Exception:  # protobuf's, which has no public name; or there is no such file
            return set()
    found = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    # A path would lead out of the folder, to files that are no part of the model.
    outside = sorted(name for name in found if name in ("", "..") or Path(name).name != name)
    if outside:
        raise ExportedFileError(
            f"expected an ONNX file whose weights are beside it, found weights at {outside}"
        )
    return found
