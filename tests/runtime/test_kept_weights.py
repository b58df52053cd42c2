"""Single ops on a CPU keep what they have packed, until the tensors hold something else."""

import gc
import threading

import pytest
import torch

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import ops, reference
from convmixer_fast.accuracy import relative_error
from convmixer_fast.runtime import packing
from convmixer_fast.runtime.packing import Packed


@pytest.fixture
def packed(monkeypatch):
    """Count what is packed."""
    made = []
    real = Packed.__init__

    def init(self, weight, block):
        made.append(block)
        real(self, weight, block)

    monkeypatch.setattr(Packed, "__init__", init)
    return made


def tensors(*shape):
    channels = shape[0]
    return [torch.randn(shape), torch.randn(channels), torch.rand(channels), torch.randn(channels)]


OPS = {
    "depthwise": (ops.depthwise_block, reference.depthwise_block_ref, (24, 1, 5, 5), {}),
    "pointwise": (ops.pointwise_block, reference.pointwise_block_ref, (40, 24, 1, 1), {}),
    "patches": (ops.patch_embed, reference.patch_embed_ref, (40, 24, 3, 3), {}),
}
every_op = pytest.mark.parametrize("op", OPS)


def run(op, x, arguments):
    function, formula, *_ = OPS[op]
    residual = [True] if op == "depthwise" else []
    found = function(x, *arguments, activation="gelu", backend="cpu")
    expected = formula(
        x.double(), *(None if a is None else a.double() for a in arguments), "gelu", *residual
    )
    return relative_error(found, expected)


@every_op
def test_once_for_many_calls(op, packed):
    arguments = tensors(*OPS[op][2])
    for _ in range(3):
        assert run(op, torch.randn(2, 24, 9, 12), arguments) < 1e-6
    assert len(packed) == 1


CHANGES = {
    "counted": lambda tensor: tensor.mul_(2),
    "past PyTorch's count": lambda tensor: tensor.data.mul_(2),
    "through NumPy": lambda tensor: tensor.numpy().__imul__(2),
    "other memory": lambda tensor: setattr(tensor, "data", torch.randn_like(tensor)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", range(4))
@every_op
def test_changes_are_noticed(op, which, change):
    arguments, x = tensors(*OPS[op][2]), torch.randn(2, 24, 9, 12)
    run(op, x, arguments)
    CHANGES[change](arguments[which])
    assert run(op, x, arguments) < 1e-6


@every_op
def test_other_vectors_and_none(op):
    weight, *vectors = tensors(*OPS[op][2])
    x = torch.randn(2, 24, 9, 12)
    for others in (vectors, [None] * 3, [torch.zeros_like(v) for v in vectors], vectors):
        assert run(op, x, [weight, *others]) < 1e-6


def test_one_weight_for_two_ops(packed):
    """The op is a part of what is kept: a weight of one input channel suits both."""
    weight = torch.randn(24, 1, 1, 1)
    x, single = torch.randn(1, 24, 5, 5), torch.randn(1, 1, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(
            ops.depthwise_block(x, weight, activation="relu", residual=False, backend="cpu"),
            (x * weight[:, 0]).relu(),
        )
        torch.testing.assert_close(
            ops.pointwise_block(single, weight, activation="relu", backend="cpu"),
            (single * weight[:, 0]).relu(),
        )


def test_activations_are_told_apart():
    weight, x = torch.randn(8, 8, 1, 1), torch.randn(1, 8, 4, 4)
    for activation in ("relu", "gelu", "relu"):
        found = ops.pointwise_block(x, weight, activation=activation, backend="cpu")
        expected = reference.pointwise_block_ref(x, weight, None, None, None, activation)
        torch.testing.assert_close(found, expected)


def test_it_goes_with_the_weight():
    weight = torch.randn(64, 64, 1, 1)
    x = torch.randn(1, 64, 4, 4)
    ops.pointwise_block(x, weight, activation="relu", backend="cpu")
    key = id(weight)
    assert key in packing._kept
    del weight
    gc.collect()
    assert key not in packing._kept


def test_inference_tensors(packed):
    with torch.inference_mode():
        weight, x = torch.randn(8, 8, 1, 1), torch.randn(1, 8, 4, 4)
        for factor in (1, 2):
            weight.mul_(factor)
            found = ops.pointwise_block(x, weight, activation="relu", backend="cpu")
            torch.testing.assert_close(
                found, reference.pointwise_block_ref(x, weight, None, None, None, "relu")
            )
    assert len(packed) == 2


def test_in_threads():
    """Each of several threads calls with weights of its own, and with those that all share."""
    shared, x = torch.randn(32, 32, 1, 1), torch.randn(1, 32, 6, 6)
    wrong = []

    def work():
        for _ in range(40):
            for weight in (shared, torch.randn(32, 32, 1, 1)):
                found = ops.pointwise_block(x, weight, activation="relu", backend="cpu")
                expected = reference.pointwise_block_ref(x, weight, None, None, None, "relu")
                if relative_error(found, expected) > 1e-5:
                    wrong.append(weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
