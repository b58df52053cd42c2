"""ONNX files: what they compute, in every precision and form, and what is refused."""

import collections
import copy
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

from convmixer_fast import UnsupportedModelError, fold, optimize, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.errors import MismatchError, MissingDependencyError
from convmixer_fast.export import onnx_export, to_onnx
from convmixer_fast.export.checks import LIMITS
from convmixer_fast.export.forms import FORMS, TARGETS
from convmixer_fast.export.plain import PlainConvMixer
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize
from tests.sweeps import sparse
from tests.zoo import VARIATIONS

SMALL = Architecture(24, 2, 5, 4, "gelu", 3, 7)
RELU = Architecture(24, 2, 5, 4, "relu", 3, 7)


def model_of(architecture=SMALL):
    return randomize(architecture.build())


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": x.numpy()})
    return [torch.from_numpy(np.asarray(values)) for values in found]


def error_of(path, model, x, dtype=torch.float32):
    with torch.no_grad():
        truth = torch.utils._pytree.tree_leaves(copy.deepcopy(model).double()(x.double()))
    return relative_error(run(path, x.to(dtype)), truth)


# One of each kind of what the exporter itself has to write.
_WRITTEN = {
    *("reference", "reference-relu", "reference-gelu-tanh", "reference-catavgmax"),
    *("reference-no-pool", "reference-4-channels", "reference-depth-0", "shared-layers"),
    *("two-heads", "segmentation-head", "in-place-head", "normalized-in-front"),
    *("untraceable-in-front", "even-kernel-same", "kernel-31"),
}


@pytest.mark.parametrize("name", sparse(VARIATIONS, _WRITTEN.__contains__))
def test_variations(name, tmp_path):
    variation = VARIATIONS[name]
    model = variation.model()
    path = tmp_path / "model.onnx"
    if name == "untraceable-in-front":
        with pytest.raises(UnsupportedModelError, match="cannot trace the model's own code before"):
            to_onnx(model, path, image_size=variation.shape[2:])
        return
    report = to_onnx(model, path, image_size=variation.shape[2:])
    assert report.checks[0].error <= LIMITS["fp32"]
    # Another batch than the one that was traced, fresh numbers.
    x = torch.randn(5, *variation.shape[1:])
    assert error_of(path, model, x) <= LIMITS["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", sparse(PUBLISHED, "convmixer_768_32".__eq__))
def test_published_architectures(name, precision, tmp_path):
    # All of the width, two layers of the depth.
    architecture = PUBLISHED[name]
    shallow = Architecture(**{**vars(architecture), "depth": 2})
    model = model_of(shallow)
    side = 2 * architecture.patch_size
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, image_size=side, precision=precision, dynamic_size=True)
    assert report.precision == precision
    assert report.checks[0].error <= LIMITS[precision]
    if precision != "bf16":  # which ONNX Runtime has no convolution for
        dtype = torch.float16 if precision == "fp16" else torch.float32
        x = torch.randn(3, 3, side + 3, 3 * architecture.patch_size)
        assert error_of(path, model, x, dtype) <= LIMITS[precision]


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
    assert report.checks[0].error <= LIMITS["fp32"]


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
    assert error_of(path, model, torch.randn(3, 3, 16, 16)) <= LIMITS["fp32"]


def test_targets_name_forms():
    assert set(TARGETS.values()) <= set(FORMS)


def test_float16_keeps_a_channel_that_hardly_varies(tmp_path):
    """Its scale is large: in float16 alone its digits would be lost."""
    model = model_of()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms[1::2]:
            norm.running_var[::3] = 1e-6
            norm.running_mean[::3] = 20.0
            norm.bias[::3] = 20.0 * (1e-6 + norm.eps) ** -0.5 * norm.weight[::3]
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, precision="fp16")
    x = torch.randn(4, 3, 16, 16)
    alone = PlainConvMixer(fold(recognize(model), torch.float16), FORMS["affine"]).half()
    alone.classifier.float()
    for block in alone.modules():
        if hasattr(block, "norm"):
            block.norm.register_forward_pre_hook(lambda module, args: (args[0].half(),))
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        # A NaN, where a scale overflows.
        error = relative_error(alone(x.half()), truth)
    assert not error <= 5 * error_of(path, model, x, torch.float16)


def test_sizes(tmp_path):
    model = model_of()
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=(16, 20), dynamic_batch=False)
    entry = onnxruntime.InferenceSession(path).get_inputs()[0]
    assert entry.shape == [1, 3, 16, 20]
    to_onnx(model, path, image_size=16, dynamic_size=True)
    entry = onnxruntime.InferenceSession(path).get_inputs()[0]
    assert entry.shape == ["batch", 3, "height", "width"]
    for size in ((1, 3, 4, 4), (3, 3, 33, 18)):
        assert error_of(path, model, torch.randn(size)) <= LIMITS["fp32"]


def test_one_model_of_one_size(tmp_path):
    """A model whose code fixes its input's size is exported for that size alone."""
    variation = VARIATIONS["normalized-in-front"]
    model = nn.Sequential(FixedSize(), variation.model())
    example = torch.zeros(2, 3, 16, 16)
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, dynamic_batch=False, example_input=example[:1])
    assert error_of(path, model, torch.randn(1, 3, 16, 16)) <= LIMITS["fp32"]
    with pytest.raises(ValueError, match=r"fixes dimension 2 .* to 16; pass dynamic_size=False"):
        to_onnx(model, path, image_size=16, dynamic_size=True, example_input=example)


class FixedSize(nn.Module):
    def forward(self, x):
        if x.shape[2] != 16:
            raise ValueError("16 rows only")
        return x * 2


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
    assert error_of(path, model, torch.randn(3, 3, 32, 32)) <= LIMITS["fp32"]


@pytest.mark.parametrize("name", ["two-heads", "segmentation-head"])
def test_float32_outside_of_a_head_of_its_own(name, tmp_path):
    variation = VARIATIONS[name]
    path = tmp_path / "model.onnx"
    to_onnx(
        variation.model(), path, image_size=variation.shape[2:], precision="fp16", float32_io=True
    )
    outputs = onnxruntime.InferenceSession(path).get_outputs()
    assert {output.type for output in outputs} == {"tensor(float)"}


def test_in_threads_and_under_autocast(tmp_path, capsys):
    models = [model_of() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(to_onnx, model, tmp_path / f"{index}.onnx", image_size=16)
            for index, model in enumerate(models)
        ]
        for job in jobs:
            job.result()
    print("still here")
    assert capsys.readouterr().out == "still here\n"
    with torch.autocast("cpu"):
        to_onnx(models[0], tmp_path / "autocast.onnx", image_size=16)
    assert error_of(tmp_path / "autocast.onnx", models[0], torch.randn(1, 3, 16, 16)) <= 1e-5


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


def test_models_that_cast(tmp_path):
    class Cast(nn.Module):
        def forward(self, x):
            return x.float() * 2

    model = nn.Sequential(Cast(), model_of())
    with pytest.raises(UnsupportedModelError, match="does not run in float64"):
        to_onnx(model, tmp_path / "model.onnx", image_size=16)


def test_half_precision_inside_alone(tmp_path):
    model = model_of()
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, image_size=16, precision="fp16", float32_io=True)
    assert onnxruntime.InferenceSession(path).get_outputs()[0].type == "tensor(float)"
    assert report.checks[0].error <= LIMITS["fp16"]


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_opset(opset, tmp_path):
    path = tmp_path / "model.onnx"
    report = to_onnx(model_of(), path, image_size=16, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset == report.opset
    assert ("Gelu" in report.operators) == (opset >= 20)


def test_external_data(tmp_path):
    model = model_of()
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, image_size=16, external_data=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert error_of(path, model, torch.randn(1, 3, 16, 16)) <= LIMITS["fp32"]
    to_onnx(model, path, image_size=16)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


def test_the_largest_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_EXTERNAL_BYTES", 1000)
    to_onnx(model_of(), tmp_path / "model.onnx", image_size=16)
    assert (tmp_path / "model.onnx.data").is_file()


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
        ({"precision": "fp8"}, "precision must be fp32, fp16, bf16 or int8, got 'fp8'"),
        ({"target": "tflite"}, "target must be 'onnxruntime' or 'tensorrt', got 'tflite'"),
        ({"form": "none"}, "form must be one of 'batch_norm', .*, got 'none'"),
        ({"opset": 17}, "opset must be from 18 to 23 for precision 'fp32', got 17"),
        ({"opset": 20, "precision": "bf16"}, "opset must be from 22 to 23 for precision 'bf16'"),
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
    with pytest.raises(UnsupportedModelError, match="pass the one it was made from"):
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
