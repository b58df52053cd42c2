"""Products of 8-bit numbers on a CPU: exact where nothing is rounded, near it elsewhere."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import FusedConvMixer, fold, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime.cpu import CpuTrunk
from convmixer_fast.runtime.source import WEIGHT_LIMIT
from convmixer_fast.spec import FoldedBlock, FoldedConvMixer, Quantization
from tests.runtime.cpu_cases import check_threads
from tests.runtime.test_cpu_trunk import ARCHITECTURES


def quantization(channels: int, scale: float, zero: int) -> Quantization:
    weight_scale = torch.rand(channels) / 100 + 1e-3
    tensors = torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)
    return Quantization(weight_scale, *tensors, *tensors)


def numbers(*shape: int) -> Tensor:
    return torch.randint(-WEIGHT_LIMIT, WEIGHT_LIMIT + 1, shape, dtype=torch.int8)


def stem(channels_in: int, channels_out: int, scale: float, zero: int) -> FoldedBlock:
    bias, shift = torch.randn(channels_out), torch.randn(channels_out)
    weight = numbers(channels_out, channels_in, 1, 1)
    own = quantization(channels_out, scale, zero)
    return FoldedBlock(weight, bias, torch.rand(channels_out) + 0.5, shift, "relu", own)


def expected(block: FoldedBlock, x: Tensor) -> Tensor:
    """What the block computes, in float64."""
    assert block.quantization is not None
    assert block.bias is not None
    weight = block.quantization.weight(block.weight, torch.float64)
    sums = torch.nn.functional.conv2d(block.quantization.input(x.double()), weight)
    v = ACTIVATIONS[block.activation].function(sums + block.bias[:, None, None])
    return v * block.scale[:, None, None] + block.shift[:, None, None]


def check_product(channels_in: int, channels_out: int, pixels: int, zero: int) -> None:
    """Compare a product whose inputs are whole steps, and so are not rounded."""
    block = stem(channels_in, channels_out, 2.0**-5, zero)
    x = (torch.randint(0, 256, (2, channels_in, 1, pixels)) - zero) * 2.0**-5
    out = CpuTrunk(block, ())(x, "features")
    assert relative_error(out, expected(block, x)) < 1e-6


def check_largest(channels: int) -> None:
    """Compare the largest sums that there are: pairs of them just fit in 16 bits."""
    block = stem(channels, 37, 1.0, 0)
    signs = torch.randint(0, 2, (37, 1, 1, 1), dtype=torch.int8) * 2 - 1
    block = replace(block, weight=(signs * WEIGHT_LIMIT).expand(37, channels, 1, 1).contiguous())
    x = torch.full((1, channels, 3, 5), 255.0)
    assert relative_error(CpuTrunk(block, ())(x, "features"), expected(block, x)) < 1e-6


def check_rounding() -> None:
    """Compare what is rounded: halves to even, and what is out of range to its ends."""
    block = stem(1, 1, 1.0, 100)
    x = torch.cat((torch.arange(-120, 180) + 0.5, torch.tensor([-1e9, 1e9, -99.6, 154.6])))
    x = x.view(1, 1, 1, -1)
    assert relative_error(CpuTrunk(block, ())(x, "features"), expected(block, x)) < 1e-6


PRODUCTS = [(1, 1, 1, 0), (3, 40, 17, 255), (64, 64, 28, 128), (65, 33, 5, 7), (300, 100, 41, 1)]


def check_all() -> None:
    """For a process of its own per ISA."""
    torch.manual_seed(0)
    for product in PRODUCTS:
        check_product(*product)
    check_largest(1000)
    check_rounding()


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_exact(product):
    check_product(*product)


def test_largest_sums():
    check_largest(1000)


def test_rounding():
    check_rounding()


def quantized(architecture: Architecture, shape: tuple[int, ...]) -> FoldedConvMixer:
    """Fold a network, with stem and pointwise blocks in 8 bits for numbers as a batch has them."""
    model = randomize(architecture.build())
    folded = fold(recognize(model))

    def made(block: FoldedBlock) -> FoldedBlock:
        scale = block.weight.flatten(1).abs().amax(1) / WEIGHT_LIMIT
        weight = (block.weight / scale[:, None, None, None]).round().to(torch.int8)
        step, zero = torch.tensor(8 / 255), torch.tensor(120, dtype=torch.uint8)
        return replace(
            block, weight=weight, quantization=Quantization(scale, step, zero, step, zero)
        )

    layers = tuple(replace(layer, pointwise=made(layer.pointwise)) for layer in folded.layers)
    return replace(folded, stem=made(folded.stem), layers=layers)


@pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_networks(case):
    folded = quantized(*case)
    x = torch.randn(case[1])
    out = CpuTrunk(folded.stem, folded.layers)(x, "features")
    module = FusedConvMixer(copy.deepcopy(folded), "reference")
    with torch.no_grad():
        found = module.forward_features(x)
    # A number in the middle of two steps is rounded either way, which all channels behind it see.
    assert relative_error(out, found) < 0.1
    assert (out - found).abs().mean() < 3e-4 * found.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["odd", "wide", "tiles"])
def test_results_do_not_depend_on_threads(name, batch):
    architecture, shape = ARCHITECTURES[name]
    folded = quantized(architecture, shape)
    trunk = CpuTrunk(folded.stem, folded.layers)
    x = torch.randn(batch, *shape[1:])
    check_threads(trunk, x)


def test_layers_of_either_kind():
    folded = quantized(Architecture(40, 3, 5, 2, "gelu"), (1, 3, 12, 14))
    exact = fold(recognize(randomize(Architecture(40, 3, 5, 2, "gelu").build())))
    mixed = replace(folded, layers=(folded.layers[0], exact.layers[1], folded.layers[2]))
    for one in (mixed, replace(mixed, stem=exact.stem)):
        x = torch.randn(2, 3, 12, 14)
        out = CpuTrunk(one.stem, one.layers)(x, "features")
        with torch.no_grad():
            found = FusedConvMixer(copy.deepcopy(one), "reference").forward_features(x)
        assert relative_error(out, found) < 0.1
