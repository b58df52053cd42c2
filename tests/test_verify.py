"""The measure of error, and verify(): nothing wrong passes, NaN least of all."""

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.verify import Comparison, verify
from convmixer_fast.verify import passed as accepts

NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "truth", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], float("inf")),
        ([NAN, 2.0], [1.0, 2.0], NAN),
        ([1.0, 2.0], [1.0, NAN], NAN),
    ],
)
def test_relative_error(found, truth, error):
    found, truth = torch.tensor(found), torch.tensor(truth)
    assert relative_error(found, truth) == pytest.approx(error, nan_ok=True)
    structure = {"a": truth}, {"a": found}
    assert relative_error(structure[1], structure[0]) == pytest.approx(error, nan_ok=True)
    # Wherever the worst one stands, it is found.
    assert relative_error((found, truth), (truth, truth)) == pytest.approx(error, nan_ok=True)


@pytest.mark.parametrize(
    ("original", "optimized", "passed"),
    [
        (1e-6, 1e-6, True),
        (1e-6, 1.9e-6, True),
        (1e-6, 2.1e-6, False),
        (1e-5, 2.1e-5, False),  # within twice the original's error, beyond the limit
        (0.0, 4e-7, True),  # units in the last place
        (1e-6, NAN, False),
        (NAN, 1e-6, False),
    ],
)
def test_what_passes(original, optimized, passed):
    assert accepts([Comparison(torch.float32, (1,), original, optimized)]) == passed


def test_the_worst_of_several_decides():
    def row(original, optimized):
        return Comparison(torch.float32, (1,), original, optimized)

    assert accepts([row(5e-6, 1e-6), row(1e-6, 8e-6)])
    assert not accepts([row(1e-6, 1e-6), row(1e-6, 8e-6)])
    assert not accepts([row(5e-6, NAN), row(1e-6, 1e-6)])


def test_a_model_of_nan_fails():
    model = randomize(ConvMixer(8, 1, kernel_size=3, patch_size=2, num_classes=3))
    assert all(accepts([row]) for row in verify(model, [(16, 3, 8, 8)]))
    nn.init.constant_(model.head.bias, NAN)
    assert not any(accepts([row]) for row in verify(model, [(16, 3, 8, 8)]))


@pytest.mark.parametrize("allowed", [True, False])
def test_the_switch_for_tf32_is_restored(allowed):
    torch.backends.cudnn.allow_tf32 = allowed
    model = randomize(ConvMixer(8, 1, kernel_size=3, patch_size=2, num_classes=3))
    list(verify(model, [(1, 3, 8, 8)], [torch.float32]))
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_unknown_dtypes():
    with pytest.raises(ValueError, match=r"dtypes must be of torch.float32.*got torch.float64"):
        list(verify(nn.Identity(), [(1, 3, 8, 8)], [torch.float64]))


def test_randomize_lets_images_matter_and_uses_its_own_generator():
    state = torch.get_rng_state()
    model = randomize(ConvMixer(64, 20, kernel_size=5, patch_size=2, act_layer=nn.ReLU))
    assert not torch.equal(state, torch.get_rng_state())  # the model's own construction
    state = torch.get_rng_state()
    again = randomize(model, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        first, second = again(torch.randn(2, 3, 16, 16))
    assert relative_error(first, second) > 1e-3
