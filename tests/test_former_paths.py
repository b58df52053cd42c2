"""What was made with 0.1, before modules moved into folders, loads."""

import importlib
import pickle
import subprocess
import sys

import pytest
import torch

import convmixer_fast
from convmixer_fast import FusedConvMixer, fold, optimize, recognize
from convmixer_fast._former_paths import FORMER_PATHS
from convmixer_fast.models.preprocessing import Preprocessing
from tests.paths import ROOT

# Written by 0.1 (commit 774a4de): a ConvMixer of 8 channels, its optimized form, another one with a
# head that is kept as a module, their outputs on a batch of images, and plain data.
PICKLE = ROOT / "tests" / "data" / "pickled-by-the-flat-layout.pickle"


@pytest.fixture(scope="module")
def pickled():
    with PICKLE.open("rb") as file:
        return pickle.load(file)


def test_pickles_load_and_compute_what_they_did(pickled):
    images = pickled["images"]
    for name, logits in (("optimized", "logits"), ("optimized_other_head", "other_logits")):
        assert type(pickled[name]) is FusedConvMixer
        with torch.inference_mode():
            # Another processor than the one that wrote it may round otherwise.
            torch.testing.assert_close(pickled[name](images), pickled[logits])
    assert pickled["preprocessing"] == Preprocessing(image_size=8)
    assert pickled["architecture"].dim == 8


def test_state_dicts_load(pickled):
    fast = optimize(pickled["model"])
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    fast.load_state_dict(pickled["state_dict"])
    with torch.inference_mode():
        torch.testing.assert_close(fast(pickled["images"]), pickled["logits"])


def test_plain_data_runs(pickled):
    for folded in (pickled["folded"], fold(pickled["spec"])):
        with torch.inference_mode():
            found = FusedConvMixer(folded)(pickled["images"])
        torch.testing.assert_close(found, pickled["logits"])


def test_pickles_that_are_written_now_name_the_new_places(pickled):
    text = pickle.dumps(pickled["optimized"])
    assert b"convmixer_fast.runtime.fused" in text
    assert not any(former.encode() + b"\x94" in text for former in FORMER_PATHS)


@pytest.mark.parametrize("former", FORMER_PATHS)
def test_a_former_path_is_the_module_itself(former):
    if former.endswith((".sweep", ".tuning")):
        pytest.importorskip("triton")
    assert importlib.import_module(former) is importlib.import_module(FORMER_PATHS[former])


def test_importing_them_does_not_hide_what_is_public():
    code = (
        "import convmixer_fast.recognize, convmixer_fast.fused\n"
        "from convmixer_fast.randomize import randomize\n"
        "from convmixer_fast.model import ConvMixer\n"
        "assert callable(convmixer_fast.recognize) and callable(convmixer_fast.optimize)\n"
        "assert convmixer_fast.ConvMixer is ConvMixer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert callable(convmixer_fast.recognize)
    assert recognize is convmixer_fast.recognize
