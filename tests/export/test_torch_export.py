""".pt2 files: what they compute, and that they need nothing of this package."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from convmixer_fast import UnsupportedModelError
from convmixer_fast.accuracy import relative_error
from convmixer_fast.errors import MismatchError
from convmixer_fast.export import to_torch_export, torch_export
from convmixer_fast.export.checks import LIMITS
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from tests.sweeps import sparse
from tests.variants import EVERY
from tests.zoo import VARIATIONS


@pytest.fixture
def model():
    return randomize(Architecture(24, 2, 5, 4, "gelu", 3, 7).build())


@pytest.mark.parametrize(
    ("name", "ops"),
    sparse(
        itertools.product(
            [
                *("two-heads", "segmentation-head", "normalized-in-front", "labml"),
                *("dilation-3-even", "squeeze-excite-twice", "maps-in-a-dictionary"),
            ],
            ["plain", "fused"],
        ),
        lambda point: point in (("two-heads", "plain"), ("squeeze-excite-twice", "fused")),
    ),
)
def test_variations(name, ops, tmp_path):
    variation = EVERY[name]
    model = variation.model()
    path = tmp_path / "model.pt2"
    to_torch_export(model, path, image_size=variation.shape[2:], ops=ops)
    loaded = torch.export.load(path).module()
    x = torch.randn(5, *variation.shape[1:])
    with torch.no_grad():
        assert relative_error(loaded(x), pytree.tree_map(torch.Tensor.double, model(x))) <= 2e-5


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_open_sizes_and_precisions(model, precision, tmp_path):
    path = tmp_path / "model.pt2"
    report = to_torch_export(model, path, image_size=16, precision=precision, dynamic_size=True)
    assert (report.path, report.precision) == (path, precision)
    assert all(check.error <= LIMITS[precision] for check in report.checks)
    loaded = torch.export.load(path).module()
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        precision
    ]
    model.double()
    for size in ((3, 3, 13, 30), (1, 3, 8, 9)):
        x = torch.randn(size)
        with torch.no_grad():
            assert relative_error(loaded(x.to(dtype)), model(x.double())) <= LIMITS[precision]


_ALONE = """
import sys
sys.modules["convmixer_fast"] = None  # an import of it fails
import torch
x = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
with torch.no_grad():
    torch.save(torch.export.load(sys.argv[1]).module()(x), sys.argv[2])
"""


@pytest.mark.exhaustive
def test_it_runs_without_this_package(model, tmp_path):
    path, found = tmp_path / "model.pt2", tmp_path / "out.pt"
    to_torch_export(model, path, image_size=16)
    command = [sys.executable, "-c", _ALONE, str(path), str(found)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    x = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(torch.load(found), model(x)) <= 1e-5
    # With this package's ops it needs them.
    to_torch_export(model, path, image_size=16, ops="fused")
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode != 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_compiled_by_aot_inductor(tmp_path):
    model = randomize(Architecture(8, 1, 3, 2, "relu", 3, 5).build())
    path = tmp_path / "model.pt2"
    to_torch_export(model, path, image_size=8, aot_inductor=True)
    loaded = torch._inductor.aoti_load_package(str(path))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(loaded(x), model(x)) <= 1e-5


def test_what_fails_its_check_is_not_kept(model, tmp_path, monkeypatch):
    real = torch_export.plain_module

    def spoilt(*args, **options):
        made = real(*args, **options)
        made[0].stem.weight.data[0] += 1
        return made

    monkeypatch.setattr(torch_export, "plain_module", spoilt)
    with pytest.raises(MismatchError, match="No file was kept"):
        to_torch_export(model, tmp_path / "model.pt2", image_size=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision must be one of 'float32', .*, got 'int8'"),
        ({"ops": "fast"}, "ops must be one of 'plain', 'fused', got 'fast'"),
        ({"ops": "fused", "aot_inductor": True}, "ops must be 'plain' with aot_inductor"),
    ],
)
def test_options_are_checked(model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_torch_export(model, tmp_path / "model.pt2", image_size=16, **options)


def test_other_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="image_size must be at least two patches, 8 x 8"):
        to_torch_export(model, tmp_path / "model.pt2", image_size=7, dynamic_size=True)
    with pytest.raises(ValueError, match="path must end in .pt2"):
        to_torch_export(model, tmp_path / "model.onnx", image_size=16)
    variation = VARIATIONS["untraceable-in-front"]
    with pytest.raises(UnsupportedModelError, match="cannot trace"):
        to_torch_export(variation.model(), tmp_path / "model.pt2", image_size=variation.shape[2:])
