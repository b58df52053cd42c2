"""Every activation of the table is everywhere; what is missing is named.

TensorRT's names are checked against its bindings, in export/tensorrt_network_checks.py.
"""

import functools
import re

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, ops, recognize
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.export.forms import FORMS
from convmixer_fast.export.plain import PlainConvMixer
from convmixer_fast.folding import fold
from convmixer_fast.runtime import backends
from tests.paths import ROOT

names = pytest.mark.parametrize("name", ACTIVATIONS)


def words(name):
    """Return a name as C++ enumerators are written, ``kGeluTanh``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


@names
def test_the_cpu_kernels_know_its_number(name):
    header = (ROOT / "csrc" / "cpu" / "kernels.h").read_text()
    enumerators = dict(re.findall(r"(k\w+) = (\d+)", header))
    assert enumerators.get(words(name)) == str(ACTIVATIONS[name].cpu), "csrc/cpu/kernels.h"
    selected = (ROOT / "csrc" / "cpu" / "epilogue.h").read_text()
    assert f"Activation::{words(name)}:" in selected, "csrc/cpu/epilogue.h"


@names
def test_the_triton_kernels_know_its_name(name):
    source = (ROOT / "kernels" / "activations.py").read_text()
    assert f'ACTIVATION == "{name}"' in source, "kernels/activations.py"
    assert f'``"{name}"``' in source, "the docstring of kernels/activations.py"


@names
def test_models_with_its_layer_are_recognised(name):
    layer = ACTIVATIONS[name].layer
    model = ConvMixer(8, 1, kernel_size=3, patch_size=2, num_classes=3, act_layer=layer).eval()
    spec = recognize(model)
    assert {spec.stem.activation, spec.layers[0].depthwise.activation} == {name}


@names
def test_the_layer_computes_the_function(name):
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    row = ACTIVATIONS[name]
    assert torch.equal(row.layer()(x), row.function(x))
    if row.parts is not None:
        torch.testing.assert_close(row.parts(x), row.function(x), rtol=0, atol=1e-14)
    for scale in (0.3, 7.0):
        scales = torch.allclose(row.function(scale * x), scale * row.function(x), atol=1e-12)
        assert scales == row.homogeneous


@names
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_computes_it(name, backend):
    why_not = backends.why_not(backend, torch.device("cpu"), torch.float32)
    if why_not is not None:
        pytest.skip(why_not)
    x = torch.linspace(-8, 8, 64).view(1, 1, 8, 8)
    one = torch.ones(1, 1, 1, 1)
    found = ops.pointwise_block(x, one, activation=name, backend=backend)
    torch.testing.assert_close(found, ACTIVATIONS[name].function(x), rtol=0, atol=1e-6)


@functools.cache
def _folded(name):
    layer = ACTIVATIONS[name].layer
    model = ConvMixer(8, 1, kernel_size=3, patch_size=2, num_classes=3, act_layer=layer).eval()
    return model, fold(recognize(model))


@names
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_export_computes_it(name, form):
    model, folded = _folded(name)
    plain = PlainConvMixer(folded, FORMS[form])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))


def test_unknown_names_are_refused_with_the_known_ones():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"activation must be one of 'gelu', .*got 'swish'"):
        ops.pointwise_block(x, x, activation="swish")
    act = nn.CELU
    model = ConvMixer(8, 1, kernel_size=3, patch_size=2, num_classes=3, act_layer=act).eval()
    with pytest.raises(ValueError, match="found a celu operation"):
        recognize(model)
