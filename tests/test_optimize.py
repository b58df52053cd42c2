"""optimize(): the same outputs as the source."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from convmixer_fast import (
    BackendUnavailableError,
    ConvMixer,
    FusedConvMixer,
    UnsupportedModelError,
    fold,
    optimize,
    recognize,
)
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.published import PUBLISHED
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.module_cases import assert_same
from tests.sweeps import sparse
from tests.timm_models import timm_convmixer, timm_model
from tests.variants import EVERY, IN_EVERY_RUN


@pytest.fixture
def model():
    return randomize(ConvMixer(24, 2, kernel_size=5, patch_size=4, num_classes=7))


@pytest.fixture
def fast(model):
    return optimize(model)


@pytest.fixture
def x():
    return torch.randn(3, 3, 30, 37)


LIVE = [
    name
    for name in backends.BACKENDS
    if name != "triton" and backends.why_not(name, torch.device("cpu"), torch.float32) is None
]


def assert_every_backend_as_accurate(model, images):
    """Compare eager and every live backend with the float64 model, worst over all images.

    The worst of a few roundings is luck; many images make it a property.
    """
    folded = fold(recognize(model))
    candidates = {name: FusedConvMixer(folded, name) for name in LIVE}
    candidates["eager"] = model
    exact = copy.deepcopy(model).double()
    errors = {name: [] for name in candidates}
    with torch.inference_mode():
        for image in images:
            truth = exact(image.double())
            for name, candidate in candidates.items():
                errors[name].append(relative_error(candidate(image), truth))
    # Python's max() would pass over a NaN.
    worst = {name: torch.tensor(values).max().item() for name, values in errors.items()}
    for name in LIVE:
        assert worst[name] <= 2e-5, worst
        assert worst[name] <= 2 * worst["eager"], worst


@pytest.mark.parametrize("name", sparse(EVERY, IN_EVERY_RUN.__contains__))
def test_variations_compute_the_same(name):
    variation = EVERY[name]
    assert_every_backend_as_accurate(variation.model(), map(variation.image, range(32)))


@pytest.mark.timm
@pytest.mark.parametrize("name", sparse(PUBLISHED, "convmixer_768_32".__eq__))
def test_published_models_compute_the_same(name):
    model = randomize(timm_model(name))
    images = [torch.randn(1, 3, 84, 99), torch.randn(2, 3, 56, 56)]
    assert_every_backend_as_accurate(model, images)


@pytest.mark.timm
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_timm_with_other_arguments(pool):
    model = randomize(
        timm_convmixer(
            24, 2, kernel_size=5, patch_size=3, in_chans=4, num_classes=5 if pool else 0,
            global_pool=pool, act_layer=nn.ReLU, drop_rate=0.2,
        )
    )  # fmt: skip
    fast = optimize(model)
    x = torch.randn(2, 4, 20, 17)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        features = model.forward_features(x)
        torch.testing.assert_close(fast.forward_features(x), features)
        for pre_logits in (False, True):
            torch.testing.assert_close(
                fast.forward_head(features, pre_logits=pre_logits),
                model.forward_head(features, pre_logits=pre_logits),
            )
        for options in ({}, {"indices": 1}, {"indices": [0], "stop_early": True}):
            ours = fast.forward_intermediates(x, **options)
            torch.testing.assert_close(ours, model.forward_intermediates(x, **options))
    assert fast.num_classes == model.num_classes
    assert fast.num_features == model.num_features
    assert fast.head_hidden_size == model.head_hidden_size


@pytest.mark.timm
def test_what_timm_reads_of_a_model_is_kept():
    model = timm_model("convmixer_1024_20_ks9_p14", num_classes=3)
    assert optimize(model).pretrained_cfg == model.pretrained_cfg


@pytest.mark.timm
@pytest.mark.parametrize("indices", [[0, 2], [-1], 2])
def test_timms_feature_wrapper(indices):
    """Around an optimized model, and optimized itself."""
    model = randomize(timm_convmixer(24, 4, kernel_size=5, patch_size=4, num_classes=7))
    from timm.models._features import FeatureGetterNet

    theirs = FeatureGetterNet(copy.deepcopy(model), out_indices=indices)
    around = FeatureGetterNet(optimize(model), out_indices=indices)
    inside = optimize(theirs)
    x = torch.randn(2, 3, 20, 24)
    with torch.no_grad():
        for found in (around(x), inside(x)):
            torch.testing.assert_close(found, theirs(x))
    assert inside.explain(x).one_call
    assert len(around.model.blocks) == len(theirs.model.blocks) == len(inside.blocks)
    for name in ("channels", "reduction", "module_name"):
        assert getattr(around.feature_info, name)() == getattr(theirs.feature_info, name)()


@pytest.mark.timm
def test_timms_own_checks_of_a_model():
    """What its tests ask of every model: shapes, finite numbers, other heads, features."""
    model = randomize(timm_model("convmixer_1024_20_ks9_p14", num_classes=42))
    fast, x = optimize(model), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        logits = fast(x)
        assert logits.shape == (1, 42)
        assert logits.isfinite().all()
        features = fast.forward_features(x)
        assert features.shape[1] == fast.num_features
        assert fast.forward_head(features, pre_logits=True).shape == (1, fast.head_hidden_size)
        last, maps = fast.forward_intermediates(x)
        assert len(maps) == len(fast.feature_info) == 20
        assert [m.shape[1] for m in maps] == [row["num_chs"] for row in fast.feature_info]
        assert {96 // m.shape[-1] for m in maps} <= {16, fast.feature_info[0]["reduction"]}
        torch.testing.assert_close(last, features)
        fast.reset_classifier(0)
        assert fast(x).shape == (1, fast.num_features)
        fast.reset_classifier(0, "")
        assert fast(x).shape == features.shape
        fast.reset_classifier(3, "avg")
        assert fast(x).shape == (1, 3)
    assert fast.pretrained_cfg["first_conv"] == "stem.0"


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (31, 64), (64, 31), (224, 224)])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_any_batch_and_size(fast, model, size, batch):
    assert_same(fast, model, torch.randn(batch, 3, *size))


def test_large_batch(fast, model):
    assert_same(fast, model, torch.randn(300, 3, 16, 16))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[..., ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: torch.cat((x, x), 1)[:, 2:5],
    ],
    ids=["channels-last", "strided", "transposed", "expanded", "slice-of-wider"],
)
def test_any_memory_format(fast, model, x, view):
    assert_same(fast, model, view(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(fast, model, x, mode):
    with mode():
        out = fast(x)
    assert not out.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(out.clone(), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(fast, model, dtype):
    x = torch.randn(32, 3, 30, 37)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        ours, theirs = fast(x), model(x)
    assert ours.dtype == theirs.dtype == dtype
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


def test_nan_stays_nan(fast, x):
    x[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        out = fast(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_an_optimized_model_is_not_optimized_again(fast):
    with pytest.raises(UnsupportedModelError, match="is optimized already"):
        optimize(fast)


def test_backend_names(model):
    with pytest.raises(ValueError, match="backend must be 'auto' or one of.*got 'gpu'"):
        optimize(model, backend="gpu")
    assert optimize(model, backend="reference").backend == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_named_backend_runs_or_raises(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run.*(CUDA|installed)"):
        optimize(model, backend="triton")


def test_the_user_is_told_when_nothing_fast_is_live(model, monkeypatch):
    broken = replace(backends._BACKENDS["cpu"], why_not=lambda device: "not built")
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken)
    with pytest.warns(RuntimeWarning, match="no fast backend.*plain PyTorch.*cpu: not built"):
        optimize(model)
