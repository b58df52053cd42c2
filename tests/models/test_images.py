"""Image files become what timm makes of them."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer_fast import CheckpointError
from convmixer_fast.models import images
from convmixer_fast.models.preprocessing import Preprocessing, preprocessing_from_metadata
from tests.timm_models import timm_transform


@pytest.fixture
def picture(tmp_path):
    def make(width=90, height=61, mode="RGB", name="picture.png"):
        channels = len(Image.new(mode, (1, 1)).getbands())
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
        path = tmp_path / name
        Image.fromarray(pixels.squeeze(), mode).save(path)
        return path

    return make


@pytest.mark.timm
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64), (300, 200), (33, 1000)])
@pytest.mark.parametrize("crop", [(56, 0.96), (64, 1.0), (31, 0.875)])
def test_as_timm_does(picture, size, crop):
    path = picture(*size)
    prepare = Preprocessing(image_size=crop[0], crop_pct=crop[1])
    ours = images.load_image(path, prepare)
    theirs = timm_transform(prepare)(Image.open(path))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("saved", ["L", "RGB", "RGBA"])
def test_channels(picture, channels, mode, saved):
    prepare = Preprocessing(image_size=32, crop_pct=1.0, mean=(0.5,), std=(0.25,))
    path = picture(32, 32, saved)
    out = images.load_image(path, prepare, channels)
    assert out.shape == (channels, 32, 32)
    pixels = np.asarray(Image.open(path).convert(mode), np.float32).reshape(32, 32, channels)
    expected = torch.from_numpy((pixels / 255 - 0.5) / 0.25).permute(2, 0, 1)
    torch.testing.assert_close(out, expected)


def test_channels_that_no_image_has(picture):
    with pytest.raises(ValueError, match="1, 3 or 4 channels, and the model takes 7"):
        images.load_image(picture(), Preprocessing(), 7)
    with pytest.raises(ValueError, match="mean must have 1 or 4 values, got 3"):
        images.load_image(picture(), Preprocessing(), 4)


@pytest.mark.parametrize("size", [(1, 5000), (20_000, 1), (1, 1_000_000), (3, 400)])
def test_thin_pictures_take_little_memory(tmp_path, size):
    """Resized whole, the second one would have 4.7 million columns."""
    width, height = size
    across = np.random.default_rng(0).integers(0, 256, min(size), np.uint8)
    pixels = np.resize(across, (height, width)) if height > width else np.empty((height, width))
    if width >= height:
        pixels[:] = across[:, None]
    path, prepare = tmp_path / "thin.png", Preprocessing(image_size=32)
    Image.fromarray(pixels.astype(np.uint8), "L").save(path)
    tracemalloc.start()
    try:
        out = images.load_image(path, prepare)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    # It is the same along its length, and so as a shorter piece of it.
    short = Image.fromarray(pixels[:90, :90].astype(np.uint8), "L").convert("RGB")
    expected = images.to_input(images.crop(short, prepare), prepare)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)


def test_a_pipe_is_no_picture(tmp_path):
    """Opened, it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no regular file"):
        images.load_image(tmp_path / "pipe.png", Preprocessing())


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "WEBP", "TIFF", "GIF", "ICO", "TGA", "SGI", "PCX"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_of_any_kind(tmp_path, kind):
    """Whatever a reader raises, and whatever the file is called."""
    if kind not in Image.SAVE:
        Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"needs a Pillow that writes {kind}")
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels, "RGB").save(path, kind)
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(1)
    failed = 0
    for _ in range(60):
        damaged = content[: generator.integers(1, len(content))]
        for at in generator.integers(0, len(damaged), 4):
            damaged[at] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            images.load_image(path, Preprocessing(image_size=16))
        except OSError:  # anything else fails the test
            failed += 1
    assert failed > 10


@pytest.mark.parametrize("damage", ["missing", "text", "empty", "truncated", "corrupt"])
def test_bad_files_are_os_errors(picture, tmp_path, damage):
    path = picture(name="bad.png")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "text": b"not an image",
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "corrupt": content[:60] + b"\0" * 40 + content[100:],
            }[damage]
        )
    with pytest.raises(OSError, match=r"cannot read the image .*bad\.png"):
        images.load_image(path, Preprocessing())


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, mode):
    path = tmp_path / "deep.tiff"
    Image.new(mode, (9, 9)).save(path)
    with pytest.raises(OSError, match=rf"cannot read .*mode {mode}.*convert it to 8 bits"):
        images.load_image(path, Preprocessing())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"crop_pct": 0.0}, "crop_pct must be above 0 and at most 1, got 0"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1, got 1.5"),
        ({"std": (0.0,)}, "std must be above 0"),
    ],
)
def test_impossible_preprocessing(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


def test_a_decompression_bomb_is_an_os_error(picture, monkeypatch):
    path = picture()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="decompression bomb"):
        images.load_image(path, Preprocessing())


def test_directories(picture, tmp_path):
    first, second = picture(name="b.png"), picture(name="a.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    inner = tmp_path / "inner"
    inner.mkdir()
    third = first.rename(inner / "c.PNG")
    assert images.find_images([tmp_path]) == [second, third]
    named = tmp_path / "notes.txt"
    assert images.find_images([named, inner]) == [named, third]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no image files in the directory"):
        images.find_images([empty])


@pytest.mark.parametrize(
    "text", ["cat\ndog\n", '["cat", "dog"]', '{"1": "dog", "0": "cat"}', ' ["cat","dog"]']
)
def test_labels(tmp_path, text):
    path = tmp_path / "labels"
    path.write_text(text)
    assert images.read_labels(path) == ["cat", "dog"]


def test_labels_with_gaps(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"0": "cat", "2": "dog"}')
    with pytest.raises(ValueError, match="expected the keys 0, 1, 2 ..., '1' is missing"):
        images.read_labels(path)


def test_broken_labels(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match=r"labels\.json: the labels are broken JSON"):
        images.read_labels(path)


def test_metadata():
    metadata = {"image_size": "8", "crop_pct": "1.0", "mean": "[0.3]", "std": "[0.4]"}
    found = preprocessing_from_metadata({**metadata, "activation": "gelu"})
    assert found == Preprocessing(8, 1.0, (0.3,), (0.4,))
    assert preprocessing_from_metadata({}) == Preprocessing()
    for name, value in (("mean", "half"), ("std", "x"), ("image_size", "[]")):
        with pytest.raises(CheckpointError, match="states its preprocessing wrongly"):
            preprocessing_from_metadata({**metadata, name: json.dumps(value)})
