"""Files take what the model takes: uint8 pixels, channels last; names; older opsets; the source."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime: '.[onnx]'")

import onnx

from convmixer_fast import ConvMixer, UnsupportedModelError, optimize, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.export import OnnxModule, to_onnx, to_torch_export, to_triton_server
from convmixer_fast.export.checks import LIMITS
from convmixer_fast.models.outputs import with_dictionaries
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.export.onnx_cases import model_of
from tests.sweeps import sparse
from tests.variants import VARIANTS
from tests.zoo import locuslab


class Pixels(nn.Module):
    """Takes pixels of 0 to 255, of whatever dtype."""

    def __init__(self):
        super().__init__()
        self.model = locuslab(8, 2, 3, 4)

    def forward(self, image):
        return self.model((image.float() / 255 - 0.45) / 0.22)


class Rescaled(Pixels):
    """Divides by 255 if it is given bytes, and only then, as torchvision's ToDtype does."""

    def forward(self, image):
        scaled = image.float() / 255 if image.dtype == torch.uint8 else image
        return self.model(scaled - 0.45)


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = locuslab(8, 2, 3, 4)

    def forward(self, image):
        return self.model(image.permute(0, 3, 1, 2) * 2)


class BytesChannelsLast(ChannelsLast):
    def forward(self, image):
        return self.model(image.permute(0, 3, 1, 2).float() / 255)


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("kind", [Pixels, Rescaled])
def test_bytes_optimized(kind):
    model, x = randomize(kind()), pixels(2, 3, 13, 18)
    fast = optimize(model, example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(fast(image=x), model(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "precision"),
    sparse(
        itertools.product((Pixels, Rescaled), ("float32", "float16")),
        lambda point: (point[0] is Pixels) == (point[1] == "float16"),
    ),
)
def test_bytes_in_a_file(kind, precision, tmp_path):
    model, path = randomize(kind()), tmp_path / "model.onnx"
    report = to_onnx(
        model,
        path,
        image_size=16,
        dynamic_size=True,
        precision=precision,
        example_input=pixels(1, 3, 16, 16),
    )
    assert {check.images.split()[0] for check in report.checks} >= {"random", "real"}
    loaded = OnnxModule(path)
    x = pixels(3, 3, 20, 17)
    with torch.no_grad():
        assert relative_error(loaded(x), model(x)) <= LIMITS[precision]
    with pytest.raises(TypeError, match=r"model\.onnx takes torch\.uint8, got torch\.float32"):
        loaded(x.float())
    folder = to_triton_server(path, tmp_path / "models")
    assert "TYPE_UINT8" in (folder / "config.pbtxt").read_text()


def test_bytes_calibrated(tmp_path):
    model, path = randomize(Pixels()), tmp_path / "model.onnx"
    x = pixels(32, 3, 16, 16)
    report = to_onnx(
        model, path, image_size=16, precision="int8", calibration=x, example_input=x, input_name="x"
    )
    assert report.layers
    with torch.no_grad():
        assert relative_error(OnnxModule(path)(x), model(x)) <= LIMITS["int8"]


@pytest.mark.parametrize(
    ("kind", "dynamic_size"),
    sparse(
        itertools.product((ChannelsLast, BytesChannelsLast), (False, True)),
        lambda point: point[1] == (point[0] is ChannelsLast),
    ),
)
def test_channels_last_in_a_file(kind, dynamic_size, tmp_path):
    model, path = randomize(kind()), tmp_path / "model.onnx"
    bytes_ = kind is BytesChannelsLast
    example = pixels(1, 16, 12, 3) if bytes_ else None
    to_onnx(model, path, image_size=(16, 12), dynamic_size=dynamic_size, example_input=example)
    shape = (3, 21, 17, 3) if dynamic_size else (3, 16, 12, 3)
    x = pixels(*shape) if bytes_ else torch.randn(shape)
    with torch.no_grad():
        assert relative_error(OnnxModule(path)(x), model(x)) <= LIMITS["float32"]


def test_channels_last_optimized():
    model = randomize(ChannelsLast())
    assert recognize(model).input_layout == "NHWC"
    fast = optimize(model)
    for height, width in ((16, 12), (23, 40)):
        x = torch.randn(2, height, width, 3)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=2e-5, atol=2e-5)


def test_sizes_of_channels_last_images_are_looked_at():
    class Checked(ChannelsLast):
        def forward(self, image):
            assert image.shape[1] % 8 == 0
            return super().forward(image)

    fast = optimize(randomize(Checked()))
    fast(torch.randn(1, 16, 12, 3))
    with pytest.raises(ValueError, match=r"H % 8"):
        fast(torch.randn(1, 12, 16, 3))


def test_channels_last_pt2(tmp_path):
    model, path = randomize(ChannelsLast()), tmp_path / "model.pt2"
    to_torch_export(model, path, image_size=(16, 12))
    x = torch.randn(5, 16, 12, 3)
    with torch.no_grad():
        assert relative_error(torch.export.load(path).module()(x), model(x)) <= LIMITS["float32"]


def names(path):
    graph = onnx.load(path).graph
    return [value.name for value in (*graph.input, *graph.output)]


@pytest.mark.exhaustive
def test_names(tmp_path):
    path = tmp_path / "model.onnx"
    variation = VARIANTS["maps-in-a-dictionary"]
    size = variation.shape[2:]
    to_onnx(variation.model(), path, image_size=size)
    assert names(path) == ["images", "a", "b"]
    to_onnx(variation.model(), path, image_size=size, input_name="x", output_names=["p", "q"])
    assert names(path) == ["x", "p", "q"]
    with torch.no_grad():
        found = OnnxModule(path)(variation.image())
        truth = variation.model()(variation.image())
    assert relative_error(found, tuple(truth.values())) <= LIMITS["float32"]
    variation = VARIANTS["like-transformers"]
    to_onnx(variation.model(), path, image_size=size)
    assert names(path) == ["images", "logits", "hidden_states_0", "hidden_states_1"]
    with torch.no_grad():
        truth = with_dictionaries(variation.model()(variation.image()))
        found = OnnxModule(path)(variation.image())
    assert relative_error(found, (truth["logits"], truth["hidden_states"])) <= LIMITS["float32"]
    to_onnx(VARIANTS["first-map"].model(), path, image_size=size)
    assert names(path) == ["images", "logits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_names": ["a", "b"]}, r"expected 1 output_names, one for each.*got \['a', 'b'\]"),
        ({"output_names": [""]}, "expected 1 output_names"),
        ({"output_names": "images"}, "input_name 'images' is one of output_names"),
        ({"input_name": "logits"}, "input_name 'logits' is one of output_names"),
    ],
)
def test_names_that_are_none(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_onnx(model_of(), tmp_path / "model.onnx", image_size=16, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("precision", "activation"),
    sparse(
        itertools.product(
            ("float32", "float16", "int8"), ("gelu", "gelu_tanh", "relu", "hardswish", "silu")
        ),
        ("float16", "gelu_tanh").__eq__,
    ),
)
def test_opset_17(precision, activation, tmp_path):
    model = randomize(Architecture(16, 2, 5, 4, activation, num_classes=7).build())
    path = tmp_path / "model.onnx"
    calibration = torch.randn(16, 3, 16, 16) if precision == "int8" else None
    report = to_onnx(
        model, path, image_size=16, precision=precision, opset=17, calibration=calibration
    )
    loaded = onnx.load(path)
    assert {entry.domain: entry.version for entry in loaded.opset_import}[""] == report.opset == 17
    assert "Gelu" not in report.operators
    x = torch.randn(5, 3, 16, 16)
    x = x.half() if precision == "float16" else x
    with torch.no_grad():
        truth = model(x.float())
        assert relative_error(OnnxModule(path)(x), truth) <= LIMITS[precision]


@pytest.mark.parametrize("pool", sparse(["max", "avgmax", "catavgmax"], "catavgmax".__eq__))
def test_opset_17_pooling(pool, tmp_path):
    model = randomize(ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=3, global_pool=pool))
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=8, opset=17, external_data=True)
    assert (tmp_path / "model.onnx.data").exists()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(OnnxModule(path)(x), model(x)) <= LIMITS["float32"]


@pytest.mark.parametrize("export", [to_onnx, to_torch_export])
def test_an_optimized_model_names_its_source(export, tmp_path):
    fast = optimize(model_of())
    with pytest.raises(UnsupportedModelError, match="pass the ConvMixer that it was made from"):
        export(fast, tmp_path / "model.pt2", image_size=16)
    with pytest.raises(UnsupportedModelError, match="pass the ConvMixer that it was made from"):
        optimize(fast)
