"""Every way of leaving the engine is said once, and explained whenever it is asked."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

from convmixer_fast import _C, InferenceOnlyError, optimize
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

ARCHITECTURE = Architecture(24, 3, 3, 2, "gelu", num_classes=5)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture(scope="module")
def optimized():
    model = randomize(ARCHITECTURE.build())
    return model, optimize(model, backend="cpu")


@pytest.fixture
def model(optimized):
    return copy.deepcopy(optimized[0])


@pytest.fixture
def fast(optimized):
    return copy.deepcopy(optimized[1])


def test_in_one_call(fast, caplog):
    found = fast.explain(X)
    assert (found.backend, found.one_call, found.reason, found.outside) == ("cpu", True, None, ())
    assert not found.ready
    with torch.inference_mode():
        fast(X)
    found = fast.explain(X)
    assert found.ready
    assert str(found).splitlines()[:2] == ["backend: cpu", "one call: True"]
    assert caplog.text == ""


def _hook(fast):
    fast.blocks[1].register_forward_hook(lambda *args: None)


def _hook_inside(fast):
    fast.blocks[1][0].register_forward_pre_hook(lambda *args: None)


def _forward(fast):
    layer = fast.blocks[0]
    layer.forward = type(layer).forward.__get__(layer)


def _other_layer(fast):
    fast.blocks[2] = nn.Sequential(fast.blocks[2], nn.Identity())


def _other_backend(fast):
    fast.blocks[0][0].backend = "reference"


WAYS = {
    "hook": (_hook, r"blocks\.1 has a forward hook"),
    "hook inside": (_hook_inside, r"blocks\.1\.0 has a forward hook"),
    "forward": (_forward, r"blocks\.0 has a forward of its own"),
    "other layer": (_other_layer, r"blocks\.2"),
    "other backend": (_other_backend, r"blocks\.0\.0 has the backend 'reference'"),
}


@pytest.mark.parametrize(("change", "reason"), WAYS.values(), ids=WAYS)
def test_changes_that_make_it_leave_are_said_once(change, reason, fast, model, caplog):
    change(fast)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(fast(X), model(X))
    found = fast.explain(X)
    assert not found.one_call
    (said,) = caplog.messages
    assert found.reason in said
    assert re.search(reason, found.reason), found.reason


def test_modes_and_subclasses_are_said(fast, caplog):
    with torch.no_grad(), Watch():
        fast(X)
        assert "dispatch mode" in fast.explain(X).reason
    with torch.no_grad():
        x = X.as_subclass(Subclass)
        fast(x)
        assert "a Subclass, a subclass of Tensor" in fast.explain(x).reason
    assert len(caplog.messages) == 2


def test_what_asks_for_single_operations_is_not_warned_of(fast, caplog):
    with torch.no_grad():
        torch.export.export(fast, (X,), strict=False)
        torch.compile(fast, backend="eager", fullgraph=True)(X)
    assert caplog.text == ""


def test_inputs_that_are_refused_are_left_to_the_ops(fast, caplog):
    with torch.no_grad(), pytest.raises(TypeError, match="must have one dtype"):
        fast(X.half())
    assert "the ops refuse torch.float16" in fast.explain(X.half()).reason
    with pytest.raises(InferenceOnlyError, match="no backward pass"):
        fast.explain(X.clone().requires_grad_())
    with pytest.raises(TypeError, match="expected a tensor"):
        fast.explain("x")
    assert caplog.text == ""


def test_other_backends_have_no_such_call(model, caplog):
    found = optimize(model, backend="reference").explain(X)
    assert not found.one_call
    assert found.reason == "the backend 'reference' has no call for all layers"
    assert caplog.text == ""


def test_heads_outside(model):
    model.reset_classifier(4, "max")
    fast = optimize(model.eval(), backend="cpu")
    assert fast.explain(X).outside == ("global_pool", "head_drop", "head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_one_call(fast, model, dtype, caplog):
    with torch.no_grad():
        exact = model.double()(X.double())
        model.float()
        with torch.autocast("cpu", dtype):
            ours, eager = fast(X), model(X)
            assert fast.explain(X).one_call
            assert fast.explain(X).dtype == dtype
    assert ours.dtype == eager.dtype == dtype
    error, eagers = (float((out - exact).abs().max()) for out in (ours, eager))
    assert error <= 2 * eagers
    assert caplog.text == ""


CHOICES = [None, 1, [0], [0, 2], [-1], [1, 1]]


@pytest.mark.parametrize("indices", CHOICES, ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_in_one_call(fast, model, indices, stop_early, monkeypatch, caplog):
    for layer in fast.blocks:
        # Op by op this would be called.
        monkeypatch.setattr(type(layer[0]), "forward", None)
    with torch.inference_mode():
        last, maps = fast.forward_intermediates(X, indices=indices, stop_early=stop_early)
        expected = model.forward_intermediates(X, indices=indices, stop_early=stop_early)
        torch.testing.assert_close(last, expected[0])
        torch.testing.assert_close(maps, expected[1])
        alone = fast.forward_intermediates(X, indices, intermediates_only=True)
        assert all(map(torch.equal, alone, maps))
        if not stop_early:
            assert torch.equal(last, fast.forward_features(X)), "the same bits"
    assert caplog.text == ""


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_intermediates_of_any_batch(fast, model, batch):
    x = torch.randn(batch, 3, 9, 11)
    with torch.inference_mode():
        last, maps = fast.forward_intermediates(x)
        expected = model.forward_intermediates(x)
    torch.testing.assert_close((last, *maps), (expected[0], *expected[1]))


def test_impossible_intermediates():
    block = (64, 64, 64, 64, 0)
    trunk = _C.Trunk(block, 3, 1, 1, 48)
    with pytest.raises(ValueError, match="outs must be from 1 to 1 addresses, got 0"):
        trunk.run_intermediates(64, [], 1, 8, 8, 1)
    with pytest.raises(ValueError, match="outs must be from 1 to 1 addresses, got 2"):
        trunk.run_intermediates(64, [64, 64], 1, 8, 8, 1)


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, "convmixer_fast")
