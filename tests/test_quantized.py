"""``optimize(precision="int8")``: as accurate as the file that it comes from, and a module."""

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")

import onnx
from onnx import numpy_helper

from convmixer_fast import (
    ConvMixer,
    FusedConvMixer,
    ReleasedWeightsError,
    UnsupportedModelError,
    optimize,
)
from convmixer_fast.accuracy import exact, relative_error
from convmixer_fast.export import OnnxModule, to_onnx, to_torch_export
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.digits_case import calibrated_digits
from tests.sweeps import sparse
from tests.variants import EVERY

needs_extension = pytest.mark.skipif(
    backends.why_not("cpu", torch.device("cpu"), torch.float32) is not None,
    reason="needs the compiled extension",
)


@pytest.fixture(scope="module")
def digits():
    return calibrated_digits()


@pytest.fixture(scope="module")
def made(digits):
    model, calibration, held_out, images = digits
    return optimize(
        model,
        precision="int8",
        calibration=calibration,
        validation=(images, held_out.labels),
        progress=False,
    )


@pytest.fixture
def fast(made):
    return copy.deepcopy(made)


@needs_extension
def test_nearer_to_the_model_than_the_file_in_onnx_runtime(digits, made, tmp_path):
    model, calibration, held_out, images = digits
    to_onnx(
        *(model, tmp_path / "model.onnx"),
        image_size=8,
        precision="int8",
        calibration=calibration,
        progress=False,
    )
    with torch.no_grad():
        truth = exact(model)(images.double())
        ours, theirs = made(images), OnnxModule(tmp_path / "model.onnx")(images)
    print(f"ours {relative_error(ours, truth):.4f}, theirs {relative_error(theirs, truth):.4f}")
    # The file rounds the convolutions' results too.
    assert relative_error(ours, truth) < relative_error(theirs, truth)
    assert held_out.accuracy(ours) >= held_out.accuracy(truth) - 0.003


def test_what_it_costs_is_said(made):
    report = made.quantization
    assert (report.method, report.images) == ("minmax", 256)
    assert list(report.layers) == ["stem/Conv", *(f"layers.{i}.pointwise/Conv" for i in range(4))]
    assert 0 < report.error < 0.1
    assert report.same_as_float32 > 0.98
    assert report.accuracy["quantized"] >= report.accuracy["model"] - 0.003


@needs_extension
def test_one_call(fast, digits):
    explanation = fast.explain(digits[3])
    assert explanation.one_call, explanation
    assert explanation.outside == ()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_compute_the_same(fast, digits, backend, caplog):
    images = digits[3][:3]
    if backends.why_not(backend, images.device, images.dtype) is not None:
        pytest.skip(f"needs the backend {backend}")
    with torch.no_grad():
        expected = fast(images)
        fast.backend = backend
        for module in fast.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        assert relative_error(fast(images), expected) < 0.02
    if backend == "triton":
        assert "8-bit numbers run in one call on a CPU" in caplog.text


def test_copies(made, digits):
    images = digits[3]
    stored = io.BytesIO()
    torch.save(made, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(stored, weights_only=False),
    ]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(images), made(images))
            assert other.quantization == made.quantization


def test_state_dict(made, fast, digits):
    images = digits[3]
    state = made.state_dict()
    assert state["stem.weight"].dtype == torch.int8
    assert state["blocks.0.1.weight"].dtype == torch.int8
    assert state["blocks.0.0.weight"].dtype == torch.float32
    with torch.no_grad():
        expected = made(images)
        for parameter in fast.parameters():
            parameter.zero_()
        assert not torch.equal(fast(images), expected)
        fast.load_state_dict(state)
        assert torch.equal(fast(images), expected)


def test_a_quarter_of_the_memory():
    model = randomize(ConvMixer(256, 4, kernel_size=5, patch_size=4, num_classes=10))
    fast = optimize(model, precision="int8", calibration=torch.randn(2, 3, 32, 32), progress=False)

    def size(module):
        return sum(p.numel() * p.element_size() for p in module.parameters())

    assert size(fast) < 0.35 * size(optimize(model))


@needs_extension
def test_release(fast, digits):
    images = digits[3]
    with torch.no_grad():
        expected = fast(images)
        fast.release()
        assert torch.equal(fast(images), expected)
    with pytest.raises(ReleasedWeightsError):
        fast.state_dict()


def test_compiled_and_exported(fast, digits):
    images = digits[3][:4]
    with torch.no_grad():
        expected = fast(images)
        compiled = torch.compile(fast, backend="aot_eager")
        assert relative_error(compiled(images), expected) < 0.02
        program = torch.export.export(fast, (images,))
        assert relative_error(program.module()(images), expected) < 0.02


def test_dtype_is_said_by_the_first_parameter(fast):
    assert next(fast.parameters()).dtype == torch.float32
    assert fast.half().stem.dtype == torch.float32  # there is no other form


@needs_extension
def test_autocast(fast, digits):
    images = digits[3]
    with torch.no_grad():
        expected = fast(images)
        with torch.autocast("cpu", torch.bfloat16):
            out = fast(images)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 2e-2  # the head's weights are rounded too


@pytest.mark.parametrize(
    "name",
    sparse(
        [
            *("shared-layers", "two-heads", "squeeze-excite-twice", "normalized-in-front"),
            *("like-transformers", "maps-in-a-list", "reference-depth-0", "two-stages"),
        ],
        "squeeze-excite-twice".__eq__,
    ),
)
def test_variations(name):
    variation = EVERY[name]
    model = variation.model()
    calibration = torch.cat([variation.image(index) for index in range(4)])
    fast = optimize(model, precision="int8", calibration=calibration, progress=False)
    x = variation.image(4)
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision must be 'int8' or None, got 'int4'"),
        ({"precision": "int8"}, "calibration must be images"),
        ({"calibration": torch.zeros(1, 1, 8, 8)}, "calibration must be images"),
        (
            {"precision": "int8", "calibration": torch.zeros(1, 1, 8, 8), "dtype": torch.half},
            "computes in float32",
        ),
        ({"precision": "int8", "calibration": torch.zeros(1, 8, 8)}, "calibration must be"),
        ({"precision": "int8", "calibration": torch.zeros(1, 2, 8, 8)}, "calibration must be"),
        (
            {
                "precision": "int8",
                "calibration": torch.zeros(1, 1, 8, 8),
                "calibration_method": "mean",
            },
            "calibration_method must be",
        ),
    ],
)
def test_arguments_are_checked(digits, options, message):
    with pytest.raises(ValueError, match=message):
        optimize(digits[0], **options)


def contents(path):
    """Weights, scales and zero points by name, and the nodes in order."""
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return stored, [(node.op_type, node.name, *node.input) for node in graph.node]


def test_its_file_is_that_of_the_model(made, digits, tmp_path):
    """What was checked is what is deployed."""
    model, calibration, _, images = digits
    files = {made: {}, model: {"calibration": calibration}}
    found = []
    for index, (source, options) in enumerate(files.items()):
        path = tmp_path / f"{index}.onnx"
        to_onnx(source, path, image_size=8, precision="int8", progress=False, **options)
        found.append((contents(path), OnnxModule(path)))
    (first, ours), (second, theirs) = found
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, values in first[0].items():
        assert (values == second[0][name]).all(), name
    assert torch.equal(ours(images), theirs(images))
    assert ours.description.model == "ConvMixer"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "float16"},
        {"precision": "int8", "calibration": torch.zeros(1, 1, 8, 8)},
        {"precision": "int8", "target": "tensorrt"},
    ],
)
def test_its_file_is_of_no_other_kind(made, options, tmp_path):
    with pytest.raises(ValueError, match="the model is in 8-bit numbers already"):
        to_onnx(made, tmp_path / "model.onnx", image_size=8, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shared-layers", "squeeze-excite-twice", "two-heads", "headless"])
def test_folded(name):
    """An optimized module tells what it was made of."""
    variation = EVERY[name]
    fast, x = optimize(variation.model()), variation.image(0)
    again = FusedConvMixer(copy.deepcopy(fast.folded()))
    with torch.no_grad():
        torch.testing.assert_close(again(x), fast(x), rtol=0, atol=0)


def test_it_is_optimized_already(fast, digits, tmp_path):
    with pytest.raises(UnsupportedModelError, match="optimized already"):
        optimize(fast, precision="int8", calibration=digits[1])
    with pytest.raises(UnsupportedModelError, match="optimized already"):
        to_torch_export(fast, tmp_path / "model.pt2", image_size=8)
