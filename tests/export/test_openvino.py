"""OpenVINO's own files: made, checked, and run by OpenVINO alone."""

import pytest
import torch

from convmixer_fast.accuracy import relative_error
from convmixer_fast.errors import MismatchError
from convmixer_fast.export import openvino_export, to_openvino
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.sweeps import sparse

openvino = pytest.importorskip("openvino", reason="needs openvino: pip install openvino")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")

IMAGES = torch.rand(6, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return randomize(Architecture(16, 2, 5, 4, "gelu", 3, 7).build())


def computed(path, x):
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return torch.from_numpy(openvino.compile_model(path, "CPU", config)(x.numpy())[0])


@pytest.mark.parametrize(
    ("precision", "limit"),
    sparse(
        [("float32", 1e-5), ("float16", 2e-2), ("int8", 0.3)], lambda point: point[0] == "float32"
    ),
)
def test_the_files_compute_what_the_model_does(model, tmp_path, precision, limit):
    options = {"calibration": IMAGES} if precision == "int8" else {}
    report = to_openvino(
        model,
        tmp_path / "m.xml",
        precision=precision,
        image_size=(16, 20),
        progress=False,
        **options,
    )
    assert report.path == tmp_path / "m.xml"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert bool(report.onnx.layers) == (precision == "int8")
    x = IMAGES.half() if precision == "float16" else IMAGES
    with torch.inference_mode():
        assert relative_error(computed(tmp_path / "m.xml", x).float(), model(IMAGES)) < limit


@pytest.mark.exhaustive
def test_sizes_labels_and_weights(model, tmp_path):
    path = tmp_path / "m.xml"
    labels = list("abcdefg")
    to_openvino(model, path, image_size=16, dynamic_size=True, labels=labels, progress=False)
    x = torch.randn(3, 3, 24, 32)
    with torch.inference_mode():
        assert relative_error(computed(path, x), model(x)) < 1e-5
    said = openvino.Core().read_model(path).get_rt_info(["convmixer_fast", "labels"])
    assert said.astype(str) == '["a", "b", "c", "d", "e", "f", "g"]'


def test_what_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.xml"):
        to_openvino(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="precision must be one of .*got 'bfloat16'"):
        to_openvino(model, tmp_path / "m.xml", precision="bfloat16")


@pytest.mark.exhaustive
def test_files_that_are_wrong_are_not_kept(model, tmp_path, monkeypatch):
    (tmp_path / "m.xml").write_text("an earlier one")
    right = openvino_export._runner

    def wrong(*arguments):
        run, example = right(*arguments)
        return lambda x: [2 * out for out in run(x)], example

    monkeypatch.setattr(openvino_export, "_runner", wrong)
    with pytest.raises(MismatchError, match="No file was kept"):
        to_openvino(model, tmp_path / "m.xml", image_size=16, progress=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]
