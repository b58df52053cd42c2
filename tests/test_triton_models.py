"""Whole models on the Triton backend: the published architectures, fewer layers, small images.

Without a CUDA device the kernels are interpreted, on the CPU.
"""

import copy
from dataclasses import replace

import pytest
import torch

from convmixer_fast import backends, optimize
from convmixer_fast.published import PUBLISHED
from convmixer_fast.verify import randomize_batch_norm, relative_error
from tests.tolerances import MODEL_TOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backends.why_not("triton", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"needs Triton: {REASON}")


@pytest.mark.parametrize("dtype", MODEL_TOL, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures(name, dtype):
    architecture = replace(PUBLISHED[name], depth=2)
    model = randomize_batch_norm(architecture.build()).to(DEVICE)
    # 5 x 4 patches, and a few pixels that belong to none.
    x = torch.randn(1, 3, 5 * architecture.patch_size + 3, 4 * architecture.patch_size + 1)
    x = x.to(DEVICE, dtype)
    with torch.no_grad():
        out = optimize(model, backend="triton", dtype=dtype)(x)
        # The weights stay unrounded: what rounding them costs is part of the error.
        truth = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).to(dtype)(x)
    assert out.dtype == dtype
    error = relative_error(out, truth)
    assert error <= MODEL_TOL[dtype], f"{error:.1e}; eager {relative_error(eager, truth):.1e}"
