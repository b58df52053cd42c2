"""Whether two modules give the same for an input."""

import torch

from tests.tolerances import TOL


def assert_same(fast, model, x):
    with torch.no_grad():
        ours, theirs = fast(x), model(x)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    torch.testing.assert_close(ours, theirs, **TOL[torch.float32])
