"""``optimize(verify=True)``: a backend that computes something else never serves."""

import warnings

import pytest
import torch
from torch import nn

from convmixer_fast import optimize
from convmixer_fast.errors import MismatchError
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import self_check
from convmixer_fast.runtime.cpu import CpuTrunk
from tests.sweeps import sparse
from tests.variants import EVERY

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

FILE = self_check._file
ARCHITECTURE = Architecture(16, 2, 5, 4, "gelu", 3, 7)


@pytest.fixture
def model():
    return randomize(ARCHITECTURE.build())


@pytest.fixture
def wrong(monkeypatch):
    """A kernel that forgets the last channel."""
    right = CpuTrunk.__call__

    def run(trunk, x, result):
        out = right(trunk, x, result)
        out[:, -1] = 0
        return out

    monkeypatch.setattr(CpuTrunk, "__call__", run)


@pytest.mark.parametrize(
    "dtype",
    sparse(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64],
        lambda dtype: dtype == torch.float16,
        ids=str,
    ),
)
def test_what_is_right_passes(model, dtype):
    fast = optimize(model, dtype=dtype, verify=True)
    assert fast.backend == "auto"
    x = torch.randn(1, 3, 16, 16).to(dtype)
    with torch.inference_mode():
        assert torch.equal(fast(x), optimize(model, dtype=dtype, verify=False)(x))


@pytest.mark.parametrize(
    "name", sparse(EVERY, lambda name: name in ("two-heads", "normalized-in-front"))
)
def test_every_variation_can_be_checked(name):
    optimize(EVERY[name].model(), backend="cpu", verify=True)


def test_one_that_is_named_is_refused(model, wrong):
    message = (
        r"the backend 'cpu' on cpu is off by \d.*e[+-]\d+ of the largest output \(torch.float32, "
        r"images \(2, 3, 52, 68\)\), and may be off by 2e-05; backend='reference' runs"
    )
    with pytest.raises(MismatchError, match=message):
        optimize(model, backend="cpu", verify=True)
    optimize(model, backend="cpu")  # on a CPU nothing is checked unasked
    optimize(model, backend="reference", verify=True)


def test_otherwise_the_next_takes_its_place(model, wrong):
    with pytest.warns(RuntimeWarning, match="off by .*'reference' takes its place") as said:
        fast = optimize(model, verify=True)
    assert len(said) == 1
    assert fast.backend == "reference"
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert fast.explain(x).backend == "reference"


def test_a_nan_does_not_pass(model, monkeypatch):
    monkeypatch.setattr(CpuTrunk, "__call__", lambda self, x, result: torch.full((2, 7), torch.nan))
    with pytest.raises(MismatchError, match="off by nan"):
        optimize(model, backend="cpu", verify=True)


@pytest.mark.exhaustive
def test_int8(model):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    images = torch.rand(8, 3, 16, 16)
    optimize(model, precision="int8", calibration=images, verify=True, progress=False)


def test_an_input_is_asked_for_where_none_fits(model):
    class OfOneSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).reshape(x.shape[0] * 40 * 44 // (x.shape[2] * x.shape[3]), 7)

    example = torch.zeros(1, 3, 40, 44)
    with pytest.raises(ValueError, match="give verify=True an example_input"):
        self_check.self_check(
            _conditioned(optimize(model, backend="cpu"), "H == 40"), model, "cpu", None
        )
    optimize(OfOneSize().eval(), example_input=example, backend="cpu", verify=True)


def _conditioned(fused, text):
    from convmixer_fast.spec import SizeCondition

    fused.conditions = (SizeCondition(text),)
    return fused


def test_words(model):
    with pytest.raises(ValueError, match="verify must be 'auto', True or False, got 'yes'"):
        optimize(model, verify="yes")


class TestOnce:
    """What a GPU does unasked, with the CPU backend in its place."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        pytest.importorskip("triton", reason="needs triton: pip install '.[triton]'")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(self_check, "_file", FILE)
        self.folder = tmp_path / "convmixer_fast"
        self.checks = []
        right = self_check.self_check
        monkeypatch.setattr(self_check, "self_check", lambda *a: self.checks.append(a) or right(*a))

    def ensure(self, model, **options):
        fused = optimize(model, backend="cpu", **options)
        self_check.ensure(fused, model, None, once=True)

    def test_a_second_time_is_not_measured(self, model):
        self.ensure(model)
        assert len(self.checks) == 1
        (kept,) = self.folder.glob("checked-*.json")
        assert "the backend 'cpu' on cpu is off by" in kept.read_text()
        self.ensure(randomize(ARCHITECTURE.build(), 1))
        assert len(self.checks) == 1

    @pytest.mark.exhaustive
    def test_another_model_is(self, model):
        self.ensure(model)
        self.ensure(model, dtype=torch.bfloat16)
        self.ensure(randomize(Architecture(16, 2, 5, 4, "relu", 3, 7).build()))
        assert len(self.checks) == 3

    def test_what_fails_is_not_kept(self, model, wrong):
        for _ in range(2):
            with pytest.raises(MismatchError):
                self.ensure(model)
        assert len(self.checks) == 2
        assert not list(self.folder.glob("checked-*"))

    def test_what_cannot_be_checked_unasked_is_logged(self, model, caplog):
        fused = _conditioned(optimize(model, backend="cpu"), "H == 40")
        self_check.ensure(fused, model, None, once=True)
        assert "could not be checked: the model takes images of some sizes alone" in caplog.text
        with pytest.raises(ValueError, match="give verify=True an example_input"):
            self_check.ensure(fused, model, None, once=False)
        assert not list(self.folder.glob("checked-*"))

    def test_a_cache_that_cannot_be_written(self, model, tmp_path, caplog):
        (tmp_path / "convmixer_fast").write_text("in the way")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.ensure(model)
        assert "is not kept" in caplog.text
