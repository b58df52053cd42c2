"""Small models, and what ONNX Runtime makes of their files."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnxruntime

from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

SMALL = Architecture(24, 2, 5, 4, "gelu", 3, 7)

RELU = Architecture(24, 2, 5, 4, "relu", 3, 7)


def model_of(architecture=SMALL):
    return randomize(architecture.build())


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": x.numpy()})
    return [torch.from_numpy(np.asarray(values)) for values in found]


def error_of(path, model, x, dtype=torch.float32):
    with torch.no_grad():
        truth = torch.utils._pytree.tree_leaves(copy.deepcopy(model).double()(x.double()))
    return relative_error(run(path, x.to(dtype)), truth)
