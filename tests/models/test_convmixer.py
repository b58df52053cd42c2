"""The reference model: timm's names and results, and trainable."""

import functools

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer
from convmixer_fast.models.convmixer import POOLS, GlobalPool
from convmixer_fast.models.published import PUBLISHED
from convmixer_fast.models.randomize import randomize
from tests.timm_models import timm_convmixer, timm_model

SMALL = {"kernel_size": 5, "patch_size": 3, "in_chans": 4, "num_classes": 5}


@pytest.mark.timm
@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_weights_load_unchanged(name):
    theirs = randomize(timm_model(name))
    ours = PUBLISHED[name].build()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 42, 56)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.timm
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, functools.partial(nn.GELU, approximate="tanh")])
def test_timms_interface(pool, act):
    options = {**SMALL, "num_classes": 5 if pool else 0, "global_pool": pool, "act_layer": act}
    theirs = randomize(timm_convmixer(24, 2, **options))
    ours = ConvMixer(24, 2, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 20, 17)
    with torch.no_grad():
        features = theirs.forward_features(x)
        assert torch.equal(ours.forward_features(x), features)
        for pre_logits in (False, True):
            torch.testing.assert_close(
                ours.forward_head(features, pre_logits=pre_logits),
                theirs.forward_head(features, pre_logits=pre_logits),
            )
    for classes, new_pool in ((3, "max"), (2, None), (0, "catavgmax"), (0, "")):
        shapes = []
        for model in (ours, theirs):
            model.reset_classifier(classes, new_pool)
            shapes.append((model(x).shape, model.head_hidden_size, model.num_classes))
        assert shapes[0] == shapes[1]
    assert isinstance(ours.get_classifier(), nn.Identity)


@pytest.mark.timm
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1]},
        {"indices": [1], "stop_early": True},
        {"indices": [0, 2], "intermediates_only": True},
    ],
)
def test_forward_intermediates(options):
    theirs = randomize(timm_convmixer(8, 3, kernel_size=3, patch_size=2, num_classes=2))
    ours = ConvMixer(8, 3, kernel_size=3, patch_size=2, num_classes=2).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options)
        )


def test_trains():
    model = ConvMixer(16, 2, kernel_size=3, patch_size=2, in_chans=1, num_classes=2, drop_rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["dim", "kernel_size", "patch_size", "in_chans"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ConvMixer(**{"dim": 8, "depth": 1, name: 0})


@pytest.mark.parametrize("name", ["depth", "num_classes"])
def test_numbers_must_not_be_negative(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        ConvMixer(**{"dim": 8, "depth": 1, name: -1})


def test_unknown_pooling():
    with pytest.raises(ValueError, match="global_pool must be one of 'avg'.*got 'mean'"):
        GlobalPool("mean")


def test_intermediates_checks_its_arguments():
    model = ConvMixer(8, 2, kernel_size=3, patch_size=2)
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match="from 1 to 2 layers, got 3"):
        model.forward_intermediates(x, 3)
    with pytest.raises(ValueError, match=r"within 2 layers, got \[5\]"):
        model.forward_intermediates(x, [0, 5])
