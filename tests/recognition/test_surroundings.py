"""What stands before the stem and after the layers: writes, branches, dtypes, hooks.

Each of these once looked like something simpler than it is.
"""

import copy
import logging
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from convmixer_fast import UnsupportedModelError, optimize, recognize
from convmixer_fast.models.randomize import randomize
from convmixer_fast.spec import Head
from tests.zoo import Normalize, Trunk, locuslab


class Before(nn.Module):
    """A ConvMixer under a function of its image, and of its logits and that image."""

    def __init__(self, before, after=lambda y, x: y):
        super().__init__()
        self.model = locuslab(8, 2, 3, 4)
        self.before, self.after = before, after

    def forward(self, x):
        x = self.before(x)
        return self.after(self.model(x), x)


def same(model, shapes=((1, 3, 16, 20), (2, 3, 17, 31), (5, 3, 16, 16))):
    model = randomize(model)
    fast = optimize(model)
    for shape in shapes:
        x = torch.randn(shape)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(fast(mine), model(theirs), rtol=2e-5, atol=2e-5)
        # Where the source writes into its image, so does the optimized model.
        torch.testing.assert_close(mine, theirs)
    return fast


def _masked(m, f, x):
    y = m.linear(f.mean((2, 3)))
    y[:, 0] = -100.0
    return y


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
    "head", [_masked, _scaled, _written_through_a_view, _in_place_relu, _in_a_dictionary]
)
def test_heads_that_write(head):
    assert not isinstance(recognize(Trunk(head, 8).eval()).head, Head)
    same(Trunk(head, 8))


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


def _zero_a_channel(x):
    x = x.clone()
    x[:, 0] = 0
    return x


def _zero_a_channel_of_the_image(x):
    x[:, 0] = 0
    return x


def _normalize_in_place(x):
    x = x * 1.5
    for channel in range(3):
        x[:, channel].sub_(0.1 * channel).div_(0.5 + channel)
    return x


def _scale_the_image(x):
    x.mul_(0.5)
    x.sub_(0.25)
    return x


@pytest.mark.parametrize(
    "before",
    [_zero_a_channel, _zero_a_channel_of_the_image, _normalize_in_place, _scale_the_image],
)
@pytest.mark.parametrize("keeps_image", [False, True])
def test_preparations_that_write(before, keeps_image):
    same(Before(before, (lambda y, x: (y, x)) if keeps_image else (lambda y, x: y)))


@pytest.mark.parametrize(
    "after",
    [
        lambda y, x: y.view(2, x.shape[0], -1).mean(0),
        lambda y, x: y[: x.shape[0]] + y[x.shape[0] :],
        lambda y, x: y.reshape(2, -1, 10).amax(0),
    ],
    ids=["view", "slices", "reshape"],
)
def test_preparations_that_change_the_batch(after):
    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = locuslab(8, 2, 3, 4)

        def forward(self, x):
            return after(self.model(torch.cat((x, x.flip(-1)))), x)

    same(Flipped())


@pytest.mark.parametrize(
    ("head", "condition"),
    [
        (lambda m, f, x: m.linear(f.mean((2, 3))) * (2 if x.shape[0] == 1 else 1), "N"),
        (lambda m, f, x: m.linear(f.mean((2, 3))) * (2 if f.shape[2] == 1 else 1), "H"),
    ],
    ids=["batch", "patches"],
)
def test_code_that_asks_for_one_is_seen(head, condition):
    model = randomize(Trunk(head, 8))
    fast = optimize(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        alone = x[:1] if condition == "N" else x[:, :, :4]
        with pytest.raises(ValueError, match=f"recognised for sizes where .*{condition}"):
            fast(alone)


class MaskedWeight(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.model = locuslab(8, 1, 3, 4)
        self.in_place = in_place

    def forward(self, x):
        conv = self.model[0]
        weight = conv.weight if self.in_place else conv.weight.clone()
        weight[:, :, 0, 0] = 0
        return self.model[1:](F.conv2d(x, weight, conv.bias, stride=4))


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_written_in_the_forward_are_refused(in_place):
    model = randomize(MaskedWeight(in_place)).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="weights that the model's forward writes into"):
        recognize(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_hooks_are_traced_or_refused():
    def soften(module, inputs, output):
        return output.softmax(-1)

    model = nn.Sequential(Normalize(), locuslab(8, 1, 3, 4))
    model.register_forward_hook(soften)
    same(model)
    wrapped = nn.DataParallel(locuslab(8, 1, 3, 4).eval())
    wrapped.register_forward_hook(soften)
    with pytest.raises(UnsupportedModelError, match="DataParallel around the model has hooks"):
        recognize(wrapped)


def test_a_wrapper_of_ones_own_is_not_looked_through():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = locuslab(8, 1, 3, 4)

        def forward(self, x):
            return self._orig_mod(x) * 2

    class Doubled(nn.DataParallel):
        def forward(self, x):
            return self.module(x) * 2

    same(Own())
    same(Doubled(locuslab(8, 1, 3, 4)))


@pytest.mark.parametrize("front", [nn.BatchNorm2d(3), nn.Dropout(0.5)])
def test_training_mode_in_front_is_refused(front):
    model = randomize(nn.Sequential(front, locuslab(8, 1, 3, 4)))
    model[0].train()
    with pytest.raises(UnsupportedModelError, match=r"0: expected eval mode, found .* in training"):
        recognize(model)


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


def test_something_else_after_the_stem_is_refused():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = locuslab(8, 1, 3, 4)[:3]
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1)

    with pytest.raises(UnsupportedModelError, match=r"layer 0 .*or global pooling, found neither"):
        recognize(randomize(Tokens()))


def test_several_threads_may_optimize_at_once():
    models = [randomize(locuslab(8, 1, 3, 2), seed) for seed in range(4)]
    done, failed = [], []

    def work(model):
        try:
            done.append(optimize(model))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(done) == 4


def test_a_refusal_is_quiet_and_leaves_logging_as_it_was(capfd):
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = locuslab(8, 1, 3, 2)

        def forward(self, x):
            return self.model(x * 2 if x.max() > 1 else x)

    before = {
        name: logging.getLogger(name).disabled
        for name in list(logging.root.manager.loggerDict)
        if name.startswith("torch")
    }
    with pytest.raises(UnsupportedModelError, match="could not be traced by torch.export"):
        recognize(Peeks().eval())
    for name, disabled in before.items():
        assert logging.getLogger(name).disabled == disabled, name
    out, err = capfd.readouterr()
    assert len((out + err).splitlines()) < 5


def test_optimized_under_inference_mode():
    model = randomize(locuslab(8, 1, 3, 2))
    with torch.inference_mode():
        fast = optimize(model)
    assert not any(p.is_inference() for p in fast.parameters())
    fast.load_state_dict(fast.state_dict())


def test_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = randomize(nn.Sequential(Normalize(), locuslab(8, 1, 3, 2)))
        inside = optimize(model)
    outside = optimize(model)
    x = torch.randn(2, 3, 9, 12)
    with torch.inference_mode():
        truth = model(x)
    for fast in (inside, outside):
        assert not any(p.is_inference() for p in fast.parameters())
        with torch.no_grad():
            torch.testing.assert_close(fast(x), truth, rtol=2e-5, atol=2e-5)


def test_lazy_modules_and_several_devices_are_refused():
    with pytest.raises(UnsupportedModelError, match="lazy modules that have not seen an input"):
        recognize(nn.Sequential(nn.LazyConv2d(8, 2, 2), *list(locuslab(8, 1, 3, 2))[1:]).eval())
    model = locuslab(8, 1, 3, 2).eval()
    model[-1].to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        recognize(model)


@pytest.mark.parametrize("image", [None, [1.0], "image"])
def test_what_is_no_tensor(image):
    fast = optimize(randomize(locuslab(8, 1, 3, 2)))
    with pytest.raises(TypeError, match=r"expected a tensor \(N, C, H, W\), got"):
        fast(image)


@pytest.mark.parametrize("example", [torch.zeros(3, 8, 8), (1, 3, 8, 8)])
def test_an_example_must_be_a_batch_of_images(example):
    with pytest.raises(ValueError, match="example_input must be a tensor .*got"):
        recognize(locuslab(8, 1, 3, 2).eval(), example)


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: -(-x.shape[2] // 4) * 4 != x.shape[2],
        lambda x: math.ceil(x.shape[2] / 4) * 4 != x.shape[2],
        lambda x: (x.shape[2] * x.shape[3]) ** 0.5 > 20,
    ],
    ids=["floor", "ceil", "root"],
)
def test_conditions_of_other_forms(branch):
    model = randomize(Before(lambda x: x * 2 if branch(x) else x))
    fast = optimize(model)
    for height in range(8, 40, 3):
        x = torch.randn(2, 3, height, 16)
        with torch.no_grad():
            try:
                out = fast(x)
            except ValueError as error:
                assert "recognised for sizes where" in str(error)  # noqa: PT017
                continue
            torch.testing.assert_close(out, model(x), rtol=2e-5, atol=2e-5)
