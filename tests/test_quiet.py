"""Exports and tracing leave the process's streams and its root logger alone."""

import contextlib
import logging
import sys
import threading

import pytest
import torch
from torch import nn

from convmixer_fast import UnsupportedModelError, optimize
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.support.progress import bars, status
from convmixer_fast.support.quiet import logging_by, printing_nothing, without_logs
from tests.sweeps import sparse


@pytest.fixture
def untouched(monkeypatch, capfd):
    """Fail where a stream is replaced, something is printed or the root logger is used."""

    def refuse(*_, **__):
        raise AssertionError("what belongs to the whole process is changed")

    monkeypatch.setattr(contextlib, "redirect_stdout", refuse)
    monkeypatch.setattr(contextlib, "redirect_stderr", refuse)
    # Where it has no handler, logging.warning() gives it one for good.
    for name in ("basicConfig", "warning", "error", "info"):
        monkeypatch.setattr(logging, name, refuse)
    monkeypatch.setattr(logging.root, "setLevel", refuse)
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def model():
    return randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build())


@pytest.mark.parametrize("method", sparse(["minmax", "percentile"], lambda m: m == "percentile"))
def test_int8(model, untouched, method):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    optimize(model, precision="int8", calibration=torch.rand(4, 3, 8, 8), calibration_method=method)


def test_a_model_that_cannot_be_traced(untouched):
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2, 2)

        def forward(self, x):
            return self.conv(x * 2 if x.max() > 1 else x)

    with pytest.raises(UnsupportedModelError, match="could not be traced"):
        optimize(Peeks().eval())


def test_logs_of_one_thread_alone_are_dropped(caplog):
    logger = logging.getLogger("a_library.part")
    with without_logs("a_library"):
        logger.warning("mine")
        other = threading.Thread(target=logger.warning, args=("another's",))
        other.start()
        other.join()
    logger.warning("afterwards")
    assert caplog.messages == ["another's", "afterwards"]


def test_a_module_prints_and_logs_as_before_afterwards(capsys, caplog):
    from onnxruntime.quantization import quantize

    with printing_nothing(quantize), logging_by(logging.getLogger("ours"), quantize):
        vars(quantize)["print"]("nothing")
        quantize.logging.warning("by ours")
    assert "print" not in vars(quantize)
    assert quantize.logging is logging
    assert capsys.readouterr().out == ""
    assert [record.name for record in caplog.records] == ["ours"]


def test_progress_leaves_the_streams_alone():
    from rich.console import Console

    before = sys.stdout, sys.stderr
    with bars(Console(stderr=True, force_terminal=True)) as progress:
        progress.add_task("something")
        assert (sys.stdout, sys.stderr) == before
    with status("something", shown=True) as report:
        report("a step")
        assert (sys.stdout, sys.stderr) == before
