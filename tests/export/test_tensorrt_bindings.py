"""The TensorRT export against the real bindings of two versions, and what networks compute.

Every call is checked by pybind11, over stubs of TensorRT's libraries, and by a double that knows
each name and signature; networks recorded by the double are evaluated. TensorRT builds nothing.
``tensorrt_*_checks.py`` have the checks. ``make test-all`` takes the oldest version too.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.export.tensorrt_bindings import PACKAGES, find_site, why_not
from tests.paths import ROOT
from tests.sweeps import sparse

# The program with the checks is started once for each version.
pytestmark = pytest.mark.xdist_group("tensorrt_bindings")

CHECKS = [
    name
    for path in sorted(Path(__file__).parent.glob("tensorrt_*checks.py"))
    for name in re.findall(r"^def (check_\w+)", path.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def run(version):
        site = why_not() or find_site(version)
        if isinstance(site, str):
            return site
        command = [sys.executable, "-m", "tests.export.tensorrt_checks", str(site)]
        ran = subprocess.run(
            [*command, str(tmp_path_factory.mktemp("stubs"))],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("version", sparse([*PACKAGES, "installed"], "installed".__eq__))
def test_bindings(results, version, check):
    found = results(version)
    if isinstance(found, str):
        pytest.skip(found)
    assert found[check] is None, found[check]
