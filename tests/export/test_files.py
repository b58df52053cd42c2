"""Exports take the place of nothing but an earlier export."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from convmixer_fast.export import to_onnx, to_tensorrt, to_torch_export, to_triton_server
from convmixer_fast.export.files import weights_beside
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.support.files import new_file, write_whole


@pytest.fixture(scope="module")
def model():
    return randomize(Architecture(24, 1, 5, 4, "gelu", 3, 3).build())


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "mine.onnx"
    to_onnx(model, path, image_size=16)
    return path


EXPORTS = {
    "model.onnx": lambda model, path: to_onnx(model, path, image_size=16),
    "model.pt2": lambda model, path: to_torch_export(model, path, image_size=16),
    "model.plan": lambda model, path: to_tensorrt(model, path, image_size=16),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_pipe_stays_a_pipe(model, tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match="is a device, a pipe or a socket"):
        EXPORTS[name](model, path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_any_kind(tmp_path):
    with pytest.raises(FileExistsError, match="/dev/null is a device"):
        new_file("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "pipe", b"")
    with pytest.raises(IsADirectoryError):
        new_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        new_file(tmp_path / "no" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"stays")
    for points_to in (target, tmp_path / "nothing", "/dev/null"):
        link.unlink(missing_ok=True)
        link.symlink_to(points_to)
        write_whole(link, b"new")
        assert link.read_bytes() == b"new"
        assert not link.is_symlink()
    assert target.read_bytes() == b"stays"


def test_what_lies_beside_stays(model, tmp_path):
    """A file that is called as the weights would be is not always that."""
    path = tmp_path / "keep.onnx"
    weights_beside(path).write_text("the user's")
    to_onnx(model, path, image_size=16)
    assert weights_beside(path).read_text() == "the user's"
    with pytest.raises(FileExistsError, match="not of an earlier export"):
        to_onnx(model, path, image_size=16, external_data=True)
    assert weights_beside(path).read_text() == "the user's"
    weights_beside(path).unlink()
    to_onnx(model, path, image_size=16, external_data=True)
    to_onnx(model, path, image_size=16, external_data=True)
    assert weights_beside(path).is_file()
    to_onnx(model, path, image_size=16)
    assert not weights_beside(path).exists()


def test_a_version_with_files_of_the_users_is_refused(exported, tmp_path):
    place = tmp_path / "model" / "1"
    place.mkdir(parents=True)
    mine = place / "mine.onnx"
    mine.write_bytes(exported.read_bytes())
    with pytest.raises(FileExistsError, match=r"has mine\.onnx, which no export wrote"):
        to_triton_server(mine, tmp_path, name="model")
    assert mine.is_file()
    assert [path.name for path in place.parent.iterdir()] == ["1"]
    folder = to_triton_server(mine, tmp_path, name="model", version=2)
    assert (folder / "2" / "model.onnx").is_file()
    # What a killed process was writing is not in the way.
    (folder / "2" / ".model.onnx.1.2.new").write_bytes(b"half")
    to_triton_server(exported, tmp_path, name="model", version=2)
    assert [path.name for path in (folder / "2").iterdir()] == ["model.onnx"]


FULL_DISK = """
import resource, signal, sys, torch
from convmixer_fast.export import to_onnx, to_torch_export, to_triton_server
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

model = randomize(Architecture(24, 1, 5, 4, "gelu", 3, 3).build())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    {call}
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("model.pt2", "to_torch_export(model, sys.argv[1], image_size=16)"),
        ("repository", "to_triton_server(sys.argv[2], sys.argv[1])"),
    ],
)
@pytest.mark.exhaustive
def test_a_full_disk_is_an_os_error(exported, tmp_path, name, call):
    """Files that may not grow beyond 4 kB: nothing is left, and an old file stays."""
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"old")
    code = FULL_DISK.format(call=call)
    done = subprocess.run(
        [sys.executable, "-c", code, path, exported], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    if path.suffix:
        assert left == [path]
        assert path.read_bytes() == b"old"
    else:
        assert all(file.name == "config.pbtxt" for file in left)
