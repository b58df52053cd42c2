"""Products of bfloat16 on a CPU: as near to float64 as PyTorch's own, and taken where they pay."""

import copy

import pytest
import torch

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import _C, backend_info, fold, optimize, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends, cpu
from convmixer_fast.runtime.cpu import CpuTrunk
from tests.runtime.cpu_cases import check_threads
from tests.runtime.test_cpu_trunk import ARCHITECTURES

needs_bfloat16 = pytest.mark.skipif(
    "bfloat16" not in _C.rates(1), reason="needs a CPU with AVX512_BF16"
)


def make(name):
    architecture, shape = ARCHITECTURES[name]
    model = randomize(architecture.build()).bfloat16()
    folded = fold(recognize(model))
    trunk = CpuTrunk(folded.stem, folded.layers, bfloat16=True)
    return model, trunk, torch.randn(shape).bfloat16()


@needs_bfloat16
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_accurate_as_pytorchs(name):
    model, trunk, x = make(name)
    with torch.no_grad():
        truth = copy.deepcopy(model).double().forward_features(x.double())
        eager = relative_error(model.forward_features(x), truth)
    out = trunk(x, "features")
    assert out.dtype == torch.bfloat16
    # A rounding or two, where the model is so small that chance decides.
    assert relative_error(out, truth) <= max(1.2 * eager, 8e-3)
    assert relative_error(trunk(x, "mean"), truth.mean((2, 3))) <= max(1.2 * eager, 8e-3)


@needs_bfloat16
@pytest.mark.parametrize("name", ["odd", "wide", "tiles"])
def test_results_do_not_depend_on_threads(name):
    _, trunk, x = make(name)
    check_threads(trunk, x)


@needs_bfloat16
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_number_reaches_its_window_alone(value):
    _, trunk, x = make("odd")
    x = torch.zeros_like(x)
    before = trunk(x, "features")
    x[0, 1, 0, 0] = float(value)
    out = trunk(x, "features")
    touched = (out != before).any(1)
    # Three layers of 5 x 5 about the first patch.
    assert touched[0, :7, :7].all()
    assert touched[0].sum() == 49
    assert not touched[1].any()
    if value == "nan":
        assert out[0, :, :7, :7].isnan().all()


def test_where_they_pay(monkeypatch):
    """The engine takes them where they are faster, and says so."""
    asked = []
    real = _C.Trunk

    def trunk(*arguments):
        asked.append(arguments[-1])
        return real(*arguments[:-1], None)

    architecture, shape = ARCHITECTURES["odd"]
    monkeypatch.setattr(cpu._C, "Trunk", trunk)
    for pays, detail in ((True, "float16 is computed"), (False, "float16 and bfloat16 are")):
        for module in (backends, cpu):
            monkeypatch.setattr(module, "bfloat16_pays", lambda pays=pays: pays)
        model = randomize(architecture.build())
        with torch.no_grad():
            optimize(model, dtype=torch.bfloat16)(torch.randn(shape).bfloat16())
            optimize(model)(torch.randn(shape))
        assert detail in next(row.detail for row in backend_info() if row.name == "cpu")
    assert asked == [(2, 0, 1.0, 0), None, None, None]


def test_measured_once():
    rates = _C.rates(1)
    assert backends.bfloat16_pays() == (rates.get("bfloat16", 0) > 1.3 * rates["float32"])
    assert backends.bfloat16_pays.cache_info().misses == 1
