"""to_tensorrt and TensorRTModule: what they refuse without TensorRT, and both on a GPU with it."""

import importlib
import importlib.util
import json
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, fold, optimize, recognize
from convmixer_fast.errors import (
    BackendUnavailableError,
    MissingDependencyError,
    TensorRTError,
    UnsupportedModelError,
)
from convmixer_fast.export import TensorRTModule, to_tensorrt, trt_bindings, trt_engine
from convmixer_fast.export.metadata import metadata_path
from convmixer_fast.export.trt_module import Streams
from convmixer_fast.models.randomize import randomize
from convmixer_fast.support.files import write_whole
from tests.tolerances import MODEL_TOL

has_tensorrt = importlib.util.find_spec("tensorrt") is not None
needs_tensorrt = pytest.mark.skipif(
    not has_tensorrt, reason="needs TensorRT and a GPU: pip install tensorrt"
)


@pytest.fixture(scope="module")
def model():
    return randomize(ConvMixer(8, 1, 3, 4, num_classes=5).eval())


def test_importing_the_package_loads_neither_tensorrt_nor_triton():
    script = "import sys, convmixer_fast.export; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"tensorrt", "tensorrt_bindings", "triton"} & set(ran.stdout.split())


@pytest.mark.skipif(has_tensorrt, reason="needs an environment without TensorRT")
def test_missing_tensorrt_is_named(model, tmp_path):
    with pytest.raises(
        MissingDependencyError, match="TensorRT cannot be .*pip install 'tensorrt>="
    ):
        to_tensorrt(model, tmp_path / "engine", image_size=16)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "engine").write_bytes(b"plan")
    with pytest.raises(MissingDependencyError, match="pip install 'tensorrt>=10.13'"):
        TensorRTModule(tmp_path / "engine")


@pytest.mark.parametrize("version", ["10.12.0.36", "8.6.1"])
def test_old_tensorrt_is_refused(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(MissingDependencyError, match=f"10.13 or newer is needed, found {version}"):
        trt_bindings.load_tensorrt()


@pytest.mark.parametrize("version", ["10.13.0.35", "11.4.0.106"])
def test_new_tensorrt_is_taken(monkeypatch, version):
    module = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert trt_bindings.load_tensorrt() is module


def test_types_without_a_dtype_are_named():
    kinds = dict.fromkeys(trt_bindings.DATA_TYPES.values(), 0)
    with pytest.raises(TensorRTError, match="no PyTorch dtype corresponds to TensorRT's FP4"):
        trt_bindings.torch_dtype(SimpleNamespace(DataType=SimpleNamespace(**kinds)), "FP4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch": 0}, "1 <= min_batch <= opt_batch <= max_batch must hold, got min_batch=0"),
        ({"min_batch": 9, "max_batch": 8}, "got min_batch=9, opt_batch=8, max_batch=8"),
        ({"opt_batch": 99}, "opt_batch=99, max_batch=32"),
        ({"max_batch": 2.0}, "max_batch=2.0"),
        ({"image_size": 0}, "image_size must be a number or .* got 0"),
        ({"image_size": (1, 2, 3)}, r"image_size must be .* got \(1, 2, 3\)"),
        ({"image_size": 3}, "image_size 3 x 3 is smaller than a patch, 4 x 4 pixels"),
        (
            {"precision": "int8"},
            "precision must be one of 'float32', 'float16', 'bfloat16', got 'int8",
        ),
        ({"plugins": "cuda"}, "plugins must be one of 'none', 'triton', got 'cuda'"),
        ({"workspace": -1}, "workspace must be None or a number of bytes, got -1"),
        ({"capability": 90}, "capability is only for plugins='triton'"),
        ({"plugins": "triton", "capability": 9}, "capability must be at least 80, as 90 .* got 9"),
    ],
    ids=str,
)
def test_bad_arguments(model, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(trt_engine, "Build", _Build)
    monkeypatch.setattr(trt_bindings, "load_tensorrt", lambda: None)
    with pytest.raises(ValueError, match=message):
        to_tensorrt(model, tmp_path / "engine", **{"image_size": 16, **options})


class _Build:
    """As far as it goes without TensorRT."""

    def __init__(self, trt):
        pass

    def fill(self, folded, image_size, depthwise):
        from convmixer_fast.export.trt_network import add_convmixer

        add_convmixer(None, None, folded, image_size, depthwise)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_plugins_need_to_know_the_gpu(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trt_engine, "Build", _Build)
    monkeypatch.setattr(trt_bindings, "load_tensorrt", lambda: None)
    with pytest.raises(ValueError, match="none is here; give its compute capability, capability="):
        to_tensorrt(model, tmp_path / "engine", image_size=16, plugins="triton")


def test_plugins_for_a_newer_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert trt_engine._capability(None) == 89
    assert trt_engine._capability(80) == 80
    with pytest.raises(ValueError, match="has compute capability 89, .* code for capability=90"):
        trt_engine._capability(90)


def test_plugins_need_triton(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "convmixer_fast.export.trt_plugin", raising=False)
    folded = fold(recognize(model), torch.float16)
    with pytest.raises(MissingDependencyError, match=r"needs Triton .*convmixer-fast\[triton\]'"):
        trt_engine._depthwise_op(folded, (1, 16, 16), 90)


def test_onnx_arguments(tmp_path):
    engine, file = tmp_path / "engine", tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match="there is no ONNX file"):
        to_tensorrt(file, engine)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a model or the path of an .onnx file, got 'x"):
        to_tensorrt("x.pt", engine)
    with pytest.raises(ValueError, match="precision='float16' cannot be chosen for an ONNX file"):
        to_tensorrt(str(file), engine, precision="float16")
    with pytest.raises(ValueError, match="plugins='triton' needs the model itself"):
        to_tensorrt(file, engine, plugins="triton")
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing"):
        to_tensorrt(file, tmp_path / "missing" / "engine")


def test_other_things_are_no_models(model, tmp_path):
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        to_tensorrt(3, tmp_path / "engine")
    fused = optimize(model, backend="reference")
    with pytest.raises(UnsupportedModelError, match="optimized already; pass the one it was made"):
        to_tensorrt(fused, tmp_path / "engine")


class Squared(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) ** 2


def test_models_with_other_parts_are_sent_to_onnx(model, tmp_path):
    headed = nn.Sequential(model.stem, model.blocks, Squared()).eval()
    with pytest.raises(UnsupportedModelError, match="the model's head can be any.* to ONNX first"):
        to_tensorrt(headed, tmp_path / "engine", image_size=16)

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net((x - 0.5) / 0.25)

    with pytest.raises(UnsupportedModelError, match="the model's preprocess can be .*to_onnx"):
        to_tensorrt(Normalised().eval(), tmp_path / "engine", image_size=16)


def test_a_head_for_another_size_is_refused(model):
    from convmixer_fast.export.trt_network import add_convmixer
    from convmixer_fast.spec import Head

    folded = fold(recognize(model))
    changed = type(folded)(**{**vars(folded), "head": Head("", torch.zeros(5, 7), None)})
    with pytest.raises(ValueError, match="the head takes 7 features, .* of 16 x 16 give it 4"):
        add_convmixer(None, SimpleNamespace(), changed, (16, 16))


def test_engines_run_on_cuda_devices_alone():
    with pytest.raises(ValueError, match="TensorRT engines run on CUDA devices, got device='cpu'"):
        Streams("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_engines_need_a_gpu():
    with pytest.raises(BackendUnavailableError, match="run on NVIDIA GPUs, .* finds none here"):
        Streams(None)


def test_missing_engine_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        TensorRTModule(tmp_path / "nothing")


def test_files_are_written_at_once(tmp_path):
    path = tmp_path / "engine"
    path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError):
        write_whole(path, "text")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# The rest needs TensorRT, its libraries included, and a GPU.

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Build a ConvMixer once for each precision and kind of plugins."""
    torch.manual_seed(0)
    source = randomize(ConvMixer(64, 3, 7, 4, num_classes=10).eval())
    folder = tmp_path_factory.mktemp("engines")
    made = {}

    def engine(precision, plugins):
        path = folder / f"{precision}-{plugins}.engine"
        if path not in made:
            made[path] = to_tensorrt(
                source,
                path,
                image_size=(64, 48),
                precision=precision,
                opt_batch=4,
                max_batch=8,
                timing_cache=folder / "timings",
                plugins=plugins,
                progress=False,
            )
        return path

    return source, engine


@pytest.mark.cuda
@needs_tensorrt
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["calls", "graphs"])
@pytest.mark.parametrize("plugins", ["none", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_computes_what_the_model_does(engines, precision, plugins, cuda_graph):
    source, engine = engines
    module = TensorRTModule(engine(precision, plugins), cuda_graph=cuda_graph)
    dtype = PRECISIONS[precision]
    for batch in (1, 8, 3, 1, 8, 3, 1):
        x = torch.randn(batch, 3, 64, 48)
        with torch.no_grad():
            expected = source.double()(x.double())
        found = module(x.to("cuda", dtype))
        assert found.dtype == dtype
        error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
        assert error <= 2 * MODEL_TOL[dtype]


@pytest.mark.cuda
@needs_tensorrt
def test_engine_beside_its_metadata(engines):
    _, engine = engines
    path = engine("float16", "triton")
    said = json.loads(metadata_path(path).read_text())
    module = TensorRTModule(path)
    (given,) = said["inputs"]
    assert (given["name"], tuple(given["shape"])) == (module._input, (-1, 3, 64, 48))
    assert said["batches"] == [1, 4, 8]


@pytest.mark.cuda
@needs_tensorrt
def test_plugins_need_no_python_at_run_time(engines, tmp_path):
    _, engine = engines
    x = torch.ones(2, 3, 64, 48, dtype=torch.float16, device="cuda")
    expected = TensorRTModule(engine("float16", "triton"))(x)
    script = """
import sys, torch
from convmixer_fast.export import TensorRTModule
sys.modules["triton"] = None
x = torch.ones(2, 3, 64, 48, dtype=torch.float16, device="cuda")
torch.save(TensorRTModule(sys.argv[1])(x).cpu(), sys.argv[2])
assert "tensorrt.plugin" not in sys.modules
"""
    out = tmp_path / "out.pt"
    command = [sys.executable, "-c", script, str(engine("float16", "triton")), str(out)]
    subprocess.run(command, check=True)
    torch.testing.assert_close(torch.load(out), expected.cpu(), rtol=0, atol=0)


@pytest.mark.cuda
@needs_tensorrt
def test_threads_and_streams_share_a_module(engines):
    _, engine = engines
    module = TensorRTModule(engine("float32", "none"))
    module = pickle.loads(pickle.dumps(module))
    inputs = [torch.randn(1 + i % 8, 3, 64, 48, device="cuda") for i in range(16)]
    expected = [module(x) for x in inputs]
    torch.cuda.synchronize()
    found = [None] * len(inputs)

    def call(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found[i] = module(inputs[i])
        stream.synchronize()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=0)
