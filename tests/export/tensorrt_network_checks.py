"""Checks of trt_network.py and trt_plugin.py: what recorded networks compute."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import tensorrt as trt
import torch
from torch import nn

from convmixer_fast import ConvMixer, fold, recognize
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.export.trt_network import add_convmixer
from convmixer_fast.models.convmixer import POOLS
from convmixer_fast.models.randomize import randomize
from tests.export.tensorrt_driving import SIZE, error_of, export, small
from tests.export.tensorrt_interpreter import Network
from tests.zoo import locuslab

TOLERANCES = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Of the largest output: what rounding the weights costs, for the interpreter rounds nothing."""


def variants() -> dict[str, nn.Module]:
    """Return models that differ in all that a network depends on."""
    found = {f"pool {kind}": small(global_pool=kind) for kind in POOLS if kind}
    found |= {
        f"pool {kind}, no classes": randomize(
            ConvMixer(8, 0, 3, 3, num_classes=0, global_pool=kind).eval()
        )
        for kind in POOLS
    }
    # Linear after no pooling is of the map's columns, of which there are 15 / 3.
    found["columns"] = randomize(
        nn.Sequential(*locuslab(8, 1, 3, (2, 3)).eval()[:-3], nn.Linear(5, 4)).eval()
    )
    for name, row in ACTIVATIONS.items():
        found[name] = randomize(locuslab(8, 1, 7, (4, 5), act=row.layer).eval())
    tanh = partial(nn.GELU, approximate="tanh")
    found["gelu_tanh, even"] = randomize(locuslab(6, 2, 4, (3, 2), act=tanh).eval())
    found["no bias"] = randomize(locuslab(8, 1, 3, 3, bias=False, stem_chans=1).eval())
    norm = partial(nn.BatchNorm2d, affine=False)
    found["not affine"] = randomize(locuslab(8, 1, 3, 3, norm=norm).eval())
    return found


def compare(model: nn.Module, precision: str, **options: Any) -> Network:
    """Export to a double, evaluate what was recorded, and compare with the model in float64."""
    network = Network(trt)
    report = export(network, model, precision=precision, **options)
    source = copy.deepcopy(model).double()
    images = torch.randn(2, network._made._values["shape"][1], *SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected = source(images)
    found, kind = network.run(images)
    assert kind == getattr(
        trt, {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}[precision]
    )
    assert found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCES[precision], error
    (output,) = report.outputs
    assert output.shape == (-1, *expected.shape[1:])
    assert output.name == "logits"
    return network


def check_conditions_of_a_model() -> None:
    """A model that looks at the size of its images."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2] % 4:
                raise ValueError("no")
            return self.net(x)

    model = Picky().eval()
    export(Network(trt), model, example_input=torch.zeros(2, 3, *SIZE))
    options = {"example_input": torch.zeros(2, 3, *SIZE), "image_size": (15, 12)}
    message = error_of(Network(trt), ValueError, model, **options)
    assert "H=15, W=12 are not" in message, message


def check_numbers_fp32() -> None:
    for name, model in variants().items():
        try:
            options = {"example_input": torch.zeros(1, 3, *SIZE)} if name == "columns" else {}
            compare(model, "float32", **options)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def check_numbers_fp16() -> None:
    for kind in ("avg", "catavgmax"):
        compare(small(global_pool=kind), "float16")


def check_numbers_bf16() -> None:
    for kind in ("avg", "avgmax"):
        compare(small(global_pool=kind), "bfloat16")


def check_plugins() -> None:
    # Toeplitz tiles in 16 bits, direct taps in 32; once without some of bias, scale and shift.
    for precision in TOLERANCES:
        network = compare(small(), precision, plugins="triton", capability=90)
        assert len(network.named("add_plugin")) == 2
        assert len(network.plugins) == 1
        toeplitz = "Toeplitz" in next(iter(network.plugins))
        assert toeplitz == (precision != "float32")
    compare(variants()["no bias"], "float16", plugins="triton", capability=80)
    compare(variants()["relu"], "float32", plugins="triton", capability=80)


def check_absent_scale_and_shift() -> None:
    folded = fold(recognize(small()), torch.float32)
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    expected = []
    for names in (("scale",), ("shift",), ("scale", "shift", "bias")):
        nothing = dict.fromkeys(names)
        one = {
            "scale": torch.ones(8),
            "shift": torch.zeros(8),
            "bias": torch.zeros(8),
        }
        outputs = []
        for values in (nothing, {name: one[name] for name in names}):
            layers = [
                replace(
                    layer,
                    depthwise=replace(layer.depthwise, **values),
                    pointwise=replace(layer.pointwise, **values),
                )
                for layer in folded.layers
            ]
            changed = replace(folded, stem=replace(folded.stem, **values), layers=tuple(layers))
            network = Network(trt)
            made = network.Builder(trt.Logger()).create_network(0)
            held = add_convmixer(network, made, changed, SIZE)
            assert held.kept
            outputs.append(network.run(x)[0])
        assert torch.allclose(*outputs)
        expected.append(outputs[0])
    assert not torch.allclose(expected[0], expected[1])
