"""Damaged exports: ONNX files and the metadata of engines, in what reads them."""

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch

from convmixer_fast.errors import ConvMixerFastError
from convmixer_fast.export import OnnxModule, to_onnx, to_triton_server
from convmixer_fast.export.metadata import read_engine_metadata
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.fuzz.mutations import damaged

__all__ = ["check_export"]

_VALUES = (None, 0, -1, 2**40, "5", "x", [], {}, [1], ["a"], [[]], {"a": 1}, "/etc/hostname", "..")


def check_export(seed: int, folder: Path) -> str:
    """Read a damaged file that follows from the seed, as every reader of its kind does.

    Returns:
        ``"read"`` or ``"refused"``.

    Raises:
        AssertionError: something is left of what was refused, or was written elsewhere.
    """
    chance = random.Random(seed)
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    path = _damaged_onnx(made, chance) if chance.random() < 0.5 else _damaged_engine(made, chance)
    repository = made / "repository"
    try:
        if path.suffix == ".onnx":
            OnnxModule(path)(torch.zeros(1, 3, 8, 8))
        else:
            read_engine_metadata(path)
        to_triton_server(path, repository, name="model")
    except (ConvMixerFastError, OSError, ValueError, TypeError) as error:
        assert str(error)
        assert not list(repository.rglob("model.*")), "half a repository is left"
        return "refused"
    assert (repository / "model" / "config.pbtxt").is_file()
    outside = {file.name for file in made.iterdir()} - {
        path.name,
        "repository",
        f"{path.name}.json",
    }
    assert not outside, outside
    return "read"


@cache
def _good_onnx() -> bytes:
    model = randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(model, path, image_size=8, labels=["a", "b", "c", "d"], progress=False)
        return path.read_bytes()


def _damaged_onnx(folder: Path, chance: random.Random) -> Path:
    path = folder / "model.onnx"
    content = _good_onnx()
    if chance.random() < 0.5:
        path.write_bytes(damaged(content, chance))
        return path
    model = onnx.load_model_from_string(content)
    for _ in range(chance.choice((1, 2))):
        kind = chance.randrange(6)
        if kind == 0:
            del chance.choice((model.graph.input, model.graph.output))[:]
        elif kind == 1:
            model.graph.input.extend(model.graph.input[:])
        elif kind == 2 and model.graph.input:
            model.graph.input[0].type.tensor_type.elem_type = chance.choice((0, 7, 8, 15, 99))
        elif kind == 3:
            entry = model.graph.initializer[0].external_data.add()
            entry.key, entry.value = "location", str(chance.choice(_VALUES))
        elif kind == 4:
            entry = chance.choice(model.metadata_props)
            entry.value = json.dumps(chance.choice(_VALUES))
        else:
            entry = chance.choice(model.metadata_props)
            entry.value = chance.choice(("{", "", "\x00", "[" * 10**5))
    path.write_bytes(model.SerializeToString())
    return path


def _damaged_engine(folder: Path, chance: random.Random) -> Path:
    path = folder / "model.plan"
    path.write_bytes(b"engine")
    said: Any = {
        "inputs": [{"name": "images", "dtype": "float16", "shape": [-1, 3, 8, 8]}],
        "outputs": [{"name": "logits", "dtype": "float16", "shape": [-1, 4]}],
        "batches": [1, 8, 8],
        "versions": {"tensorrt": "10.13"},
    }
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        part = chance.choice((said, said["inputs"][0] if said.get("inputs") else said))
        if isinstance(part, dict) and part:
            part[chance.choice(list(part))] = chance.choice(_VALUES)
        if not isinstance(said.get("inputs"), list) or not said["inputs"]:
            break
    content = json.dumps(chance.choice((said, said, said, [], 5, [said]))).encode()
    if chance.random() < 0.3:
        content = damaged(content, chance)
    path.with_name("model.plan.json").write_bytes(content)
    return path
