"""Checks of trt_engine.py and trt_build.py: settings, files, what TensorRT refuses."""

import json
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import tensorrt as trt
import torch

from convmixer_fast.choices import DTYPES
from convmixer_fast.errors import TensorRTError
from convmixer_fast.export import trt_build, trt_module
from convmixer_fast.export.metadata import metadata_path
from convmixer_fast.export.trt_engine import to_tensorrt
from convmixer_fast.export.trt_progress import BuildProgress
from convmixer_fast.models.preprocessing import Preprocessing
from tests.export.tensorrt_driving import SIZE, error_of, export, small, using
from tests.export.tensorrt_interpreter import Network
from tests.export.tensorrt_module_checks import FakeStreams


def check_settings() -> None:
    network = Network(trt)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.write_bytes(b"earlier")
        report = export(
            network,
            small(),
            min_batch=2,
            opt_batch=3,
            workspace=1 << 28,
            timing_cache=cache,
            version_compatible=True,
            precision="bfloat16",
            progress=True,
        )
        assert cache.read_bytes() == b"timings"
        assert list(cache.parent.iterdir()) == [cache]
    (created,) = network.named("create_timing_cache")
    assert created.arguments == {"serialized_timing_cache": b"earlier"}
    (limit,) = network.named("set_memory_pool_limit")
    assert limit.arguments == {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 1 << 28}
    (flag,) = network.named("set_flag")
    assert flag.arguments == {"flag": trt.BuilderFlag.VERSION_COMPATIBLE}
    (shape,) = network.named("set_shape")
    assert tuple(shape.arguments.values()) == (
        "images",
        *((n, 3, *SIZE) for n in (2, 3, 4)),
    )
    (flags,) = network.named("create_network")
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert flags.arguments == {"flags": strong}
    assert isinstance(
        network.named("progress_monitor =")[0].arguments["value"], trt.IProgressMonitor
    )
    assert report.batches == (2, 3, 4)
    assert report.precision == "bfloat16"
    assert report.bytes == 4
    assert report.inputs[0].dtype == "bfloat16"


def check_tf32_follows_pytorch() -> None:
    before = torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        network = Network(trt)
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            report = export(network, small(), precision="float32")
        finally:
            torch.backends.cudnn.allow_tf32 = before
        flags = [call.arguments["flag"] for call in network.named("clear_flag")]
        assert flags == ([] if allowed else [trt.BuilderFlag.TF32])
        assert report.tf32 == allowed


def check_metadata() -> None:
    network = Network(trt)
    with using(network) as folder:
        path = folder / "engine.plan"
        prepared = Preprocessing(image_size=12)
        report = to_tensorrt(
            small(), path, image_size=12, max_batch=4, preprocessing=prepared, progress=False
        )
        assert path.read_bytes() == b"plan"
        said = json.loads(metadata_path(path).read_text())
        assert sorted(folder.iterdir()) == [path, metadata_path(path)]
    assert report.path == str(path)
    assert said["batches"] == [1, 4, 4]
    assert said["inputs"] == [{"name": "images", "dtype": "float16", "shape": [-1, 3, 12, 12]}]
    assert said["outputs"] == [{"name": "logits", "dtype": "float16", "shape": [-1, 5]}]
    assert said["versions"]["tensorrt"] == trt.__version__
    assert said["preprocessing"]["image_size"] == 12
    assert said["plugins"] == "none"


def check_progress() -> None:
    for shown in (False, True):
        with BuildProgress(trt, shown) as progress:
            monitor = progress.monitor
            monitor.phase_start("build", None, 3)
            monitor.phase_start("tactics", "build", 2)
            assert monitor.step_complete("tactics", 0) is True
            assert monitor.step_complete("unknown", 0) is True
            monitor.phase_finish("tactics")
            monitor.phase_finish("build")
            monitor.phase_finish("unknown")


def check_real_bindings_take_every_call() -> None:
    """Over the stubs nothing is computed, but pybind11 checks names, types and conversions."""
    build = trt_build.Build
    with ExitStack() as stack:
        # What is read back from the stubs means nothing.
        for name, answer in (
            ("_input", lambda self: ("images", (-1, 3, *SIZE))),
            ("content", lambda self, memory: b"plan" * isinstance(memory, trt.IHostMemory)),
            ("tensors", lambda self: ((), ())),
        ):
            stack.enter_context(mock.patch.object(build, name, answer))
        folder = stack.enter_context(using(trt))
        models = [small(), small(global_pool="catavgmax"), small(global_pool="avgmax")]
        for plugins in ({}, {"plugins": "triton", "capability": 90}):
            for precision in DTYPES:
                for model in models:
                    to_tensorrt(
                        model,
                        folder / "engine",
                        image_size=SIZE,
                        precision=precision,
                        workspace=1 << 28,
                        timing_cache=folder / "cache",
                        version_compatible=True,
                        **plugins,
                    )
                    assert (folder / "engine").read_bytes() == b"plan"
        (folder / "model.onnx").write_bytes(b"")
        to_tensorrt(folder / "model.onnx", folder / "engine", image_size=SIZE)
        module = trt_module.TensorRTModule
        with (
            mock.patch.object(trt_module, "Streams", FakeStreams),
            mock.patch.object(module, "_read_tensors", pretend),
            mock.patch.object(torch, "empty", return_value=torch.zeros(3)),
        ):
            loaded = module(folder / "engine")
            loaded._run(torch.zeros(1, 3, 2, 2), "")
            engine = loaded._engine
            name = engine.get_tensor_name(0)
            assert (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT) in (True, False)
            engine.get_tensor_dtype(name)
            engine.get_tensor_profile_shape(name, 0)


def pretend(module: Any) -> None:
    module._input, module._outputs = "images", ["logits"]
    module._smallest = module._largest = (1, 3, 2, 2)
    module._dtypes = {"images": torch.float32, "logits": torch.float32}


def onnx_network(shape: tuple[int, ...], **answers: Any) -> Network:
    network = Network(trt, answers)
    network._made = network.tensor("pixels", trt.float32, shape)
    network.answers["INetworkDefinition.get_output"] = lambda index: network.tensor(
        "scores", trt.float32, (shape[0], 7)
    )
    return network


def check_onnx() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(b"onnx")
        for shape, options in (
            ((-1, 3, 12, 15), {}),
            ((-1, 3, -1, -1), {}),
            ((2, 3, 12, 15), {"min_batch": 2, "max_batch": 2}),
        ):
            network = onnx_network(shape)
            report = export(network, path, **options)
            (parsed,) = network.named("parse_from_file")
            assert parsed.arguments == {"model": str(path)}
            assert report.precision is None
            assert report.inputs[0].name == "pixels"
            assert network.named("set_shape")[0].arguments["input"] == "pixels"
        for shape, options, message in (
            ((2, 3, 12, 15), {}, "batches of 2 alone; pass min_batch=2 and max_batch=2"),
            ((-1, 3, 16, 16), {}, "images of 16 x 16"),
            ((-1, 3), {}, r"expected an input (N, C, H, W)"),
        ):
            assert message in error_of(onnx_network(shape), ValueError, path, **options)
        two = onnx_network((-1, 3, 12, 15), **{"INetworkDefinition.num_inputs": 2})
        assert "one input (N, C, H, W), found 2" in error_of(two, ValueError, path)
        errors = ["In node 3: no such op", "In node 9: no such type"]
        broken = onnx_network(
            (-1, 3, 12, 15),
            **{
                "OnnxParser.parse_from_file": False,
                "OnnxParser.num_errors": 2,
                "OnnxParser.get_error": lambda index: errors[index],
            },
        )
        message = error_of(broken, TensorRTError, path)
        assert all(error in message for error in errors), message
        broken.answers["OnnxParser.num_errors"] = 0
        assert "gives no reason" in error_of(broken, TensorRTError, path)


def check_failures() -> None:
    model = small()
    for key, answer, message in (
        ("Builder.build_serialized_network", None, "could not build the engine: no gpu"),
        ("INetworkDefinition.add_scale_nd", None, "refused the layer 'stem.norm'"),
        ("INetworkDefinition.add_convolution_nd", None, "refused the layer 'stem'"),
        ("INetworkDefinition.add_input", None, "refused an input"),
        ("IBuilderConfig.add_optimization_profile", -1, "does not take the batches"),
    ):
        network = Network(trt)

        def fail(answer: Any = answer, calls: list[Any] = network.calls, **arguments: Any) -> Any:
            calls[0].arguments["logger"].log(trt.ILogger.Severity.ERROR, "no gpu")
            return answer

        network.answers[key] = fail
        found = error_of(network, TensorRTError, model)
        assert message in found, found
        assert "no gpu" in found, found

    class Nothing(Network):
        def Builder(self, logger: Any) -> Any:  # noqa: N802, TensorRT's name
            raise TypeError("factory function returned nullptr")

    assert "cannot build engines here" in error_of(Nothing(trt), TensorRTError, model)
    refused = {"IBuilderConfig.set_timing_cache": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        message = error_of(Network(trt, refused), TensorRTError, model, timing_cache=path)
        assert "refused a new timing cache" in message


def check_timing_cache_of_another_gpu() -> None:
    answers = iter([False, True])
    network = Network(
        trt, {"IBuilderConfig.set_timing_cache": lambda cache, ignore_mismatch: next(answers)}
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Path(folder) / "cache"
        path.write_bytes(b"another's")
        export(network, small(), timing_cache=path)
        assert path.read_bytes() == b"timings"
    assert any("is of another GPU" in str(warning.message) for warning in caught)
    created = [call.arguments for call in network.named("create_timing_cache")]
    assert [a["serialized_timing_cache"] for a in created] == [b"another's", b""]
