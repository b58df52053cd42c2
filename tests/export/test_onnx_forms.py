"""The forms in which a block can be written compute the same."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from convmixer_fast.export import to_onnx
from convmixer_fast.export.checks import LIMITS
from convmixer_fast.export.forms import FORMS, TARGETS
from tests.export.onnx_cases import RELU, SMALL, error_of, model_of
from tests.sweeps import sparse


@pytest.mark.parametrize(
    ("form", "architecture"),
    sparse(
        itertools.product(FORMS, (SMALL, RELU)),
        lambda point: (point[1] is RELU) == point[0].endswith("_relu"),
        ids=lambda point: f"{point[0]}-{point[1].activation}",
    ),
)
def test_forms_compute_the_same(form, architecture, tmp_path):
    model = model_of(architecture)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_()
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, image_size=16, form=form)
    assert report.form == form
    operators = report.operators
    gelu = architecture is SMALL
    norms = {"depthwise": 0, "affine": 0, "affine_relu": 0, "shift": 3}.get(form, 5)
    assert operators.get("BatchNormalization", 0) == norms
    assert ("Mul" in operators) == (
        form == "affine" or (gelu and form in ("affine_relu", "gelu_parts"))
    )
    assert ("Erf" in operators) == (gelu and form == "gelu_parts")
    assert operators["Conv"] == (10 if form == "depthwise" else 5)
    assert report.checks[0].error <= LIMITS["float32"]


@pytest.mark.parametrize("form", ["batch_norm_relu", "affine_relu", "shift"])
def test_scales_that_do_not_suit_stay(form, tmp_path):
    model = model_of(RELU)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight[0] = -1.5
        norms[1].weight[3] = 0.0
        norms[2].weight[5] = 0.0
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, form=form)
    assert error_of(path, model, torch.randn(3, 3, 16, 16)) <= LIMITS["float32"]


def test_targets_name_forms():
    assert set(TARGETS.values()) <= set(FORMS)
