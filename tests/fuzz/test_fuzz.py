"""A few of the random inputs of ``make fuzz``, always the same; and that its checks can fail."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from convmixer_fast import ops
from convmixer_fast.runtime import backends
from tests.fuzz import op_cases
from tests.fuzz.op_cases import OPS, OpCase, check_op

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

from tests.fuzz.model_cases import check_determinism, check_model, model_cases

# PyTorch's and NumPy's, of what the inputs are.
pytestmark = pytest.mark.filterwarnings("ignore")
few = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
CASE = OpCase(
    "pointwise_block", "cpu", torch.float32, (2, 16, 5, 7), 24, (1, 1), "relu", "sliced", "unit",
    (True, True, True), False, None, 0,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_ops(op, backend):
    if backend == "triton":
        reason = backends.why_not("triton", torch.device("cpu"), torch.float32)
        if reason is not None:
            pytest.skip(f"needs Triton's interpreter: {reason}")

    @seed(0)
    @settings(few, max_examples={"cpu": 100, "reference": 30, "triton": 4}[backend])
    @given(op_cases.op_cases(op, backend))
    def check(case):
        check_op(case)

    check()


@seed(0)
@settings(few, max_examples=6)
@given(model_cases(), st.sampled_from([check_model, check_determinism]))
def test_models(case, check):
    check(case)


@pytest.mark.parametrize("kind", ["checkpoint", "image", "export"])
def test_files(kind, tmp_path):
    if kind == "export":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    module = __import__(f"tests.fuzz.{kind}_cases", fromlist=["x"])
    check = getattr(module, f"check_{kind}")
    outcomes = {check(number, tmp_path) for number in range(30 if kind == "export" else 200)}
    assert outcomes == {"read", "refused"}


def test_the_planted_code_would_run(tmp_path):
    from tests.fuzz.checkpoint_cases import _Marks

    pickle.loads(pickle.dumps(_Marks(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


def _one_off(result):
    result[1, 3, 2, 2] *= 1 + 1e-4
    return result


def _whole_channel(result):
    return result.roll(1, 1)


def _cleaned(result):
    return result.nan_to_num(0.0)


def _cut_off(result):
    return (result.view(torch.int32) & -4096).view(torch.float32)


@pytest.mark.parametrize("fault", [_one_off, _whole_channel, _cut_off])
def test_a_wrong_number_is_found(fault, monkeypatch):
    check_op(CASE)
    right = ops.pointwise_block
    monkeypatch.setattr(ops, "pointwise_block", lambda *a, **k: fault(right(*a, **k)))
    with pytest.raises(AssertionError, match="are off"):
        check_op(CASE)


def test_a_nan_that_is_lost_is_found(monkeypatch):
    case = dataclasses.replace(CASE, planted=float("nan"))
    check_op(case)
    right = ops.pointwise_block
    monkeypatch.setattr(ops, "pointwise_block", lambda *a, **k: _cleaned(right(*a, **k)))
    with pytest.raises(AssertionError, match="a NaN is lost"):
        check_op(case)
