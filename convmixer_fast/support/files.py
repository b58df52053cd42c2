"""Files that are written: in the place of nothing but a file, whole or not at all."""

import os
import threading
from pathlib import Path

__all__ = ["new_file", "write_whole"]


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

    Where that fails, on a full disk or by Ctrl-C, the old one stays, and nothing else is left.
    Several threads and processes may write the same one.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        new.write_bytes(content)
        new.replace(new_file(path))
    finally:
        new.unlink(missing_ok=True)
