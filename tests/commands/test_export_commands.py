"""``convmixer-fast export``, as a user types it; and one photograph through every runtime."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from convmixer_fast import optimize
from convmixer_fast.commands import cli
from convmixer_fast.export import OnnxModule, to_onnx, to_torch_export
from convmixer_fast.models.images import load_image
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convmixer-fast", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, " ".join(out.split()), " ".join(err.split())

    return call


@pytest.fixture
def checkpoint(tmp_path):
    model = randomize(Architecture(16, 2, 3, 4, "relu", 3, 3).build())
    metadata = {
        "activation": "relu",
        "image_size": "16",
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.25, 0.25, 0.25]",
        "labels": json.dumps(["cat", "dog", "none"]),
    }
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(20):
        pixels = generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_onnx(run, checkpoint, tmp_path):
    path = tmp_path / "model.onnx"
    code, out, _ = run("onnx", checkpoint, "-o", path, "--precision", "float16", "--float32-io")
    assert code == 0
    assert "random images (2): " in out
    assert f"wrote {path}" in out
    module = OnnxModule(path)
    assert module.description.labels == ("cat", "dog", "none")
    assert module.description.preprocessing.mean == (0.5, 0.5, 0.5)
    assert module(torch.zeros(3, 3, 16, 16)).shape == (3, 3)


def test_int8_with_pictures(run, checkpoint, pictures, tmp_path):
    path = tmp_path / "model.onnx"
    code, out, _ = run(
        *("onnx", checkpoint, "-o", path, "--precision", "int8", "--calibration", pictures),
        *("--calibration-method", "percentile", "--quantize-depthwise", "--fixed-batch"),
    )
    assert code == 0
    assert "layers.1.depthwise/Conv" in out
    assert "calibration images (16): " in out
    assert OnnxModule(path)(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_pt2_and_triton_server(run, checkpoint, tmp_path):
    path = tmp_path / "model.pt2"
    code, out, _ = run("pt2", checkpoint, "-o", path, "--any-size", "--ops", "fused")
    assert (code, f"wrote {path}" in out) == (0, True)
    assert run("onnx", checkpoint, "-o", tmp_path / "model.onnx", "--any-size")[0] == 0
    code, out, _ = run(
        *("triton-server", tmp_path / "model.onnx", "-o", tmp_path / "models", "--name", "mixer"),
        *("--preferred-batches", "4,8", "--device", "cpu"),
    )
    assert (code, f"wrote {tmp_path / 'models' / 'mixer'}" in out) == (0, True)
    assert (tmp_path / "models" / "mixer" / "labels.txt").read_text() == "cat\ndog\nnone\n"


def test_calibration_images_that_cannot_be_read(run, checkpoint, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no picture")
    classes = tmp_path / "classes"
    for number in range(3):
        (classes / str(number)).mkdir(parents=True)
        shutil.copy(pictures / f"{number}.png", classes / str(number))
    code, out, err = run(
        *("onnx", checkpoint, "-o", tmp_path / "model.onnx", "--precision", "int8"),
        *("--calibration", pictures, "--validation", classes),
    )
    assert code == 0
    assert "skipped" in err
    assert "broken.png" in err
    assert "calibration images (16)" in out
    assert "calibration images with the class of float32: " in out
    assert "right of the validation images: model " in out
    for folder in (classes / "0", classes):
        for file in folder.rglob("*.png"):
            file.write_bytes(b"no picture")
    arguments = ("onnx", checkpoint, "-o", tmp_path / "m.onnx", "--precision", "int8")
    assert "none of 1 images could be read" in run(*arguments, "--calibration", classes / "0")[2]
    message = "expected folders called 0, 1 ..., one for each class"
    assert message in run(*arguments, "--calibration", pictures, "--validation", pictures)[2]


RANDOM = "--random-weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "no-such-model", "-o", "x.onnx"), "'no-such-model' is no file"),
        (("onnx", "8/1/3", "-o", "x.onnx"), "are four numbers, such as 256/8/5/2, got 3"),
        (("pt2", "8/1/3/2", "-o", "x.onnx", RANDOM), "path must end in .pt2"),
        (("triton-server", "x.onnx", "-o", "models"), "no file at x.onnx"),
        (("triton-server", "x", "-o", "m", "--preferred-batches", "a"), "must be like 8,16"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


NAMES = ["convmixer_768_32", "8/1/3/2"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["onnx", "pt2", "tensorrt"])
def test_random_weights_are_asked_for(run, tmp_path, command, name):
    """Nothing that is kept has weights that nobody trained, unless somebody wanted them."""
    path = tmp_path / {"onnx": "m.onnx", "pt2": "m.pt2", "tensorrt": "m.plan"}[command]
    code, _, err = run(command, name, "-o", path)
    assert code == 2
    assert f"{name} names an architecture, and an export of it would have random weights; " in err
    assert "--pretrained" in err
    assert "--random-weights" in err
    assert not list(tmp_path.iterdir())


def test_random_weights_are_said(run, tmp_path):
    path = tmp_path / "model.onnx"
    code, out, _ = run("onnx", "8/1/3/2", "-o", path, "--random-weights", "--image-size", 8)
    assert code == 0
    assert "the weights are random" in out
    assert OnnxModule(path).description.weights == "random"
    path = tmp_path / "model.pt2"
    assert run("pt2", "8/1/3/2", "-o", path, "--random-weights", "--image-size", 8)[0] == 0
    extra = {"convmixer_fast.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["convmixer_fast.json"])["weights"] == "random"
    arguments = ["onnx", "8/1/3/2", "-o", path, "--random-weights", "--pretrained"]
    assert "exclude each other" in run(*arguments)[2]


def test_trained_weights_are_not_called_random(run, checkpoint, tmp_path):
    path = tmp_path / "model.onnx"
    assert run("onnx", checkpoint, "-o", path)[0] == 0
    assert OnnxModule(path).description.weights == ""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_photograph_has_the_same_top_5_everywhere(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = tmp_path / "photograph.png"
    Image.fromarray(datasets.load_sample_images().images[0]).save(photograph)
    model = randomize(PUBLISHED["convmixer_768_32"].build())
    image = load_image(photograph, Preprocessing())[None]
    to_onnx(model, tmp_path / "model.onnx", images=image)
    to_torch_export(model, tmp_path / "model.pt2", images=image)
    with torch.no_grad():
        logits = {
            "PyTorch": model(image),
            "this package": optimize(model)(image),
            "ONNX Runtime": OnnxModule(tmp_path / "model.onnx")(image),
            ".pt2": torch.export.load(tmp_path / "model.pt2").module()(image),
        }
    top = {name: values.topk(5).indices.tolist() for name, values in logits.items()}
    print(top)
    assert all(found == top["PyTorch"] for found in top.values())
