"""What stands after the layers: writes, other dtypes and types, what resembles pooling.

Each of these once looked like something simpler than it is.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from convmixer_fast import optimize, recognize
from convmixer_fast.models.randomize import randomize
from convmixer_fast.spec import Head
from tests.recognition.before import same
from tests.zoo import Trunk, locuslab


def _masked(m, f, x):
    y = m.linear(f.mean((2, 3)))
    y[:, 0] = -100.0
    return y


def _squared(m, f, x):
    f.mul_(f)
    return m.linear(f.mean((2, 3)))


def _scaled(m, f, x):
    f.mul_(0.5)
    return m.linear(f.mean((2, 3)))


def _written_through_a_view(m, f, x):
    f[:, 0] = 5
    return f


def _in_place_relu(m, f, x):
    return m.linear(F.relu_(f).mean((2, 3)))


def _in_a_dictionary(m, f, x):
    y = m.linear(f.mean((2, 3))).softmax(-1)
    y[:, 0] = 0
    return {"a": y, "x": x}


@pytest.mark.parametrize(
    "head", [_masked, _squared, _written_through_a_view, _in_place_relu, _in_a_dictionary]
)
def test_heads_that_write(head):
    assert not isinstance(recognize(Trunk(head, 8).eval()).head, Head)
    same(Trunk(head, 8))


def test_a_scale_in_place_is_folded():
    assert isinstance(recognize(Trunk(_scaled, 8).eval()).head, Head)
    same(Trunk(_scaled, 8))


def _clamped(m, f, x):
    return m.linear(f.clamp(-10, 10).mean((2, 3)))


def _cropped(m, f, x):
    return m.linear(f[:, :, :7, :7].mean((2, 3)))


def _without_nan(m, f, x):
    return m.linear(torch.nan_to_num(f).mean((2, 3)))


@pytest.mark.parametrize("head", [_clamped, _cropped, _without_nan])
def test_heads_that_only_resemble_pooling(head):
    assert not isinstance(recognize(Trunk(head, 8).eval()).head, Head)
    same(Trunk(head, 8), [(2, 3, 64, 64)])


@pytest.mark.parametrize(
    "head",
    [
        lambda m, f, x: m.linear(F.adaptive_avg_pool2d(f, 1)[:, :, 0, 0]),
        lambda m, f, x: m.linear(f.flatten(2).mean(-1)),
        lambda m, f, x: m.linear(f.mean((-1, -2), keepdim=True).flatten(1)),
    ],
    ids=["indexed", "flattened", "kept"],
)
def test_ways_to_write_average_pooling(head):
    found = recognize(Trunk(head, 8).eval()).head
    assert isinstance(found, Head)
    assert found.global_pool == "avg"


@pytest.mark.parametrize(
    "head",
    [
        lambda m, f, x: m.linear(f.float().mean((2, 3))),
        lambda m, f, x: {"a": m.linear(f.float().mean((2, 3)))},
        lambda m, f, x: f.float().mean((2, 3)),
        lambda m, f, x: f.mean((2, 3), dtype=torch.float32),
    ],
    ids=["classifier", "dictionary", "pooled", "mean-dtype"],
)
def test_a_head_of_another_dtype_keeps_it(head):
    model = randomize(Trunk(head, 8))
    model.body.half()
    x = torch.randn(2, 3, 16, 16).half()
    fast = optimize(model)
    with torch.no_grad():
        for mine, theirs in zip(
            pytree.tree_leaves(fast(x)), pytree.tree_leaves(model(x)), strict=True
        ):
            assert mine.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "head",
    [
        lambda m, f, x: f.double().mean((2, 3)),
        lambda m, f, x: f.mean((2, 3)) > 0,
        lambda m, f, x: f.amax((2, 3)).long(),
    ],
    ids=["double", "bool", "long"],
)
def test_heads_of_other_types(head):
    same(Trunk(head, 8))


def test_batch_norm_after_pooling_is_a_head():
    model = nn.Sequential(*list(locuslab(8, 2, 3, 4))[:-1], nn.BatchNorm1d(8), nn.Linear(8, 3))
    same(model)
