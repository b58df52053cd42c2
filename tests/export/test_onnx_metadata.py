"""What an ONNX file says about itself."""

import collections
import json

import pytest
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnx

from convmixer_fast.export import to_onnx
from convmixer_fast.models.preprocessing import Preprocessing
from tests.export.onnx_cases import model_of


def test_metadata(tmp_path):
    model = model_of()
    model.pretrained_cfg = {
        "architecture": "convmixer_24_2",
        "input_size": (3, 16, 16),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.9,
    }
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, labels=list("abcdefg"))
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found["model"] == "convmixer_24_2"
    assert json.loads(found["labels"]) == list("abcdefg")
    assert json.loads(found["preprocessing"])["std"] == [0.4, 0.5, 0.6]
    assert found["producer"].startswith("convmixer_fast ")
    given = Preprocessing(image_size=16, mean=(0.5,), std=(0.25,))
    to_onnx(model, path, image_size=16, preprocessing=given)
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(found["preprocessing"])["mean"] == [0.5]
    for wrapped in (model, nn.Sequential(nn.Identity(), model)):
        with pytest.raises(ValueError, match="expected 7 labels, one for each class, got 2"):
            to_onnx(wrapped, path, image_size=16, labels=["a", "b"])
    with pytest.raises(ValueError, match="labels must be a list of names"):
        to_onnx(model, path, image_size=16, labels="abcdefg")
    to_onnx(nn.DataParallel(model), path, image_size=20)
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found["model"] == "convmixer_24_2"
    assert json.loads(found["preprocessing"])["image_size"] == 20  # what the file takes


def test_nodes_are_named_by_their_modules_and_tell_nothing_else(tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model_of(), path, image_size=16)
    names = [node.name for node in onnx.load(path).graph.node]
    assert {"stem/Conv", "layers.1.depthwise/Conv", "layers.1.pointwise/Gelu"} <= set(names)
    assert not [name for name, count in collections.Counter(names).items() if count > 1]
    assert str(tmp_path).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
