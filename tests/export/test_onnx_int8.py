"""int8 files: accuracy of the trained digits model, what is quantised, the error of layers."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")

import onnx
import onnxruntime

from convmixer_fast.errors import MismatchError
from convmixer_fast.export import calibration, to_onnx
from tests.digits_case import calibrated_digits
from tests.sweeps import sparse


@pytest.fixture(scope="module")
def digits():
    return calibrated_digits()


def export(digits, path, **options):
    model, calibration, held_out, images = digits
    report = to_onnx(
        model, path, image_size=8, precision="int8", calibration=calibration, **options
    )
    session = onnxruntime.InferenceSession(path)
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return report, held_out.accuracy(logits)


METHODS = ("minmax", "percentile", "entropy")


@pytest.mark.parametrize(
    ("target", "method", "depthwise"),
    sparse(
        itertools.product(("onnxruntime", "tensorrt"), METHODS, (False, True)),
        # Every value of every parameter.
        lambda point: point == ("tensorrt", "percentile", True),
    ),
)
def test_accuracy(digits, target, method, depthwise, tmp_path):
    model, _, held_out, images = digits
    path = tmp_path / "model.onnx"
    report, accuracy = export(
        digits, path, target=target, calibration_method=method, quantize_depthwise=depthwise
    )
    with torch.no_grad():
        exact = held_out.accuracy(model(images))
    print(f"float32 {exact:.2%}, int8 {accuracy:.2%}, {report.checks}")
    assert accuracy >= exact - 0.005
    assert [check.images for check in report.checks] == ["calibration"]
    nodes = {node.output[0]: node for node in onnx.load(path).graph.node}
    for node in list(nodes.values()):
        if node.op_type == "Conv":
            source = nodes.get(node.input[0])
            rounded = source is not None and source.op_type == "DequantizeLinear"
            assert rounded == (depthwise or "depthwise" not in node.name), node.name


@pytest.mark.parametrize("target", sparse(["onnxruntime", "tensorrt"], "tensorrt".__eq__))
def test_types_are_those_of_the_target(digits, target, tmp_path):
    path = tmp_path / "model.onnx"
    export(digits, path, target=target)
    graph = onnx.load(path).graph
    zeros = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name.endswith("zero_point")
    }
    activations = {
        node.input[2]: zeros[node.input[2]]
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }
    if target == "tensorrt":  # which takes symmetric ones alone
        assert {str(zero.dtype) for zero in zeros.values()} == {"int8"}
        assert all((zero == 0).all() for zero in zeros.values())
    else:
        assert {str(zero.dtype) for zero in activations.values()} == {"uint8"}
        assert any(zero != 0 for zero in activations.values())


def test_error_of_layers(digits, tmp_path):
    report, _ = export(digits, tmp_path / "model.onnx")
    assert list(report.layers) == ["stem/Conv", *(f"layers.{i}.pointwise/Conv" for i in range(4))]
    for error in report.layers.values():
        assert 15 < error.result_db <= error.rounding_db + 1
        assert error.rounding_db < 60
    deeper = list(report.layers.values())[1:]
    assert all(30 < error.weight_db < 50 for error in deeper)
    # Noise adds up.
    assert deeper[-1].result_db < deeper[0].result_db
    both, _ = export(digits, tmp_path / "model.onnx", quantize_depthwise=True)
    assert len(both.layers) == 9
    assert not math.isnan(both.layers["layers.0.depthwise/Conv"].result_db)


@pytest.mark.parametrize(
    ("method", "count"),
    sparse(
        itertools.product(METHODS, (1, 17, 100)),
        ("percentile", 17).__eq__,
    ),
)
def test_any_number_of_images(digits, method, count, tmp_path):
    model, calibration, *_ = digits
    to_onnx(
        *(model, tmp_path / "model.onnx"),
        image_size=8,
        precision="int8",
        calibration=calibration[:count],
        calibration_method=method,
    )


def test_weights_of_their_own(digits, tmp_path):
    report, accuracy = export(digits, tmp_path / "model.onnx", external_data=True)
    assert accuracy > 0.99
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"model.onnx", "model.onnx.data"}
    assert sum(sizes.values()) == report.bytes
    tensors = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    assert any(tensor.external_data and tensor.data_type == 3 for tensor in tensors)  # INT8


def test_what_is_not_the_model_any_more_is_refused(digits, tmp_path):
    model, calibration, *_ = digits
    with pytest.raises(MismatchError, match="on real images"):
        to_onnx(
            *(model, tmp_path / "model.onnx"),
            image_size=8,
            precision="int8",
            calibration=calibration[:32] * 1e-3,
            images=calibration[:32],
        )


def test_a_fixed_batch(digits, tmp_path):
    model, calibration, _, images = digits
    path = tmp_path / "model.onnx"
    to_onnx(
        model,
        path,
        image_size=8,
        precision="int8",
        calibration=calibration[:5],
        dynamic_batch=False,
    )
    out = onnxruntime.InferenceSession(path).run(None, {"images": images[:1].numpy()})[0]
    with torch.no_grad():
        assert out.argmax() == model(images[:1]).argmax()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_method": "best"}, "calibration_method must be one of 'minmax'.*got 'best'"),
        ({"calibration": torch.zeros(8, 8)}, r"calibration must be a tensor .* got \(8, 8\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(digits, options, message, tmp_path):
    model, calibration, *_ = digits
    given = {"calibration": calibration} | options
    with pytest.raises(ValueError, match=message):
        to_onnx(model, tmp_path / "model.onnx", image_size=8, precision="int8", **given)
    assert not list(tmp_path.iterdir())


def test_accuracy_on_a_labelled_set(digits, tmp_path):
    model, _, held_out, images = digits
    validation = images, held_out.labels
    report, accuracy = export(digits, tmp_path / "model.onnx", validation=validation)
    with torch.no_grad():
        exact = held_out.accuracy(model(images))
    assert report.accuracy == {"model": pytest.approx(exact), "file": pytest.approx(accuracy)}
    assert report.same_as_float32 > 0.98


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (torch.zeros(3, 1, 8, 8), "validation must be two tensors"),
        ((torch.zeros(3, 8, 8), torch.zeros(3)), r"validation must be a tensor of images"),
        ((torch.zeros(3, 1, 8, 8), torch.zeros(4)), r"a class for each of 3 images, got \(4,\)"),
    ],
)
def test_labelled_sets_are_checked(digits, validation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(digits, tmp_path / "model.onnx", validation=validation)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", sparse(("minmax", "percentile"), lambda method: False))
def test_batches_do_not_change_what_is_calibrated(digits, method, tmp_path, monkeypatch):
    """Ranges are the same, histograms nearly: their bins depend on what comes first.

    The entropy's, which weighs bins against each other, are further apart.
    """
    found = []
    for batch in (16, 5, 1):
        monkeypatch.setattr(calibration, "_LARGEST_BATCH", batch)
        path = tmp_path / f"{batch}.onnx"
        export(digits, path, calibration_method=method)
        scales = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(path).graph.initializer
            if tensor.name.endswith("_scale")
        }
        found.append(scales)
    for scales in found[1:]:
        for name, scale in scales.items():
            limit = 1e-6 if method == "minmax" else 0.1
            assert scale == pytest.approx(found[0][name], rel=limit), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_memory_of_calibration(method, tmp_path):
    """A network that computes 1.6 GB for 16 images takes little of that."""
    code = """
import resource, sys, torch
from convmixer_fast import ConvMixer
from convmixer_fast.export import calibration, to_onnx
from convmixer_fast.models.randomize import randomize
model = randomize(ConvMixer(256, 8, kernel_size=3, patch_size=4, num_classes=10))
to_onnx(model, sys.argv[1] + "/warm.onnx", image_size=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = torch.randn(16, 3, 224, 224)
method = sys.argv[2]
to_onnx(
    model, sys.argv[1] + "/model.onnx", precision="int8", calibration=images,
    calibration_method=method, images=images[:1],
)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), method]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    print(method, done.stdout)
    assert int(done.stdout) < 900, f"{done.stdout} MiB"
