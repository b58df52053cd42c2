"""What ``AutoModelForImageClassification.from_pretrained("timm/...")`` returns, optimized."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from convmixer_fast import optimize
from convmixer_fast.models.randomize import randomize
from tests.timm_models import import_timm

pytestmark = pytest.mark.timm
NAME = "convmixer_1024_20_ks9_p14"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as timm uploads it, read without a hub."""
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    folder = tmp_path_factory.mktemp("hub")
    model = randomize(import_timm().create_model(NAME, num_classes=5))
    save_file(model.state_dict(), folder / "model.safetensors")
    images = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    config = {"architecture": NAME, "num_classes": 5, "label_names": list("abcde")}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": images}))
    return folder


def test_calls_by_name_return_its_dataclass(folder):
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    fast = optimize(model)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected, found = model(pixel_values=x), fast(pixel_values=x)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_in_a_pipeline(folder):
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (300, 260, 3), np.uint8)
    before, after = (
        transformers.pipeline("image-classification", model=one, image_processor=processor)(
            Image.fromarray(pixels)
        )
        for one in (model, optimize(model))
    )
    assert [entry["label"] for entry in after] == [entry["label"] for entry in before]
    for one, other in zip(before, after, strict=True):
        assert other["score"] == pytest.approx(one["score"], rel=1e-4)
