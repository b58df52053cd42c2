"""How a module is traced: hooks, wrappers, modes, threads, logging, examples."""

import copy
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_fast import UnsupportedModelError, optimize, recognize
from convmixer_fast.models.randomize import randomize
from tests.recognition.before import same
from tests.zoo import Normalize, locuslab


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
