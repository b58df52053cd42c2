"""The words of options: those of the tables, checked by type checkers, the API and the commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmixer_fast import choices
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.choices import check_choice, listed, words
from convmixer_fast.runtime.backends import BACKENDS
from convmixer_fast.support.option_groups import completed
from tests.paths import ROOT

USER = """
import torch
from torch import nn
import convmixer_fast
from convmixer_fast.export import to_onnx, to_torch_export

def deploy(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    fast = convmixer_fast.optimize(model, backend="cpu", cuda_graphs=True, in_training="stay")
    to_onnx(model, "model.onnx", precision="bfloat16", target="tensorrt")
    to_torch_export(model, "model.pt2", ops="fused")
    convmixer_fast.load("model.safetensors", activation="relu")
    logits: torch.Tensor = fast(images)
    return logits
"""
TYPING_ERRORS = (
    ('backend="cpu"', 'backend="gpu"'),
    ("cuda_graphs=True", 'cuda_graphs="never"'),
    ('in_training="stay"', 'in_training="keep"'),
    ('precision="bfloat16"', 'precision="bf16"'),
    ('target="tensorrt"', 'target="trt"'),
    ('ops="fused"', 'ops="ours"'),
    ('activation="relu"', 'activation="ReLU"'),
)


def test_the_words_are_those_of_the_tables():
    assert words(choices.ActivationName) == tuple(ACTIVATIONS)
    assert words(choices.BackendName) == ("auto", *BACKENDS)
    assert choices.DTYPES["bfloat16"] == torch.bfloat16
    assert choices.float_precision(torch.float16) == "float16"


def test_others_are_refused_by_name():
    check_choice("ops", "plain", choices.TorchOps)
    with pytest.raises(ValueError, match="ops must be one of 'plain', 'fused', got 'fast'"):
        check_choice("ops", "fast", choices.TorchOps)
    assert listed("dtypes", "float32, float16", choices.Precision) == ["float32", "float16"]
    with pytest.raises(ValueError, match="dtypes must be one of 'float32', .*, got ''"):
        listed("dtypes", "float32,", choices.Precision)


def test_the_last_of_several_words_is_completed():
    complete = completed(choices.FloatPrecision)
    assert complete("") == ["float32", "float16", "bfloat16"]
    assert complete("fl") == ["float32", "float16"]
    assert complete("float32,b") == ["float32,bfloat16"]


def _mypy(program: str, folder: Path) -> str:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--ignore-missing-imports", "--cache-dir", str(folder), "program.py"]
    where = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=where, capture_output=True, text=True).stdout


@pytest.mark.exhaustive
def test_a_type_checker_refuses_a_typing_error(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy: pip install '.[dev]'")
    assert "Success" in _mypy(USER, tmp_path)
    wrong = USER
    for right, other in TYPING_ERRORS:
        assert right in wrong
        wrong = wrong.replace(right, other)
    found = _mypy(wrong, tmp_path)
    assert f"Found {len(TYPING_ERRORS)} errors" in found, found
    for _, other in TYPING_ERRORS:
        assert f"incompatible type \"Literal['{other.split(chr(34))[1]}']\"" in found, found
