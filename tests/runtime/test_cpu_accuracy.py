"""The CPU engine's results are accurate whatever the scales of channels and pixels.

The measure is eager PyTorch's error, against float64, and for single products the sum of what is
added up. An algorithm that adds up weights of different channels, or inputs of different pixels,
such as Strassen's, fails here, also where rows and columns of the weights are scaled to be alike.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

from convmixer_fast import ConvMixer, optimize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime.cpu import CpuTrunk
from convmixer_fast.spec import FoldedBlock, FoldedLayer
from tests.sweeps import sparse

WIDTH = 256
EPSILON = torch.finfo(torch.float32).eps


def convmixer(seed=0):
    model = ConvMixer(WIDTH, 2, kernel_size=3, patch_size=4, num_classes=10)
    return randomize(model, seed)


def images(count=16, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def recalibrated(model):
    """Give every BatchNorm the statistics of a batch, as a training pass does."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(images())
    return model.eval()


def check_against_eager(model):
    x = images(8, seed=1)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double())
        eager = relative_error(model(x), truth)
        ours = relative_error(optimize(model, backend="cpu")(x), truth)
    print(f"eager {eager:.1e}, ours {ours:.1e}")
    # Either is the worst of 80 logits, and may be small by chance.
    assert ours <= 2 * eager + 4 * EPSILON


def parts(model):
    """Yield depthwise convolution, its BatchNorm and pointwise convolution of each layer."""
    for block in model.blocks:
        yield block[0].fn[0], block[0].fn[2], block[1]


def scale_outputs(model, scales):
    for *_, pointwise in parts(model):
        pointwise.weight.data *= scales[:, None, None, None]
        pointwise.bias.data *= scales


def scale_branch(model, scales):
    """Scale what the residual is added to, and the weights that read the sum back."""
    for _, norm, pointwise in parts(model):
        norm.weight.data *= scales
        norm.bias.data *= scales
        pointwise.weight.data /= scales[None, :, None, None]


def scale_inputs(model, scales):
    """Scale all that pointwise convolutions read, and their weights back: nothing else changes."""
    norms = [model.stem[2], *(block[3] for block in model.blocks)]
    for norm, (depthwise, *_) in zip(norms, parts(model), strict=False):
        norm.weight.data *= scales
        norm.bias.data *= scales
        depthwise.weight.data /= scales[:, None, None, None]
    scale_branch(model, scales)


def random_scales(exponent, generator, size=WIDTH):
    return 10.0 ** (exponent * (2 * torch.rand(size, generator=generator) - 1))


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.001, 1e-6, 1e6])
def test_half_of_the_outputs_at_another_scale(scale):
    model, scales = convmixer(), torch.ones(WIDTH)
    scales[WIDTH // 2 :] = scale
    scale_outputs(model, scales)
    check_against_eager(recalibrated(model))


@pytest.mark.parametrize("scale", [1e-3, 1e-7, 0.0])
def test_channels_that_are_nearly_dead_or_dead(scale):
    """As in published networks, whose running variances go down to 1e-14."""
    model, scales = convmixer(), torch.ones(WIDTH)
    scales[[5, 200]] = scale
    scale_outputs(model, scales)
    check_against_eager(recalibrated(model))


@pytest.mark.parametrize("seed", sparse(range(21), lambda seed: seed < 3))
@pytest.mark.parametrize("side", ["outputs", "branch", "inputs", "both"])
def test_random_scales(side, seed):
    exponent, generator = (6, 3, 1)[seed % 3], torch.Generator().manual_seed(seed)
    model = convmixer(seed)
    if side in ("outputs", "both"):
        scale_outputs(model, random_scales(exponent, generator))
    recalibrated(model)
    if side in ("inputs", "both"):
        scale_inputs(model, random_scales(exponent, generator))
    elif side == "branch":
        scale_branch(model, random_scales(exponent, generator))
    check_against_eager(model)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_groups_of_channels_that_do_not_mix(scale):
    """The weights' rows and columns are alike; what they are multiplied with is not."""
    model, scales = convmixer(), torch.ones(WIDTH)
    scales[WIDTH // 2 :] = scale
    half = WIDTH // 2
    for _, norm, pointwise in parts(model):
        pointwise.weight.data[:half, half:] = 0
        pointwise.weight.data[half:, :half] = 0
        norm.weight.data *= scales
        norm.bias.data *= scales
    for norm in [model.stem[2], *(block[3] for block in model.blocks[:-1])]:
        norm.weight.data *= scales
        norm.bias.data *= scales
    check_against_eager(recalibrated(model))


def product(weight, pixels):
    """Return ``relu(pixels @ weight.T)`` by a trunk of which nothing else does anything.

    Args:
        weight: (C, C).
        pixels: (P, C), not negative: a row of an image.
    """
    channels = pixels.shape[1]
    stem = FoldedBlock(torch.eye(channels)[:, :, None, None], None, None, None, "relu")
    depthwise = FoldedBlock(torch.zeros(channels, 1, 1, 1), None, None, None, "relu")
    pointwise = FoldedBlock(weight[:, :, None, None], None, None, None, "relu")
    trunk = CpuTrunk(stem, [FoldedLayer(depthwise, pointwise)])
    return trunk(pixels.T[None, :, None].contiguous(), "features")[0, :, 0].T


exponents = st.integers(0, 6)


@given(
    seed=st.integers(0, 2**31),
    of_outputs=exponents,
    of_inputs=exponents,
    of_pixels=exponents,
    zeros=st.sampled_from([0.0, 0.5, 0.95]),
    compensated=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_element_has_its_digits(seed, of_outputs, of_inputs, of_pixels, zeros, compensated):
    """Each element's error is small beside what it is the sum of: a BatchNorm may enlarge it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = random_scales(of_inputs, generator)
    pixels = torch.randn(28, WIDTH, generator=generator).abs() * inputs
    pixels *= random_scales(of_pixels, generator, 28)[:, None]
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    weight *= random_scales(of_outputs, generator)[:, None]
    weight *= torch.rand(WIDTH, WIDTH, generator=generator) >= zeros
    if compensated:
        weight /= inputs
    exact = (pixels.double() @ weight.double().T).relu()
    added = pixels.double() @ weight.double().abs().T
    error = (product(weight, pixels).double() - exact).abs()
    print(f"{(error / added.clamp(min=1e-300)).max() / EPSILON:.1f}")
    # Chains of at most 64 roundings, whose errors cancel for the most part.
    assert (error <= 8 * EPSILON * added).all()


def test_a_channel_of_zeros_gives_zeros():
    weight = torch.randn(WIDTH, WIDTH)
    weight[3], weight[:, 7] = 0.0, 0.0
    assert (product(weight, torch.rand(28, WIDTH))[:, 3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(value):
    """At its output channel if it is a weight, at its pixel if it is an input."""
    weight, pixels = torch.rand(WIDTH, WIDTH), torch.rand(28, WIDTH)
    finite = product(weight, pixels)
    changed = weight.clone()
    changed[9, 9] = value
    found = product(changed, pixels)
    assert not found[:, 9].isfinite().any()
    found[:, 9] = finite[:, 9]
    assert torch.equal(found, finite)
    pixels[3, 5] = value
    found = product(weight, pixels)
    assert not found[3].isfinite().any()
    found[3] = finite[3]
    assert torch.equal(found, finite)
