"""A ConvMixer with something before or after it, and whether its optimized form does the same."""

import torch
from torch import nn

from convmixer_fast import optimize
from convmixer_fast.models.randomize import randomize
from tests.zoo import locuslab


class Before(nn.Module):
    """A ConvMixer under a function of its image, and of its logits and that image."""

    def __init__(self, before, after=lambda y, x: y):
        super().__init__()
        self.model = locuslab(8, 2, 3, 4)
        self.before, self.after = before, after

    def forward(self, x):
        x = self.before(x)
        return self.after(self.model(x), x)


def same(model, shapes=((1, 3, 16, 20), (2, 3, 17, 31), (5, 3, 16, 16))):
    model = randomize(model)
    fast = optimize(model)
    for shape in shapes:
        x = torch.randn(shape)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(fast(mine), model(theirs), rtol=2e-5, atol=2e-5)
        # Where the source writes into its image, so does the optimized model.
        torch.testing.assert_close(mine, theirs)
    return fast
