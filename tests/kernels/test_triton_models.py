"""Whole models on the Triton backend: the published widths, and several layers of a small one.

Without a CUDA device the kernels are interpreted, on the CPU.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from convmixer_fast import optimize
from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.sweeps import sparse
from tests.tolerances import MODEL_TOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backends.why_not("triton", DEVICE, torch.float32)
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(REASON is not None, reason=f"needs Triton: {REASON}"),
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    sparse(
        itertools.product(PUBLISHED, MODEL_TOL),
        list(zip(PUBLISHED, MODEL_TOL, strict=True))[1].__eq__,
        ids=lambda point: f"{point[0]}-{point[1]}",
    ),
)
def test_published_architectures(name, dtype):
    architecture = replace(PUBLISHED[name], depth=1)
    patch = architecture.patch_size
    # 3 x 2 patches, and a few pixels that belong to none.
    check(architecture, dtype, (1, 3, 3 * patch + 3, 2 * patch + 1))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    sparse(
        itertools.product(ACTIVATIONS, MODEL_TOL),
        lambda point: False,
        ids=lambda point: f"{point[0]}-{point[1]}",
    ),
)
def test_several_layers(activation, dtype):
    check(Architecture(40, 4, 5, 3, activation, 1, 10), dtype, (2, 1, 22, 17))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", MODEL_TOL, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_whole(name, dtype):
    check(PUBLISHED[name], dtype, (3, 3, 224, 224), LIMITS[dtype])


def check(architecture, dtype, shape, limit=None):
    model = randomize(architecture.build()).to(DEVICE)
    x = torch.randn(shape).to(DEVICE, dtype)
    with torch.no_grad():
        out = optimize(model, backend="triton", dtype=dtype)(x)
        # The weights stay unrounded: what rounding them costs is part of the error.
        truth = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).to(dtype)(x)
    assert out.dtype == dtype
    error, eagers = relative_error(out, truth), relative_error(eager, truth)
    print(f"error {error:.1e}, eager's {eagers:.1e}")
    assert error <= (MODEL_TOL[dtype] if limit is None else limit)
    if DEVICE.type == "cuda":
        assert error <= max(2 * eagers, 4 * torch.finfo(dtype).eps)
