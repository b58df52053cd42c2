"""OnnxModule: drop-in for the model that the file was exported from."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from convmixer_fast.errors import BackendUnavailableError, MissingDependencyError
from convmixer_fast.export import OnnxModule, onnx_module, to_onnx
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.zoo import VARIATIONS


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = randomize(Architecture(24, 2, 5, 4, "gelu", 3, 7).build()).requires_grad_(False)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    prepare = Preprocessing(image_size=16, mean=(0.5,), std=(0.25,))
    to_onnx(model, path, image_size=16, labels=list("abcdefg"), preprocessing=prepare)
    return model, path


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_computes_what_the_model_does(exported):
    model, path = exported
    module = OnnxModule(path)
    for x in (
        torch.randn(1, 3, 16, 16),
        torch.randn(5, 3, 16, 16).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 16, 32)[..., ::2],
    ):
        close(module(x), model(x))
        with torch.inference_mode():
            close(module(x), model(x))
    assert not module.training
    assert "model.onnx" in repr(module)


def test_what_the_file_says_of_the_model(exported):
    description = OnnxModule(exported[1]).description
    assert description.labels == tuple("abcdefg")
    assert description.preprocessing == Preprocessing(16, 0.96, (0.5,), (0.25,))
    assert (description.model, description.precision) == ("ConvMixer", "float32")


def test_copies_pickles_and_threads(exported):
    model, path = exported
    module = OnnxModule(path, threads=1)
    x = torch.randn(2, 3, 16, 16)
    close(copy.deepcopy(module)(x), model(x))
    close(pickle.loads(pickle.dumps(module))(x), model(x))
    close(torch.nn.Sequential(torch.nn.Identity(), module)(x), model(x))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: module(x), range(16)):
            close(out, model(x))


def test_inside_torch_compile(exported):
    model, path = exported
    module = OnnxModule(path)
    compiled = torch.compile(lambda x: module(x * 2) + 1, backend="eager")
    x = torch.randn(2, 3, 16, 16)
    close(compiled(x), model(x * 2) + 1)


def test_several_outputs(tmp_path):
    variation = VARIATIONS["two-heads"]
    model = variation.model()
    to_onnx(model, tmp_path / "model.onnx", image_size=variation.shape[2:])
    x = variation.image()
    found = OnnxModule(tmp_path / "model.onnx")(x)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(x))
    assert isinstance(found, tuple)
    assert len(found) == len(expected) > 1
    for out, right in zip(found, expected, strict=True):
        close(out, right)


def test_bad_input(exported):
    module = OnnxModule(exported[1])
    with pytest.raises(TypeError, match=r"takes torch.float32, got torch.float64"):
        module(torch.randn(1, 3, 16, 16).double())
    with pytest.raises(TypeError, match="is for cpu, and the input is on meta"):
        module(torch.randn(1, 3, 16, 16, device="meta"))
    for shape in ((1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"takes images \(batch, 3, 16, 16\), got"):
            module(torch.randn(shape))


def test_smaller_than_a_patch(tmp_path):
    model = randomize(Architecture(8, 1, 3, 4, "gelu", 3, 5).build())
    to_onnx(model, tmp_path / "model.onnx", image_size=8, dynamic_size=True)
    with pytest.raises(ValueError, match=r"cannot run model.onnx on images \(1, 3, 2, 8\)"):
        OnnxModule(tmp_path / "model.onnx")(torch.zeros(1, 3, 2, 8))


def test_what_cannot_be_opened(exported, tmp_path, monkeypatch):
    _, path = exported
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        OnnxModule(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BackendUnavailableError, match="ONNX Runtime cannot run"):
        OnnxModule(broken)
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got 'mps'"):
        OnnxModule(path, device="mps")
    with pytest.raises(BackendUnavailableError, match=r"has no NoProvider, only .*CPUExecution"):
        OnnxModule(path, providers=["NoProvider"])

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(onnx_module.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        OnnxModule(path)


def test_bfloat16_needs_a_gpu(tmp_path):
    model = randomize(Architecture(8, 1, 3, 2, "gelu", 3, 5).build())
    to_onnx(model, tmp_path / "model.onnx", image_size=8, precision="bfloat16")
    with pytest.raises(BackendUnavailableError, match="Could not find an implementation for Conv"):
        OnnxModule(tmp_path / "model.onnx")


@pytest.mark.cuda
def test_on_a_device(exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    model, path = exported
    module = OnnxModule(path, device="cuda")
    model = copy.deepcopy(model).cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in (1, 3):
            x = torch.randn(batch, 3, 16, 16, device="cuda")
            out = module(x)
            assert out.device == x.device
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-3)
