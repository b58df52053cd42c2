"""The command line, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from convmixer_fast.commands import cli
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.paths import DIGITS, ROOT
from tests.sweeps import sparse
from tests.timm_models import import_timm


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``convmixer-fast`` and return (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convmixer-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, " ".join(err.split())

    return call


@pytest.fixture
def checkpoint(tmp_path):
    model = randomize(Architecture(16, 2, 3, 4, "relu", 1, 3).build())
    path = tmp_path / "model.safetensors"
    metadata = {
        "activation": "relu",
        "image_size": "16",
        "crop_pct": "1.0",
        "mean": "[0.5]",
        "std": "[0.5]",
        "labels": '["cat", "dog", "cow"]',
    }
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("info", "demo", "verify", "predict"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert "--help" in text


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    for backend in ("triton", "cpu", "reference"):
        assert backend in out
    code, out, _ = run("info", "--json")
    rows = {row["name"]: row for row in json.loads(out)["backends"]}
    assert rows["reference"]["live"]
    assert all(row["detail"] for row in rows.values())


def test_module_form():
    done = subprocess.run(
        [sys.executable, "-m", "convmixer_fast", "info"], capture_output=True, text=True, check=True
    )
    assert "reference" in done.stdout


@pytest.mark.parametrize("model", ["24/2/5/4", "checkpoint"])
def test_verify(run, checkpoint, model):
    name = checkpoint if model == "checkpoint" else model
    code, out, _ = run("verify", name, "--sizes", "16x16,21x33")
    assert code == 0
    assert out.count(" pass ") == 6
    assert ("trained" if model == "checkpoint" else "random") + " weights" in out.replace("\n", " ")


@pytest.mark.timm
@pytest.mark.exhaustive
def test_verify_takes_timm_names(run):
    import_timm()
    options = ("--sizes", "28x28", "--dtypes", "float32", "--batch", 1)
    code, out, _ = run("verify", "convmixer_1024_20_ks9_p14", *options)
    assert code == 0
    assert "pass" in out
    code, _, err = run("verify", "resnet18", *options)
    assert code == 2
    assert "UnsupportedModelError: stem (conv1): expected a patch convolution" in err


def test_verify_fails_on_a_wrong_result(run, monkeypatch):
    from convmixer_fast import verify

    right = verify.optimize

    def wrong(model, **options):
        fast = right(model, **options)
        with torch.no_grad():
            fast.stem.shift[0] += 1
        return fast

    monkeypatch.setattr(verify, "optimize", wrong)
    code, out, _ = run("verify", "24/2/5/4", "--sizes", "16x16")
    assert code == 1
    assert out.count("FAIL") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "nothing_such"), "'nothing_such' is no file"),
        (("verify", "8/1/3/2", "--sizes", "12"), "sizes must be like 224x224,56x70"),
        (("verify", "8/1/3/2", "--sizes", "1x9"), "a size of 1x9 is smaller than a patch of 2"),
        (("verify", "8/1/3/2", "--dtypes", "int8"), "dtypes must be one of 'float32'"),
        (
            ("predict", "x.png", "-c", "gone.pth"),
            "FileNotFoundError: no checkpoint file at gone.pth",
        ),
    ],
)
def test_expected_errors_are_one_line(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_predict(run, checkpoint, pictures):
    code, out, _ = run("predict", pictures, "--checkpoint", checkpoint, "--top", 2)
    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(pictures / name) for name in ("a.png", "b.jpg", "c.bmp")
    ]
    assert len(lines) == 9
    assert any(name in out for name in ("cat", "dog", "cow"))


def test_verify_takes_the_packaged_model(run):
    code, out, _ = run("verify", DIGITS, "--sizes", "8x8,9x13", "--batch", 64)
    assert code == 0
    assert "trained weights" in out.replace("\n", " ")


@pytest.mark.exhaustive
def test_results_go_to_a_file_while_errors_go_to_a_terminal(checkpoint, pictures, tmp_path):
    """With a terminal on standard error, where a progress bar is shown."""
    import os
    import pty

    leader, terminal = pty.openpty()
    with open(tmp_path / "out", "w+") as out:
        command = [sys.executable, "-m", "convmixer_fast", "predict", pictures, "-c", checkpoint]
        done = subprocess.run([*command, "--json"], stdout=out, stderr=terminal, check=False)
        out.seek(0)
        lines = out.read().splitlines()
    os.close(terminal)
    os.close(leader)
    assert done.returncode == 0
    assert [Path(json.loads(line)["image"]).name for line in lines] == ["a.png", "b.jpg", "c.bmp"]


def test_predict_warns_of_another_activation(run, checkpoint, pictures, caplog):
    code, _, _ = run("predict", pictures, "-c", checkpoint, "--activation", "gelu")
    assert code == 0
    assert "the activation is gelu, as asked, although the checkpoint's is relu" in caplog.text


def test_predict_is_the_model_on_prepared_pixels(run, checkpoint, pictures):
    from convmixer_fast import load

    picture = pictures / "a.png"
    code, out, _ = run("predict", picture, "-c", checkpoint, "--json", "--top", 3)
    assert code == 0
    found = json.loads(out)
    assert found["image"] == str(picture)
    image = Image.open(picture).convert("L").resize((19, 16), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((2, 0, 18, 16)), np.float32) / 255
    x = torch.from_numpy((pixels - 0.5) / 0.5)[None, None]
    with torch.no_grad():
        probabilities = load(checkpoint)(x).softmax(-1)[0]
    for entry in found["predictions"]:
        assert entry["label"] == ["cat", "dog", "cow"][entry["class"]]
        assert entry["probability"] == pytest.approx(probabilities[entry["class"]].item(), abs=1e-5)


def test_predict_skips_bad_images(run, checkpoint, pictures):
    (pictures / "bad.png").write_bytes(b"not an image")
    code, out, err = run("predict", pictures, "-c", checkpoint, "--json", "--batch", 2)
    assert code == 1
    assert len(out.splitlines()) == 3
    assert "skipped" in err
    assert "bad.png" in err
    assert "1 of 4 images could not be read" in err


@pytest.mark.parametrize("options", sparse([[], ["--json"]], lambda options: not options))
def test_predict_takes_names_that_are_no_text(checkpoint, pictures, options):
    """As a process of its own: standard output is UTF-8, which such names are not."""
    good = next(iter(sorted(pictures.iterdir())))
    good.rename(good.with_name(os.fsdecode(b"not\xfftext.png")))
    (pictures / os.fsdecode(b"bad\xff.png")).write_bytes(b"not an image")
    command = [sys.executable, "-m", "convmixer_fast", "predict", pictures, "-c", checkpoint]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "1 of 4 images could not be read" in done.stderr
    assert "text.png" in done.stdout


def test_predict_with_own_labels_and_preprocessing(run, checkpoint, pictures, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\nthree\n")
    options = ("--labels", labels, "--image-size", 8, "--mean", "0.1", "--std", "0.9")
    code, out, _ = run("predict", pictures, "-c", checkpoint, *options)
    assert code == 0
    assert "one" in out
    labels.write_text("one\ntwo\n")
    code, _, err = run("predict", pictures, "-c", checkpoint, *options)
    assert code == 2
    assert "expected 3 labels, one for each class, got 2" in err


def test_predict_asks_for_the_activation(run, tmp_path, pictures):
    path = tmp_path / "model.pth"
    torch.save(Architecture(16, 2, 3, 4, "gelu", 3, 3).build().state_dict(), path)
    code, _, err = run("predict", pictures, "-c", path)
    assert code == 2
    assert "cannot be read from its weights; pass activation=" in err
    code, out, _ = run("predict", pictures, "-c", path, "--activation", "gelu", "--image-size", 16)
    assert code == 0
    assert "%" in out


def test_predict_needs_a_classifier(run, tmp_path, pictures):
    path = tmp_path / "model.pth"
    torch.save(Architecture(16, 2, 3, 4, "gelu", 3, 0).build().state_dict(), path)
    code, _, err = run("predict", pictures, "-c", path, "--activation", "gelu")
    assert code == 2
    assert "the model has no classifier" in err


def test_version(run):
    from convmixer_fast import __version__

    code, out, _ = run("--version")
    assert (code, out) == (0, f"convmixer_fast {__version__}\n")


@pytest.mark.parametrize("command", ["bench", "standard"])
def test_what_a_report_needs_is_looked_for_first(run, tmp_path, monkeypatch, command):
    """By the command's own name, and before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "report.html"
    if command == "bench":
        code, _, err = run("bench", "8/1/3/2", "--report", path, "--image-size", 8)
        assert code == 2
        assert "bench --report needs matplotlib" in err
        assert "pip install 'convmixer-fast[bench]'" in err
    else:
        from typer.testing import CliRunner

        from convmixer_fast.benchmarks.__main__ import app

        result = CliRunner().invoke(app, ["standard", "--output", str(tmp_path)])
        assert "the standard run's report needs matplotlib" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_sample_pictures(run):
    code, out, _ = run("predict", ROOT / "examples" / "digits", "-c", DIGITS, "--top", 1, "--json")
    assert code == 0
    found = {}
    for line in out.splitlines():
        row = json.loads(line)
        found[Path(row["image"]).stem] = row["predictions"][0]["label"]
    assert found == {str(digit): str(digit) for digit in range(10)}


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        (("verify", "8/1/3/2", "--backend", "gpu"), "auto|triton|cpu|reference"),
        (("verify", "8/1/3/2", "--activation", "ReLU"), "gelu|gelu_tanh|relu|silu"),
        (("bench", "8/1/3/2", "--device", "gpu"), "auto|cuda|cpu"),
        (
            ("export", "onnx", "8/1/3/2", "-o", "x", "--precision", "fp16"),
            "float32|float16|bfloat16",
        ),
    ],
)
def test_choices_are_checked_and_named(run, arguments, accepted):
    code, _, err = run(*arguments)
    assert code == 2
    assert f"Invalid value for '{arguments[-2]}'" in err
    for word in accepted.split("|"):
        assert f"'{word}'" in err
