"""Products of the CPU engine are accurate whatever the scales of channels; the bound for pixels.

Strassen's products, from 256 channels on, add inputs, weights and results of different channels
and pixels. Eager PyTorch's error, against float64, is the measure. Of 1,000 patterns as in
test_random_scales the worst ratio to it was WORST_PLAIN, with Strassen's products WORST_FAST.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

from convmixer_fast import ConvMixer, fold, optimize, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime.cpu import CpuTrunk
from convmixer_fast.spec import FoldedBlock, FoldedLayer
from tests.sweeps import sparse

WIDTH = 256
"""The first with Strassen's products."""
LIMITS = {False: 2, True: 3}
"""By ``fast_products``: the largest ratio to eager's error."""

products = pytest.mark.parametrize("fast_products", LIMITS, ids=["plain", "strassen"])


def recalibrated(model, images):
    """Give every BatchNorm the statistics of ``images``, as a training pass does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def errors(model, images, **options):
    """Return eager's and our largest error over the largest logit."""
    fast = optimize(model, backend="cpu", **options)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(images.double())
        return relative_error(model(images), truth), relative_error(fast(images), truth)


def convmixer(seed=0):
    torch.manual_seed(seed)
    return randomize(ConvMixer(WIDTH, 2, kernel_size=3, patch_size=4, num_classes=10), seed)


def pointwise_convolutions(model):
    return [module for module in model.modules() if getattr(module, "kernel_size", 0) == (1, 1)]


def scale_outputs(model, scales):
    for conv in pointwise_convolutions(model):
        conv.weight.data *= scales[:, None, None, None]
        conv.bias.data *= scales


def scale_inputs(model, scales):
    """Scale what pointwise convolutions read, and their weights back."""
    depthwise = [m for m in model.modules() if getattr(m, "groups", 1) > 1]
    norms = [block[0].fn[2] for block in model.blocks]
    assert len(depthwise) == len(norms)
    for norm in norms:
        norm.weight.data *= scales
        norm.bias.data *= scales
    for conv in pointwise_convolutions(model):
        conv.weight.data /= scales[None, :, None, None]


@products
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.001, 1e-6, 1e6])
def test_outputs_of_two_scales(scale, fast_products):
    model, images = convmixer(), torch.randn(16, 3, 32, 32)
    scales = torch.ones(WIDTH)
    scales[WIDTH // 2 :] = scale
    scale_outputs(model, scales)
    recalibrated(model, images)
    eager, ours = errors(model, images, fast_products=fast_products)
    print(f"eager {eager:.1e}, ours {ours:.1e}")
    assert ours <= LIMITS[fast_products] * eager


@products
def test_channels_that_are_nearly_dead(fast_products):
    """As in published networks, whose running variances go down to 1e-14."""
    model, images = convmixer(), torch.randn(16, 3, 32, 32)
    scales = torch.ones(WIDTH)
    scales[[5, 200]] = 1e-3
    scale_outputs(model, scales)
    recalibrated(model, images)
    eager, ours = errors(model, images, fast_products=fast_products)
    print(f"eager {eager:.1e}, ours {ours:.1e}")
    assert ours <= LIMITS[fast_products] * eager


PATTERNS = 20
"""Of random scales; the first stand for the others."""


@products
@pytest.mark.parametrize("seed", sparse(range(PATTERNS), lambda seed: seed < 4))
@pytest.mark.parametrize("side", ["out", "in", "both"])
def test_random_scales(side, seed, fast_products):
    model, images = convmixer(seed), torch.randn(16, 3, 32, 32)
    generator = torch.Generator().manual_seed(seed)
    magnitude = (1, 3, 6)[seed % 3]
    outputs, inputs = (
        10.0 ** (magnitude * (2 * torch.rand(WIDTH, generator=generator) - 1)) for _ in range(2)
    )
    if side != "in":
        scale_outputs(model, outputs)
    recalibrated(model, images)
    if side != "out":
        scale_inputs(model, inputs)
    eager, ours = errors(model, images, fast_products=fast_products)
    print(f"eager {eager:.1e}, ours {ours:.1e}")
    assert ours <= LIMITS[fast_products] * eager


def product(weight, pixels, **options):
    """Return ``leaky_relu(pixels @ weight.T)`` by a trunk of which nothing else does anything.

    Args:
        weight: (C, C).
        pixels: (P, C), not negative: a row of an image.
        options: of the trunk.
    """
    channels = pixels.shape[1]
    stem = FoldedBlock(torch.eye(channels)[:, :, None, None], None, None, None, "relu")
    depthwise = FoldedBlock(torch.zeros(channels, 1, 1, 1), None, None, None, "relu")
    pointwise = FoldedBlock(weight[:, :, None, None], None, None, None, "leaky_relu")
    trunk = CpuTrunk(stem, [FoldedLayer(depthwise, pointwise)], **options)
    return trunk(pixels.T[None, :, None].contiguous(), "features")[0, :, 0].T


def exact_product(weight, pixels):
    return torch.nn.functional.leaky_relu(pixels.double() @ weight.double().T)


exponents = st.integers(0, 6)


@products
@given(seed=st.integers(0, 2**31), out=exponents, inside=exponents, compensated=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_output_channel_has_its_digits(fast_products, seed, out, inside, compensated):
    """Each channel's error is small beside itself: a BatchNorm may follow that enlarges it."""
    generator = torch.Generator().manual_seed(seed)

    def scales(exponent):
        return 10.0 ** (exponent * (2 * torch.rand(WIDTH, generator=generator) - 1))

    of_outputs, of_inputs = scales(out), scales(inside)
    pixels = torch.randn(28, WIDTH, generator=generator).abs() * of_inputs
    weight = torch.randn(WIDTH, WIDTH, generator=generator) * of_outputs[:, None]
    if compensated:
        weight = weight / of_inputs
    found = product(weight, pixels, fast_products=fast_products).double()
    exact = exact_product(weight, pixels)
    # Beside what is added up: a sum may cancel.
    size = pixels.double() @ weight.double().abs().T
    error = (found - exact).square().mean(0).sqrt() / size.square().mean(0).sqrt()
    print(f"{error.max():.1e}")
    assert error.max() <= 5e-7


def test_zero_and_special_weights_are_left_as_they_are():
    weight = torch.randn(WIDTH, WIDTH)
    weight[3], weight[:, 7] = 0.0, 0.0
    pixels = torch.rand(28, WIDTH)
    found = product(weight, pixels, fast_products=True)
    assert (found[:, 3] == 0).all()
    exact = exact_product(weight, pixels)
    assert relative_error(found, exact) <= 2e-6
    weight[9, 9] = float("nan")
    assert product(weight, pixels, fast_products=True)[:, 9].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_a_small_pixel_has_its_partners_absolute_error_at_most(scale):
    """The documented bound: of a pixel that is paired with a larger one."""
    weight, pixels = torch.randn(WIDTH, WIDTH), torch.rand(28, WIDTH)
    pixels[:14] *= scale
    exact = exact_product(weight, pixels)
    largest = exact.abs().max()
    error = (product(weight, pixels, fast_products=True).double() - exact).abs()
    assert error.max() <= 2e-6 * largest
    plain = (product(weight, pixels).double() - exact).abs()
    assert plain[:14].max() <= 2e-6 * exact[:14].abs().max()


def test_a_nan_stays_at_its_pixel():
    weight, pixels = torch.randn(WIDTH, WIDTH), torch.rand(28, WIDTH)
    pixels[3, 5] = float("nan")
    plain = product(weight, pixels).isnan()
    assert plain[3].all()
    assert plain.any(1).sum() == 1
    # With Strassen's it reaches its partner; the pixel in the middle of a group has two.
    fast = product(weight, pixels, fast_products=True).isnan()
    assert plain.any(1).sum() < fast.any(1).sum() <= 3


def test_the_option_is_the_modules():
    model, images = convmixer(), torch.randn(2, 3, 32, 32)
    fast = optimize(model, backend="cpu", fast_products=True)
    twin = copy.deepcopy(fast)
    folded = fold(recognize(model))
    trunk = CpuTrunk(folded.stem, folded.layers, folded.head, fast_products=True)
    with torch.inference_mode():
        expected = trunk(images, "logits")
        assert torch.equal(fast(images), expected)
        assert torch.equal(twin(images), expected)
        assert not torch.equal(optimize(model, backend="cpu")(images), expected)
