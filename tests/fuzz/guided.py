"""Coverage-guided fuzzing of what reads files from outside, by atheris (libFuzzer for Python).

``python -m tests.fuzz.guided checkpoint FOLDER -max_total_time=60``: options are libFuzzer's.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["convmixer_fast", "safetensors", "PIL"]):
    from convmixer_fast import CheckpointError, load
    from convmixer_fast.models.images import load_image
    from convmixer_fast.models.preprocessing import Preprocessing

from tests.fuzz import checkpoint_cases, image_cases

FOLDER = Path(tempfile.mkdtemp(prefix="convmixer_fast_fuzz_"))


def read_checkpoint(data: bytes) -> None:
    path = FOLDER / ("x.safetensors" if data[:1] > b"\x80" else "x.pth")
    path.write_bytes(data[1:])
    try:
        load(path, activation="gelu")
    except CheckpointError:
        return


def read_image(data: bytes) -> None:
    path = FOLDER / "x.png"
    path.write_bytes(data)
    try:
        load_image(path, Preprocessing(16, 0.9, (0.5,), (0.5,)))
    except OSError:
        return


def seeds(target: str) -> list[bytes]:
    """Return good files to begin with."""
    if target == "image":
        return image_cases.good_files()
    first = {".safetensors": b"\xff", ".pth": b"\0", ".pt": b"\0"}
    return [first[suffix] + content for suffix, content in checkpoint_cases.good_files()]


TARGETS: dict[str, Callable[[bytes], None]] = {"checkpoint": read_checkpoint, "image": read_image}


def main() -> None:
    target, corpus, *options = sys.argv[1:]
    for index, content in enumerate(seeds(target)):
        (Path(corpus) / f"seed{index}").write_bytes(content)
    atheris.Setup([sys.argv[0], corpus, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
