"""Files that exports write: in the place of nothing else than an earlier export's."""

import os
import threading
from pathlib import Path
from typing import Any

from convmixer_fast.errors import ExportedFileError

__all__ = ["external_weights", "new_file", "weights_beside", "write_whole"]


def new_file(path: str | Path) -> Path:
    """Return the path of a file to be written.

    A regular file there is replaced, and of a symbolic link the link, not what it points to.

    Raises:
        FileNotFoundError: there is no folder for it.
        IsADirectoryError: it is a folder itself.
        FileExistsError: it is a device, a pipe or a socket.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    if path.is_symlink():
        return path
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to write")
    if path.exists() and not path.is_file():
        raise FileExistsError(
            f"{path} is a device, a pipe or a socket, which a file would take the place of; name "
            "a file"
        )
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once: whoever reads it meanwhile finds the old one, or the new one.

    Where that fails, on a full disk say, the old one stays, and nothing else is left.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        new.write_bytes(content)
        new.replace(new_file(path))
    finally:
        new.unlink(missing_ok=True)


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
