"""Model repositories for NVIDIA's Triton Inference Server, against the server's own schema."""

import json

import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from convmixer_fast.export import to_onnx, to_triton_server
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.zoo import VARIATIONS


@pytest.fixture(scope="module")
def model():
    return randomize(Architecture(24, 1, 5, 4, "gelu", 3, 3).build())


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "any name.onnx"
    to_onnx(model, path, image_size=16, labels=["cat", "dog", 'the "rest"'])
    return path


def read(folder):
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]"
    )
    from google.protobuf import text_format

    # Parsing refuses names that the schema does not have.
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def test_an_onnx_file(exported, tmp_path):
    folder = to_triton_server(
        exported,
        tmp_path / "models",
        name="mixer",
        max_batch=32,
        preferred_batches=[8, 32],
        max_delay_us=200,
        instances=2,
        device="gpu",
    )
    assert folder == tmp_path / "models" / "mixer"
    assert (folder / "1" / "model.onnx").read_bytes() == exported.read_bytes()
    assert (folder / "labels.txt").read_text().splitlines() == ["cat", "dog", 'the "rest"']
    config = read(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("mixer", "onnxruntime", 32)
    (entry,) = config.input
    assert (entry.name, list(entry.dims)) == ("images", [3, 16, 16])
    assert entry.data_type == 11  # TYPE_FP32
    (out,) = config.output
    assert (out.name, list(out.dims), out.label_filename) == ("logits", [3], "labels.txt")
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [8, 32]
    assert batching.max_queue_delay_microseconds == 200
    one, full = config.model_warmup
    assert (one.batch_size, full.batch_size) == (1, 32)
    zeros = full.inputs["images"]
    assert (zeros.zero_data, list(zeros.dims), zeros.data_type) == (True, [3, 16, 16], 11)
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, group.KIND_GPU)


def test_versions_stand_beside_each_other(exported, tmp_path):
    for version in (1, 3):
        folder = to_triton_server(exported, tmp_path, version=version)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("1", "3", "config.pbtxt", "labels.txt")
    ]


def test_a_fixed_batch_is_no_batch_of_the_server(model, tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, precision="float16", dynamic_batch=False)
    config = read(to_triton_server(path, tmp_path / "models"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [1, 3, 16, 16]
    assert not config.HasField("dynamic_batching")
    assert config.input[0].data_type == 10  # TYPE_FP16
    (warmup,) = config.model_warmup
    assert (warmup.batch_size, list(warmup.inputs["images"].dims)) == (1, [1, 3, 16, 16])
    config = read(to_triton_server(path, tmp_path / "models", warmup=False))
    assert not config.model_warmup


def test_open_sizes_and_several_outputs(tmp_path):
    variation = VARIATIONS["two-heads"]
    path = tmp_path / "model.onnx"
    to_onnx(variation.model(), path, image_size=variation.shape[2:], dynamic_size=True)
    config = read(to_triton_server(path, tmp_path / "models", gpus=[1, 0]))
    assert list(config.input[0].dims) == [3, -1, -1]
    assert [out.name for out in config.output] == ["coarse", "fine_0", "fine_1"]
    assert list(config.instance_group[0].gpus) == [1, 0]
    assert not config.model_warmup  # no size to make a request of


def test_external_weights_come_along(model, tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, external_data=True)
    folder = to_triton_server(path, tmp_path / "models")
    assert (folder / "1" / "model.onnx.data").is_file()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    x = torch.zeros(1, 3, 16, 16)
    assert session.run(None, {"images": x.numpy()})[0].shape == (1, 3)


def test_what_an_earlier_export_left_goes(model, exported, tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, external_data=True, labels=["a", "b", "c"])
    folder = to_triton_server(path, tmp_path / "models")
    (tmp_path / "model.onnx.data").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"weights of .* are missing"):
        to_triton_server(path, tmp_path / "models")
    to_onnx(model, path, image_size=16)
    to_triton_server(path, tmp_path / "models")
    assert [file.name for file in (folder / "1").iterdir()] == ["model.onnx"]
    assert not (folder / "labels.txt").exists()


def test_outputs_of_other_types_and_ranks(tmp_path):
    from torch import nn

    class Class(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).argmax(1)

    inner = randomize(Architecture(8, 1, 3, 4, "gelu", 3, 3).build())
    to_onnx(Class(inner), tmp_path / "model.onnx", image_size=16)
    (out,) = read(to_triton_server(tmp_path / "model.onnx", tmp_path / "models")).output
    assert (out.data_type, list(out.dims)) == (9, [1])  # TYPE_INT64
    assert out.HasField("reshape")


def test_bfloat16_and_what_is_no_model(model, tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model, path, image_size=16, precision="bfloat16")
    assert read(to_triton_server(path, tmp_path / "models")).input[0].data_type == 14  # TYPE_BF16
    with pytest.raises(ValueError, match="device='cpu' cannot serve bfloat16"):
        to_triton_server(path, tmp_path / "models", device="cpu")
    for content in (b"", b"no model"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no ONNX"):
            to_triton_server(path, tmp_path / "models")


def test_an_engine(tmp_path):
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"an engine")
    with pytest.raises(FileNotFoundError, match="no metadata of the engine"):
        to_triton_server(plan, tmp_path / "models")
    tensor = {"dtype": "float16", "shape": [-1, 3, 224, 224]}
    metadata = {
        "inputs": [{"name": "images", **tensor}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 1000]}],
        "batches": [1, 8, 16],
    }
    (tmp_path / "model.plan.json").write_text(json.dumps(metadata))
    folder = to_triton_server(plan, tmp_path / "models")
    config = read(folder)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 16)
    assert (folder / "1" / "model.plan").read_bytes() == b"an engine"
    with pytest.raises(ValueError, match="max_batch must be at most the engine's, 16, got 32"):
        to_triton_server(plan, tmp_path / "models", max_batch=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "expected 3 labels, one for each class, got 1"),
        ({"name": "a/b"}, "name must be the name of a folder, got 'a/b'"),
        ({"version": 0}, "version must be at least 1, got 0"),
        ({"instances": 0}, "instances must be at least 1, got 0"),
        ({"max_delay_us": -1}, "max_delay_us must be at least 0, got -1"),
        ({"device": "tpu"}, "device must be one of 'auto', 'gpu', 'cpu', got 'tpu'"),
        ({"device": "cpu", "gpus": [0]}, "'auto' or 'gpu' where gpus are given"),
        ({"max_batch": 8, "preferred_batches": [16]}, r"must be at most max_batch, 8, got \[16\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(exported, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_triton_server(exported, tmp_path / "models", **options)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be an .onnx file or a .plan engine"):
        to_triton_server(tmp_path / "model.pt2", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        to_triton_server(tmp_path / "model.onnx", tmp_path)
