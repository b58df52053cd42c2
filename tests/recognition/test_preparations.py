"""What stands before the stem: writes, and changes of the batch.

Each of these once looked like something simpler than it is.
"""

import pytest
import torch
from torch import nn

from tests.recognition.before import Before, same
from tests.zoo import locuslab


def _zero_a_channel(x):
    x = x.clone()
    x[:, 0] = 0
    return x


def _zero_a_channel_of_the_image(x):
    x[:, 0] = 0
    return x


def _normalize_in_place(x):
    x = x * 1.5
    for channel in range(3):
        x[:, channel].sub_(0.1 * channel).div_(0.5 + channel)
    return x


def _scale_the_image(x):
    x.mul_(0.5)
    x.sub_(0.25)
    return x


@pytest.mark.parametrize(
    "before",
    [_zero_a_channel, _zero_a_channel_of_the_image, _normalize_in_place, _scale_the_image],
)
@pytest.mark.parametrize("keeps_image", [False, True])
def test_preparations_that_write(before, keeps_image):
    same(Before(before, (lambda y, x: (y, x)) if keeps_image else (lambda y, x: y)))


@pytest.mark.parametrize(
    "after",
    [
        lambda y, x: y.view(2, x.shape[0], -1).mean(0),
        lambda y, x: y[: x.shape[0]] + y[x.shape[0] :],
        lambda y, x: y.reshape(2, -1, 10).amax(0),
    ],
    ids=["view", "slices", "reshape"],
)
def test_preparations_that_change_the_batch(after):
    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = locuslab(8, 2, 3, 4)

        def forward(self, x):
            return after(self.model(torch.cat((x, x.flip(-1)))), x)

    same(Flipped())
