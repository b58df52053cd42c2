"""The Hugging Face hub: its real client against a small hub on this machine, and folders."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save
from torch import nn

from convmixer_fast import ExportedFileError, FusedConvMixer, UnsupportedModelError, optimize
from convmixer_fast.errors import CheckpointError
from convmixer_fast.models.hub import Repository, hub_repository, metadata_of
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.models.fake_hub import TOKEN, fake_hub
from tests.paths import ROOT
from tests.sweeps import sparse
from tests.zoo import VARIATIONS

CONFIG = {
    "architecture": "convmixer_768_32",  # the published one, with ReLU
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 16, 16],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 0.9,
        "label_names": ["ant", "bee", "cat", "dog", "elk"],
    },
}


@pytest.fixture(scope="module")
def model():
    return randomize(Architecture(16, 2, 3, 4, "relu", 3, 5).build())


@pytest.fixture
def hub(model):
    """A hub with a model that anybody may have, an old one and a private one."""
    weights = save(model.state_dict())
    file = f"{json.dumps(CONFIG)}".encode()
    files = {
        "timm/tiny": {"config.json": file, "model.safetensors": weights},
        "timm/empty": {"config.json": file},
        "me/private": {"config.json": file, "model.safetensors": weights},
        "me/broken": {"config.json": b"[]", "model.safetensors": weights},
    }
    with fake_hub(files, private=("me/private",)) as address:
        yield address, files


def run(code, address, home, **environment):
    """Run a program whose hub is at ``address``: the client reads that when it is imported."""
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install '.[hub]'")
    known = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **known, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


LOAD = """
    import sys, torch, convmixer_fast
    try:
        model = convmixer_fast.load(sys.argv[1] if len(sys.argv) > 1 else NAME)
        x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
        print(model(x).tolist(), type(model.blocks[0][2]).__name__)
    except convmixer_fast.ConvMixerFastError as error:
        print(type(error).__name__, error)
"""


def load(name, address, home, **environment):
    done = run(LOAD.replace("NAME", repr(name)), address, home, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.exhaustive
def test_load_and_offline(model, hub, tmp_path):
    address, _ = hub
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    expected = f"{model(x).tolist()} ReLU"
    offline = load("hf-hub:timm/tiny", address, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith("CheckpointError hf-hub:timm/tiny: config.json is not in the cache")
    assert load("hf-hub:timm/tiny", address, tmp_path) == expected
    # From the cache, without a hub.
    nowhere = "http://127.0.0.1:9"
    assert load("hf-hub:timm/tiny", nowhere, tmp_path, HF_HUB_OFFLINE="1") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:timm/none", "hf-hub:timm/none: the hub has no such model, or it is private"),
        ("hf-hub:timm/tiny@v9", "hf-hub:timm/tiny@v9: the hub refuses: 404"),
        ("hf-hub:timm/empty", "it has none of model.safetensors, pytorch_model.bin"),
        ("hf-hub:me/private", "log in with 'hf auth login' or set HF_TOKEN"),
        ("hf-hub:me/broken", "config.json is not what timm writes"),
        ("hf-hub:a/b/c", "hf-hub:a/b/c: the hub refuses: Repo id must be in the form"),
    ],
)
@pytest.mark.exhaustive
def test_what_the_hub_does_not_have(hub, tmp_path, name, message):
    address, _ = hub
    said = load(name, address, tmp_path)
    assert said.startswith("CheckpointError")
    assert message in said


@pytest.mark.exhaustive
def test_a_token_and_a_revision(hub, tmp_path):
    address, _ = hub
    assert load("hf-hub:me/private", address, tmp_path, HF_TOKEN=TOKEN).endswith("ReLU")
    assert load("hf_hub:timm/tiny@v1", address, tmp_path).endswith("ReLU")


@pytest.mark.exhaustive
def test_commands(hub, tmp_path):
    address, _ = hub
    for line, wanted in (
        ("predict examples/digits/3.png -c hf-hub:timm/tiny --json", '"label": "'),
        ("verify hf-hub:timm/tiny --sizes 16x16 --dtypes float32", "pass"),
        (f"export onnx hf-hub:timm/tiny -o {tmp_path}/m.onnx", "wrote"),
        ("bench hf-hub:timm/tiny --seconds 0 --providers eager,ours-reference", "16 px, batch 1"),
    ):
        code = f"""
            import sys
            from convmixer_fast.commands.cli import main
            sys.argv = ["convmixer-fast", *{line.split()!r}]
            main()
        """
        done = run(code, address, tmp_path / "cache")
        assert done.returncode == 0, done.stdout + done.stderr
        assert wanted in done.stdout


@pytest.mark.exhaustive
def test_upload_and_back(hub, tmp_path):
    address, files = hub
    code = f"""
        import torch, convmixer_fast
        from convmixer_fast import FusedConvMixer
        fast = convmixer_fast.optimize(convmixer_fast.load("hf-hub:timm/tiny"))
        print(fast.push_to_hub("me/fast", token={TOKEN!r}))
        back = FusedConvMixer.from_pretrained("me/fast")
        x = torch.randn(2, 3, 16, 16)
        print(torch.equal(back(x), fast(x)))
        try:
            FusedConvMixer.from_pretrained("timm/tiny")
        except convmixer_fast.ExportedFileError as error:
            print(error)
    """
    done = run(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    url, same, refused = done.stdout.splitlines()
    assert "/me/fast/commit/" in url
    assert same == "True"
    assert "convmixer_fast.load('hf-hub:...')" in refused
    assert sorted(files["me/fast"]) == ["README.md", "config.json", "model.safetensors"]
    assert b'from_pretrained("me/fast")' in files["me/fast"]["README.md"]


def test_names():
    assert hub_repository("hf-hub:a/b@v1") == Repository("a/b", "v1")
    assert hub_repository("model.safetensors") is None
    assert str(hub_repository("hf_hub:a/b")) == "hf-hub:a/b"


def test_labels_as_transformers_has_them(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"id2label": {"0": "a", "1": "b"}, "activation": "gelu"}))
    said = metadata_of(path, Repository("a/b", None))
    assert json.loads(said["labels"]) == ["a", "b"]
    assert said["activation"] == "gelu"
    path.write_text(json.dumps({"id2label": {"0": "a", "7": "b"}}))
    with pytest.raises(CheckpointError, match="is not what timm writes"):
        metadata_of(path, Repository("a/b", None))


@pytest.mark.parametrize(
    "name", ["reference", "reference-catavgmax", "reference-no-pool", "shared-layers", "labml"]
)
@pytest.mark.parametrize(
    "dtype", sparse([torch.float32, torch.bfloat16], lambda dtype: dtype == torch.float32, ids=str)
)
def test_a_folder_and_back(tmp_path, name, dtype):
    variation = VARIATIONS[name]
    fast = optimize(variation.model(), dtype=dtype)
    fast.pretrained_cfg = {"input_size": (3, 30, 37)}
    assert fast.save_pretrained(tmp_path / "new" / "folder") is None
    back = FusedConvMixer.from_pretrained(tmp_path / "new" / "folder", backend="cpu")
    assert back.pretrained_cfg == {"input_size": [3, 30, 37]}
    assert back.backend == "cpu"
    x = variation.image().to(dtype)
    with torch.inference_mode():
        assert torch.equal(back(x), fast(x))


@pytest.mark.exhaustive
def test_8_bits_and_back(model, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    images = torch.rand(6, 3, 16, 16)
    fast = optimize(model, precision="int8", calibration=images, progress=False)
    fast.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    optimize(model).save_pretrained(tmp_path / "float32")
    assert size < (tmp_path / "float32" / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "config.json").read_text())["quantization"]["images"] == 6
    back = FusedConvMixer.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(back(images), fast(images))


def test_what_is_code_is_not_written(tmp_path):
    with pytest.raises(UnsupportedModelError, match="found a head of its own; save the module by"):
        optimize(VARIATIONS["two-heads"].model()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="found modules before the stem"):
        optimize(VARIATIONS["normalized-in-front"].model()).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _without(name):
    return lambda said, tensors: tensors.pop(name)


def _said(name, value):
    return lambda said, tensors: said.__setitem__(name, value)


def _tensor(name, tensor):
    return lambda said, tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_said("format", 2), "expected a folded ConvMixer of format 1, found 2"),
        (_said("library_name", "timm"), "expected what save_pretrained wrote"),
        (_said("layers", 5), "expected a list of layers"),
        (_said("layers", [{"at": 3}]), "expected a layer with its place"),
        (_said("stem", "mish"), "stem: found the activation 'mish'"),
        (_said("global_pool", "sum"), "found the pooling 'sum'"),
        (_said("pretrained_cfg", 5), "pretrained_cfg is no object"),
        (_without("stem.weight"), "stem: expected a weight of four dimensions"),
        (_without("head.weight"), "found tensors that no part has: .'head.bias'"),
        (_tensor("more", torch.zeros(1)), "found tensors that no part has: .'more'"),
        (_tensor("stem.bias", torch.zeros(15)), "stem.bias: expected 16 numbers"),
        (_tensor("stem.scale", torch.zeros(16).half()), "stem.scale: expected floating-point num"),
        (_tensor("stem.weight", torch.zeros(16, 3, 4, 4).int()), "stem: expected floating-point"),
        (_tensor("layers.0.depthwise.weight", torch.zeros(16, 1, 4, 4)), "with odd K"),
        (_tensor("layers.0.depthwise.weight", torch.zeros(16, 1, 3, 5)), "with odd K"),
        (_tensor("layers.1.pointwise.weight", torch.zeros(16, 8, 1, 1)), r"weight \(C, 16, 1, 1"),
        (_tensor("head.weight", torch.zeros(5, 17)), r"expected a pooling and a weight"),
        (_tensor("stem.quantization.zero_point", torch.zeros(())), "stem: expected all of"),
    ],
)
def test_files_that_lie(model, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    optimize(model).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    change(said, tensors)
    (tmp_path / "config.json").write_text(json.dumps(said))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportedFileError, match=message):
        FusedConvMixer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files(model, tmp_path, name):
    optimize(model).save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExportedFileError, match="no module that was saved"):
        FusedConvMixer.from_pretrained(tmp_path)


def test_a_module_that_is_one_already_is_said(model, tmp_path):
    optimize(model).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="optimized already"):
        optimize(FusedConvMixer.from_pretrained(tmp_path))
    optimize(nn.Sequential(model))
