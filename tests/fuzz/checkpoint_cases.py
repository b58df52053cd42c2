"""Damaged, absurd and malicious checkpoints: ``load`` reads them or says why not, and runs nothing.

Half of them are damaged bytes of good files; the others are whole files of tensors that no
ConvMixer has.
"""

import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from convmixer_fast import CheckpointError, load
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.fuzz.mutations import damaged
from tests.zoo import locuslab

__all__ = ["check_checkpoint", "good_files"]


class _Marks:
    """Makes a folder where it is unpickled as Python would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


def check_checkpoint(seed: int, folder: Path) -> str:
    """Load a file that follows from the seed.

    Returns:
        ``"read"`` or ``"refused"``.

    Raises:
        AssertionError: something in it was run.
    """
    chance = random.Random(seed)
    marker = folder / "executed"
    if chance.random() < 0.5:
        suffix, content = chance.choice(good_files())
        content = damaged(content, chance)
    else:
        suffix, content = _absurd(chance, marker)
        if chance.random() < 0.2:
            content = damaged(content, chance)
    path = folder / f"checkpoint{suffix}"
    path.write_bytes(content)
    try:
        load(path, activation=chance.choice((None, "gelu")))
        outcome = "read"
    except CheckpointError as error:
        assert str(path) in str(error)
        outcome = "refused"
    except ValueError as error:
        assert "activation" in str(error), error  # the file does not tell, as is documented
        outcome = "refused"
    assert not marker.exists(), "code was run"
    return outcome


@cache
def good_files() -> list[tuple[str, bytes]]:
    tensors = randomize(Architecture(8, 2, 3, 2, "relu", 3, 4).build()).state_dict()
    foreign = locuslab(8, 2, 3, 2).state_dict()
    metadata = {"activation": "relu", "image_size": "16", "mean": "[0.5]", "labels": '["a"]'}
    return [
        (".safetensors", safetensors_bytes(tensors, metadata)),
        (".safetensors", safetensors_bytes(foreign)),
        (".pth", _torch_bytes(tensors)),
        (".pth", _torch_bytes({"epoch": 3, "state_dict": foreign, "optimizer": {"lr": 0.1}})),
        (".pt", _torch_bytes(tensors, _use_new_zipfile_serialization=False)),
    ]


def _torch_bytes(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _absurd(chance: random.Random, marker: Path) -> tuple[str, bytes]:
    tensors: dict[Any, Any] = dict(
        randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build()).state_dict()
    )
    if chance.random() < 0.35:
        return ".safetensors", _absurd_header(tensors, chance)
    for _ in range(chance.choice((1, 1, 2, 5))):
        name = chance.choice(list(tensors))
        chance.choice(_CHANGES)(tensors, name, chance, marker)
    content: Any = tensors
    for _ in range(chance.choice((0, 0, 1, 3, 30))):
        content = {chance.choice(("state_dict", "model", "ema", "x")): content}
    if chance.random() < 0.05 and isinstance(content, dict):
        content["itself"] = content
    try:
        return ".pth", _torch_bytes(content)
    except (RuntimeError, NotImplementedError, TypeError):
        return ".pth", pickle.dumps(_Marks(marker))  # such a tensor cannot be saved


def _absurd_header(tensors: dict[Any, Tensor], chance: random.Random) -> bytes:
    """Return a safetensors file whose header lies."""
    content = safetensors_bytes(tensors)
    (length,) = struct.unpack("<Q", content[:8])
    header: Any = json.loads(content[8 : 8 + length])
    entry = header[chance.choice(list(header))]
    kind = chance.randrange(7)
    if kind == 0:
        entry["shape"] = [chance.choice(_SHAPES) for _ in range(chance.randrange(6))]
    elif kind == 1:
        entry["dtype"] = chance.choice(("I64", "F8_E4M3", "BOOL", "C64", "nothing", 5))
    elif kind == 2:
        entry["data_offsets"] = [chance.choice(_SHAPES), chance.choice(_SHAPES)]
    elif kind == 3:
        header["__metadata__"] = chance.choice(({"activation": 5}, ["x"], {"activation": "mish"}))
    elif kind == 4:
        header = chance.choice(([], 5, {}, {"x": header}))
    elif kind == 5:
        header |= {f"more.{i}": entry for i in range(chance.choice((3, 3000)))}
    else:
        header["deep"] = json.loads("[" * 900 + "]" * 900)
    said = json.dumps(header).encode()
    size = len(said) if chance.random() < 0.8 else chance.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", size) + said + content[8 + length :]


_SHAPES = (0, 1, 2, 3, 7, 8, 5001, 10**7, 2**31, 2**40, 2**62, -1)
_Change = Callable[[dict[Any, Any], str, random.Random, Path], None]


def _other_tensor(tensors: dict[Any, Any], name: str, chance: random.Random, _: Path) -> None:
    def shape() -> list[int]:
        return [chance.choice((0, 1, 2, 3, 7, 8, 9)) for _ in range(chance.randrange(6))]

    tensors[name] = chance.choice(
        (
            lambda: torch.zeros(shape()),
            lambda: torch.zeros(1).expand(10**7, 3, 4, 4),
            lambda: torch.zeros(10**7, 0),
            lambda: torch.zeros(0, 0, 0, 5001),
            lambda: torch.zeros(shape(), dtype=torch.complex64),
            lambda: torch.zeros(shape(), dtype=chance.choice((torch.int64, torch.bool))),
            lambda: torch.full((8,), float("nan")),
            lambda: torch.eye(8).to_sparse(),
            lambda: torch.zeros(8, device="meta"),
            lambda: torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.qint8),
            lambda: torch.zeros(16)[::2],
        )
    )()


def _no_tensor(tensors: dict[Any, Any], name: str, chance: random.Random, marker: Path) -> None:
    tensors[name] = chance.choice((None, 5, "text", [1, 2], {"a": {}}, b"", _Marks(marker)))


def _renamed(tensors: dict[Any, Any], name: str, chance: random.Random, _: Path) -> None:
    new = chance.choice((5, None, "", ".", "a" * 10**5, f"module.{name}", f"{name}.{name}", ("t",)))
    tensors[new] = tensors.pop(name)


def _missing(tensors: dict[Any, Any], name: str, *_: Any) -> None:
    if len(tensors) > 1:
        del tensors[name]


def _doubled(tensors: dict[Any, Any], name: str, chance: random.Random, _: Path) -> None:
    tensors[f"{chance.choice(('module', 'ema', '1'))}.{name}"] = tensors[name]


def _grown(tensors: dict[Any, Any], name: str, chance: random.Random, _: Path) -> None:
    tensor = tensors[name]
    # One that is expanded would become a file of gigabytes, which may take gigabytes to read.
    whole = (
        isinstance(tensor, Tensor) and tensor.layout == torch.strided and 0 not in tensor.stride()
    )
    if whole and tensor.dim():
        tensors[name] = tensor.repeat_interleave(2, chance.randrange(tensor.dim()))


_CHANGES: tuple[_Change, ...] = (
    _other_tensor, _other_tensor, _no_tensor, _renamed, _missing, _doubled, _grown,
)  # fmt: skip
