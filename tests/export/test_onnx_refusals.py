"""What is refused, and that no file is kept that fails its check."""

import re

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnx

from convmixer_fast import UnsupportedModelError, optimize
from convmixer_fast.errors import MismatchError, MissingDependencyError
from convmixer_fast.export import onnx_export, to_onnx
from convmixer_fast.export.checks import LIMITS
from tests.export.onnx_cases import error_of, model_of


class Cropped(nn.Module):
    """Its size is a constant of what PyTorch's exporter traces, without a word."""

    def forward(self, x):
        return x[:, :, : int(x.shape[2] * 0.875)]


def test_other_sizes_are_checked(tmp_path):
    model = nn.Sequential(Cropped(), model_of())
    path = tmp_path / "model.onnx"
    with pytest.raises(MismatchError, match=r"on random \(1, 3, 37, 41\) images"):
        to_onnx(model, path, image_size=32, dynamic_size=True)
    assert not list(tmp_path.iterdir())
    to_onnx(model, path, image_size=32)
    assert error_of(path, model, torch.randn(3, 3, 32, 32)) <= LIMITS["float32"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 20, 16), r"tensor of images \(N, 3, 16, 16\).* got \(2, 3, 20, 16\)"),
        (torch.zeros(0, 3, 16, 16), "N at least 1"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (np.zeros((2, 3, 16, 16)), "got ndarray"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "finite floating-point numbers.*uint8"),
        (torch.full((2, 3, 16, 16), float("nan")), "float32 with NaN or infinities"),
    ],
    ids=["size", "none", "rank", "array", "bytes", "nan"],
)
def test_images_are_checked(images, message, tmp_path):
    with pytest.raises(ValueError, match=f"images must be .*{message}"):
        to_onnx(model_of(), tmp_path / "model.onnx", image_size=16, images=images)
    with pytest.raises(ValueError, match=f"calibration must be .*{message}"):
        to_onnx(
            *(model_of(), tmp_path / "model.onnx"),
            image_size=16,
            precision="int8",
            calibration=images,
        )


class Cast(nn.Module):
    def forward(self, x):
        return x.float() * 2


class CastByItself(nn.Module):
    """Its layers are no modules, so that nothing widens what they are given."""

    def __init__(self):
        super().__init__()
        self.model, self.weight = model_of(), nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        return self.model(x).float() @ self.weight.T


def test_models_that_cast(tmp_path):
    model = nn.Sequential(Cast(), model_of())
    report = to_onnx(model, tmp_path / "model.onnx", image_size=16)
    assert report.checks[0].error <= 1e-5
    (tmp_path / "model.onnx").unlink()
    model = CastByItself().eval()
    with pytest.raises(UnsupportedModelError, match="does not run in float64"):
        to_onnx(model, tmp_path / "model.onnx", image_size=16)
    assert not list(tmp_path.iterdir())


def test_given_images_are_compared(tmp_path):
    images = torch.randn(3, 3, 16, 16)
    report = to_onnx(model_of(), tmp_path / "model.onnx", image_size=16, images=images)
    assert [(check.images, check.count) for check in report.checks] == [
        *(("random", 2), ("random (3, 3, 16, 16)", 3), ("real", 3))
    ]
    assert all(check.same_top1 == 1 for check in report.checks)


def test_what_fails_its_check_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an earlier export")
    real = onnx_export._write

    def spoilt(module, *args):
        with torch.no_grad():
            module.layers[1].pointwise.weight[0, 0] += 0.1
        real(module, *args)

    monkeypatch.setattr(onnx_export, "_write", spoilt)
    with pytest.raises(MismatchError, match=r"outputs on random images are .* away .* No file"):
        to_onnx(model_of(), path, image_size=16)
    assert path.read_bytes() == b"an earlier export"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_valid_file_is_not_kept(tmp_path, monkeypatch):
    real = onnx_export._write

    def spoilt(module, example, path, *args):
        real(module, example, path, *args)
        model = onnx.load(path)
        model.graph.node[0].op_type = "Convolve"
        onnx.save(model, path)

    monkeypatch.setattr(onnx_export, "_write", spoilt)
    with pytest.raises(MismatchError, match="is not valid ONNX"):
        to_onnx(model_of(), tmp_path / "model.onnx", image_size=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of 'float32', .*'int8', got 'fp8'"),
        ({"target": "tflite"}, "target must be one of 'onnxruntime', 'tensorrt', got 'tflite'"),
        ({"form": "none"}, "form must be one of 'batch_norm', .*, got 'none'"),
        ({"opset": 16}, "opset must be from 17 to 23 for precision 'float32', got 16"),
        (
            {"opset": 20, "precision": "bfloat16"},
            "opset must be from 22 to 23 for precision 'bfloat16'",
        ),
        ({"image_size": 0}, "image_size must be a number of pixels, or height and width, got 0"),
        ({"image_size": (16,)}, "image_size must be a number of pixels, or height and width"),
        ({"image_size": 3}, "image_size must be at least a patch, 4 x 4, got 3"),
        ({"precision": "int8"}, "calibration must be images"),
        ({"calibration": torch.zeros(1, 3, 16, 16)}, "calibration must be images"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_onnx(model_of(), tmp_path / "model.onnx", **({"image_size": 16} | options))
    assert not list(tmp_path.iterdir())


def test_no_folder_and_no_convmixer(tmp_path):
    with pytest.raises(IsADirectoryError, match="name the file to write"):
        to_onnx(model_of(), tmp_path, image_size=16)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {re.escape(str(tmp_path))}"):
        to_onnx(model_of(), tmp_path / "no" / "model.onnx", image_size=16)
    with pytest.raises(UnsupportedModelError, match="pass the ConvMixer that it was made"):
        to_onnx(optimize(model_of()), tmp_path / "model.onnx", image_size=16)
    with pytest.raises(UnsupportedModelError):
        to_onnx(nn.Conv2d(3, 3, 3).eval(), tmp_path / "model.onnx", image_size=16)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    real = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else real(name),
    )
    with pytest.raises(MissingDependencyError, match=r"needs onnxscript: pip install"):
        to_onnx(model_of(), tmp_path / "model.onnx", image_size=16)
