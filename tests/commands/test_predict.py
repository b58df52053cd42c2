"""``convmixer-fast predict``: forms of output, lists on standard input, turned pictures."""

import csv
import io
import json
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer_fast import optimize
from convmixer_fast.commands import cli, predict
from convmixer_fast.models.images import load_image
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.paths import DIGITS, ROOT

PICTURES = ROOT / "examples" / "digits"


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments, given=""):
        monkeypatch.setattr(sys, "argv", ["convmixer-fast", "predict", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return call


def test_csv(run):
    code, out, err = run(PICTURES, "-c", DIGITS, "--format", "csv", "--top", 2)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2 * len(list(PICTURES.glob("*.png")))
    assert list(rows[0]) == ["image", "rank", "class", "label", "probability"]
    best = {row["image"]: row for row in rows if row["rank"] == "1"}
    assert all(row["label"] in image for image, row in best.items())
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    assert "10 images, " in err
    assert "images/s" in err


def test_a_list_on_standard_input(run):
    given = f"{PICTURES / '3.png'}\n\n{PICTURES / '7.png'}\n"
    code, out, _ = run("-", "-c", DIGITS, "--json", "--top", 1, given=given)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["predictions"][0]["label"] for row in rows] == ["3", "7"]
    code, _, err = run("-", "-c", DIGITS, given=f"{PICTURES / '3.png'}\nnone.png\n")
    assert code == 1
    assert "skipped none.png" in err


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    # What a camera held so writes: the inverse of how a viewer turns it.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    prepare = Preprocessing(16, 0.9)
    found = load_image(tmp_path / "turned.png", prepare)
    assert torch.equal(found, load_image(tmp_path / "upright.png", prepare))


def test_threads_read_ahead_in_order(tmp_path, monkeypatch):
    """Readers are at work while the model is, and never more than two batches ahead."""
    model = optimize(randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build()))
    files = [PICTURES / f"{number % 10}.png" for number in range(23)]
    lock, read, computed = threading.Lock(), [], []
    right = predict.load_image

    def load(path, *arguments):
        with lock:
            read.append(len(computed))
        return right(path, *arguments)

    monkeypatch.setattr(predict, "load_image", load)
    prepare = Preprocessing(16, 0.9)
    for path, probabilities in predict.predict_files(model, files, prepare, batch=4):
        assert path == files[len(computed)]
        alone = right(path, prepare, 3)[None]
        with torch.inference_mode():
            expected = model(alone).softmax(-1)[0]
        torch.testing.assert_close(probabilities, expected)
        computed.append(path)
    assert len(read) == len(computed) == 23
    # The first image of batch n was asked for when n - 2 batches were done, or later.
    assert all(done >= 4 * (index // 4 - 2) - 4 for index, done in enumerate(read))


def test_whoever_stops_listening_does_not_wait(monkeypatch):
    model = optimize(randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build()))
    read = []
    right = predict.load_image
    monkeypatch.setattr(predict, "load_image", lambda path, *a: read.append(1) or right(path, *a))
    files = [PICTURES / "3.png"] * 1000
    results = predict.predict_files(model, files, Preprocessing(16, 0.9), batch=4)
    next(results)
    results.close()
    assert len(read) < 50
