"""ONNX files: what they compute, in every precision, of any size."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime

from convmixer_fast import UnsupportedModelError, fold, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.export import onnx_export, to_onnx
from convmixer_fast.export.checks import LIMITS
from convmixer_fast.export.forms import FORMS
from convmixer_fast.export.plain import PlainConvMixer
from convmixer_fast.models.published import PUBLISHED, Architecture
from tests.export.onnx_cases import error_of, model_of
from tests.sweeps import sparse
from tests.variants import EVERY
from tests.zoo import VARIATIONS

# One of each kind of what the exporter itself has to write.
_WRITTEN = {
    *("reference-catavgmax", "reference-depth-0", "segmentation-head", "untraceable-in-front"),
    *("even-kernel-same", "squeeze-excite-twice", "maps-in-a-list"),
}


@pytest.mark.parametrize("name", sparse(EVERY, _WRITTEN.__contains__))
def test_variations(name, tmp_path):
    variation = EVERY[name]
    model = variation.model()
    path = tmp_path / "model.onnx"
    if name == "untraceable-in-front":
        with pytest.raises(UnsupportedModelError, match="cannot trace the model's own code before"):
            to_onnx(model, path, image_size=variation.shape[2:])
        return
    report = to_onnx(model, path, image_size=variation.shape[2:])
    assert report.checks[0].error <= LIMITS["float32"]
    # Another batch than the one that was traced, fresh numbers.
    x = torch.randn(5, *variation.shape[1:])
    assert error_of(path, model, x) <= LIMITS["float32"]


@pytest.mark.parametrize("precision", sparse(["float32", "float16", "bfloat16"], "float16".__eq__))
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
    if precision != "bfloat16":  # which ONNX Runtime has no convolution for
        dtype = torch.float16 if precision == "float16" else torch.float32
        x = torch.randn(3, 3, side + 3, 3 * architecture.patch_size)
        assert error_of(path, model, x, dtype) <= LIMITS[precision]


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
    to_onnx(model, path, image_size=16, precision="float16")
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
        assert error_of(path, model, torch.randn(size)) <= LIMITS["float32"]


def test_one_model_of_one_size(tmp_path):
    """A model whose code fixes its input's size is exported for that size alone."""
    variation = VARIATIONS["normalized-in-front"]
    model = nn.Sequential(FixedSize(), variation.model())
    example = torch.zeros(2, 3, 16, 16)
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, dynamic_batch=False, example_input=example[:1])
    assert error_of(path, model, torch.randn(1, 3, 16, 16)) <= LIMITS["float32"]
    with pytest.raises(ValueError, match=r"fixes dimension 2 .* to 16; pass dynamic_size=False"):
        to_onnx(model, path, image_size=16, dynamic_size=True, example_input=example)


class FixedSize(nn.Module):
    def forward(self, x):
        if x.shape[2] != 16:
            raise ValueError("16 rows only")
        return x * 2


@pytest.mark.parametrize("name", ["two-heads", "segmentation-head"])
def test_float32_outside_of_a_head_of_its_own(name, tmp_path):
    variation = VARIATIONS[name]
    path = tmp_path / "model.onnx"
    to_onnx(
        variation.model(),
        path,
        image_size=variation.shape[2:],
        precision="float16",
        float32_io=True,
    )
    outputs = onnxruntime.InferenceSession(path).get_outputs()
    assert {output.type for output in outputs} == {"tensor(float)"}


@pytest.mark.exhaustive
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


def test_beside_the_recognition_of_another_model(tmp_path):
    recognized = []
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(to_onnx, model_of(), tmp_path / "model.onnx", image_size=16)
        model = model_of()
        while not job.done():
            recognized.append(len(recognize(model).layers))
        job.result()
    assert len(recognized) > 1


def test_half_precision_inside_alone(tmp_path):
    model = model_of()
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, image_size=16, precision="float16", float32_io=True)
    assert onnxruntime.InferenceSession(path).get_outputs()[0].type == "tensor(float)"
    assert report.checks[0].error <= LIMITS["float16"]


@pytest.mark.parametrize("opset", sparse([18, 20, 21], lambda opset: opset == 18))
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
    assert error_of(path, model, torch.randn(1, 3, 16, 16)) <= LIMITS["float32"]
    to_onnx(model, path, image_size=16)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


def test_the_largest_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_EXTERNAL_BYTES", 1000)
    to_onnx(model_of(), tmp_path / "model.onnx", image_size=16)
    assert (tmp_path / "model.onnx.data").is_file()
