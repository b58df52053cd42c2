"""Models whose code looks at the size of its input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_fast import UnsupportedModelError, optimize, recognize
from convmixer_fast.models.randomize import randomize
from convmixer_fast.spec import SizeCondition
from tests.recognition.before import Before
from tests.zoo import Trunk, locuslab


class _PadsToPatches(nn.Module):
    """Pads an image that is not a whole number of patches, and only such a one."""

    def __init__(self):
        super().__init__()
        self.model = locuslab(8, 1, 3, 4)

    def forward(self, x):
        if x.shape[2] % 4:
            x = F.pad(x, (0, 0, 0, 4 - x.shape[2] % 4))
        return self.model(x)


def test_code_that_looks_at_the_size_is_honoured():
    model = randomize(_PadsToPatches())
    fast = optimize(model, backend="reference")
    assert fast.conditions == (SizeCondition("(H % 4) == 0"),)
    x = torch.randn(1, 3, 16, 18)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        with pytest.raises(ValueError, match=r"recognised for sizes where \(H % 4\) == 0"):
            fast(torch.randn(1, 3, 17, 18))
        # An example of the size to be used brings the other branch in.
        x = torch.randn(1, 3, 17, 18)
        torch.testing.assert_close(optimize(model, example_input=x)(x), model(x))


def test_code_that_fixes_the_size_asks_for_an_example():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = locuslab(8, 1, 3, 4)

        def forward(self, x):
            return self.model(x.reshape(-1, 3, int(x.shape[2]), int(x.shape[3])))

    model = randomize(Fixed())
    with pytest.raises(UnsupportedModelError, match=r"fixes the size of its input.*example_input"):
        recognize(model)
    x = torch.randn(1, 3, 12, 20)
    fast = optimize(model, example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_a_head_for_one_size_needs_an_example_of_it():
    model = Trunk(lambda m, f, x: m.linear(f.flatten(1).unflatten(1, (24, 15)).sum(-1)))
    model = randomize(model)
    with pytest.raises(UnsupportedModelError, match="example_input"):
        recognize(model)
    x = torch.randn(2, 3, 12, 20)
    fast = optimize(model, example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_condition_survives_pickling():
    import pickle

    condition = pickle.loads(pickle.dumps(SizeCondition("(H % 7) == 0")))
    assert condition.holds(1, 14, 3)
    assert not condition.holds(1, 15, 3)


@pytest.mark.parametrize(
    ("head", "condition"),
    [
        (lambda m, f, x: m.linear(f.mean((2, 3))) * (2 if x.shape[0] == 1 else 1), "N"),
        (lambda m, f, x: m.linear(f.mean((2, 3))) * (2 if f.shape[2] == 1 else 1), "H"),
    ],
    ids=["batch", "patches"],
)
def test_code_that_asks_for_one_is_seen(head, condition):
    model = randomize(Trunk(head, 8))
    fast = optimize(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        alone = x[:1] if condition == "N" else x[:, :, :4]
        with pytest.raises(ValueError, match=f"recognised for sizes where .*{condition}"):
            fast(alone)


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: -(-x.shape[2] // 4) * 4 != x.shape[2],
        lambda x: math.ceil(x.shape[2] / 4) * 4 != x.shape[2],
        lambda x: (x.shape[2] * x.shape[3]) ** 0.5 > 20,
    ],
    ids=["floor", "ceil", "root"],
)
def test_conditions_of_other_forms(branch):
    model = randomize(Before(lambda x: x * 2 if branch(x) else x))
    fast = optimize(model)
    for height in range(8, 40, 3):
        x = torch.randn(2, 3, height, 16)
        with torch.no_grad():
            try:
                out = fast(x)
            except ValueError as error:
                assert "recognised for sizes where" in str(error)  # noqa: PT017
                continue
            torch.testing.assert_close(out, model(x), rtol=2e-5, atol=2e-5)
