"""The two runs on a GPU, rehearsed without one."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install '.[triton]'")

from typer.testing import CliRunner

from convmixer_fast.benchmarks.__main__ import app
from convmixer_fast.benchmarks.ceilings import Ceilings
from convmixer_fast.benchmarks.environment import Environment, environment
from convmixer_fast.benchmarks.gpu import __main__ as command
from convmixer_fast.benchmarks.gpu import candidates, checks, inside, predictions, processes, tiles
from convmixer_fast.benchmarks.gpu import profile as ncu
from convmixer_fast.benchmarks.gpu.forms import Finding
from convmixer_fast.benchmarks.gpu.plan import PLANS, Step
from convmixer_fast.benchmarks.gpu.rows import table_row
from convmixer_fast.benchmarks.gpu.session import Session
from convmixer_fast.benchmarks.model_cases import MODELS
from convmixer_fast.benchmarks.results import read_results
from convmixer_fast.benchmarks.work import Step as Pass
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.tuned import Problem
from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", PLANS)
def test_rehearsal(plan, tmp_path):
    """All of a plan but the GPU."""
    arguments = [sys.executable, "-m", "benchmarks.gpu", plan, "--rehearse", "--output", tmp_path]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not well: none" in done.stdout
    for step in PLANS[plan]:
        assert f"== {step.name}: " in done.stdout
    assert "left out" not in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) + (plan == "second") <= 8  # with Nsight Compute's, which is not rehearsed
    found = json.loads((tmp_path / "checks.json").read_text())["rows"]
    assert {row["status"] for row in found} == {"ok"}
    assert {row["kind"] for row in found} == {"form", "tile"}
    rows = read_results(tmp_path / "models.json").rows
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}
    assert {row.provider for row in rows} == {"eager", "eager-nhwc", "ours-triton"}
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    swept = json.loads((tmp_path / "tiles.json").read_text())["problems"]
    assert [len(problem["tiles"]) > 1 for problem in swept] == [True, True]
    assert "device_s" in json.loads((tmp_path / "calls.json").read_text())["cases"][0]
    if plan == "first":
        assert json.loads((tmp_path / "inside.json").read_text())["models"][0]["kernels"]
    assert " passed" in (tmp_path / "tests.txt").read_text()


def program(text, seconds=20.0, **more):
    return Step("it", seconds, lambda *_: ["-c", text], **more)


@pytest.mark.exhaustive
def test_a_plan_ends_in_time_and_says_what_is_left_out(tmp_path, capfd):
    sleep = program("import time; time.sleep(60)")
    session = Session(tmp_path, 15.0, rehearse=True)
    began = time.monotonic()
    assert session.run([sleep, program("print('never')")]) == 0
    assert time.monotonic() - began < 20
    out = capfd.readouterr().out
    assert "did not end within 7 s" in out
    assert "it: left out" in out
    assert "never" not in out


def test_a_step_that_fails_is_told_and_the_next_one_runs(tmp_path, capfd):
    steps = [program("raise SystemExit(3)"), program("print('next')", log="log.txt")]
    assert Session(tmp_path, 60.0, rehearse=True).run(steps) == 1
    assert "not well: it" in capfd.readouterr().out
    assert (tmp_path / "log.txt").read_text() == "next\n"


def test_a_step_that_lost_the_device_goes_on(tmp_path):
    text = f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'runs')!r}); "
    text += "p.open('a').write('x'); os._exit(0 if p.stat().st_size > 2 else 75)"
    session = Session(tmp_path, 60.0, rehearse=True)
    assert session.run([program(text, restart_on=75)]) == 0
    assert (tmp_path / "runs").read_text() == "xxx"


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_GRACE_S", 0.5)
    # A process that has started another, which must not outlive it.
    child = f"import os, time; os.fork(); open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w'); "
    arguments = [sys.executable, "-c", child + "time.sleep(60)"]
    assert processes.run(arguments, 1.5, {}) == processes.TIMED_OUT
    assert "did not end within" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    deadline = time.monotonic() + 10
    while any(map(runs, tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, tmp_path.iterdir()))


def runs(process: Path) -> bool:
    try:
        return "State:\tZ" not in (Path("/proc") / process.name / "status").read_text()
    except OSError:
        return False


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "first", "--only", "tiles:5,checks", "--list"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["tiles", "checks"]
    assert lines[0].startswith("   5 s")
    monkeypatch.setattr(sys, "argv", ["gpu", "first", "--only", "tile"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no step is called 'tile'; there are checks, " in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "first"])
    assert command.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(command, "_NEEDED", ("torch", "no_such_module"))
    assert command.main() == 2
    assert "lacks: no_such_module" in capsys.readouterr().err


def test_findings():
    assert Finding(1e-3, 2e-3).status == "ok"
    assert Finding(3e-3, 2e-3).status == "wrong"
    assert Finding(float("nan"), 2e-3).status == "wrong"
    assert Finding(float("nan"), 2e-3, "it was refused").status == "failed"


def test_checks_go_on_behind_what_killed_the_process(tmp_path):
    log = tmp_path / "log.jsonl"
    checks._append(log, {"number": 0, "status": "ok", "name": "a", "kind": "tile"})
    checks._append(log, {"number": 3, "status": "started", "name": "b", "kind": "tile"})
    checks._mark_crash(log)
    with log.open("a") as file:
        file.write('{"number": 5, "sta')  # what was being written when the process died
    rows = checks._read(log)
    assert {number: row["status"] for number, row in rows.items()} == {0: "ok", 3: "crashed"}
    assert checks.right_tiles(tmp_path / "none.json") is None
    checks._write(tmp_path / "checks.json", list(rows.values()))
    assert checks.right_tiles(tmp_path / "checks.json") == {"a"}


def test_what_is_in_a_call(tmp_path):
    events = [
        {"cat": "kernel", "name": "void second<int>(float)", "ts": 20.0, "dur": 4.0},
        {"cat": "kernel", "name": "first", "ts": 10.0, "dur": 6.0},
        {"cat": "kernel", "name": "first", "ts": 17.0, "dur": 2.0},
        {"cat": "cpu_op", "name": "aten::linear", "ts": 0.0, "dur": 50.0},
        {"cat": "kernel", "name": "a mark without a duration", "ts": 0.0},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    times = inside.read_trace(path, ("kernel",))
    assert [name for name, _, _ in times] == ["first", "first", "void second<int>(float)"]
    steps = [Pass(1e9, 1e3), Pass(1e6, 3e6), Pass(2e9, 1e3), Pass(1e3, 1e3)]
    ceilings = Ceilings(1e12, {"float16": 1e15})
    found = inside.group(times, steps, ceilings)
    assert found["span_s"] == pytest.approx(14e-6)
    assert found["gaps_s"] == pytest.approx(2e-6)
    assert [(row["kernel"], row["count"]) for row in found["kernels"]] == [
        ("first", 2),
        ("second", 1),
    ]
    assert found["floor_s"] == pytest.approx(1e-6 + 3e-6 + 2e-6 + 1e-9)
    assert found["depthwise_floor_s"] == pytest.approx(3e-6)
    assert found["pointwise_floor_s"] == pytest.approx(2e-6)


def test_predictions_are_those_of_the_document():
    text = (ROOT / "kernels" / "PREDICTIONS.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    kernels = {row[0]: float(row[4].split()[0]) for row in rows if len(row) == 6 and "us" in row[4]}
    assert {name: 1e6 * seconds for name, seconds in predictions.KERNELS.items()} == pytest.approx(
        kernels
    )
    rate = re.compile(r"([\d,]+) images/s")
    models = {
        row[0]: float(rate.match(row[2])[1].replace(",", ""))
        for row in rows
        if len(row) == 3 and rate.match(row[2])
    }
    assert models == predictions.MODELS
    assert set(predictions.KERNELS) <= {str(batch) for batch in candidates.batches()}
    assert {name.split(",")[0] for name in predictions.MODELS} <= set(MODELS)


@pytest.mark.exhaustive
def test_a_sweep_goes_on_and_prints_rows(tmp_path, capfd):
    arguments = ["tune", "--output", str(tmp_path), "--rehearse", "--seconds", "120"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    out = capfd.readouterr().out
    assert "forms: 0 of 0 right; tiles: 4 of 4 right" in out
    data = json.loads((tmp_path / "tiles.json").read_text())
    assert len(data["problems"]) == 2
    for result in data["problems"]:
        tile = result["tiles"][0]
        assert f"# {result['batch']}: {1e6 * tile['seconds']:.1f} us, " in out
    where = Environment(**data["environment"])
    assert tiles.known_results(tmp_path / "tiles.json", where) == data["problems"]
    other = dataclasses.replace(where, device="another")
    assert tiles.known_results(tmp_path / "tiles.json", other) == []
    assert tiles.known_results(tmp_path / "none.json", where) == []


def test_the_sweep_needs_a_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune", "--output", "x"])
    assert "tune needs a CUDA device" in str(result.exception)


def test_rows_of_tables():
    rows = [
        {"kind": "ToeplitzTile", "tile": ToeplitzTile(16, 8)._asdict(), "seconds": 2e-6},
        {"kind": "ToeplitzTile", "tile": ToeplitzTile(8, 8)._asdict(), "seconds": 3e-6},
    ]
    rows = [row | {"present": number == 1} for number, row in enumerate(rows)]
    problem = Problem("depthwise_block", 2, 2, 8, 8, 3, "relu", "float16")
    where = dataclasses.replace(environment(torch.device("cpu")), device="X", date="2026-01-02T")
    result = {"batch": "b", "problem": problem._asdict(), "tiles": rows}
    assert table_row(result, where) == (
        "# b: 2.0 us, 1.50x the present tile's rate, X, 2026-01-02.\n"
        f"Config(3, 8, 8, 0, 4, {ToeplitzTile(16, 8)!r}),"
    )
    product = {"kind": "PointerTile", "tile": PointerTile(32, 32, 16, 4, 1)._asdict()}
    problem = Problem("pointwise_block", 16, 8, 4, 4, 1, "gelu", "float16")
    row = product | {"seconds": 1e-6, "present": True}
    result = {"batch": "b", "problem": problem._asdict(), "tiles": [row]}
    tile = PointerTile(32, 32, 16, 4, 1)
    assert table_row(result, where).endswith(f'Config(_EVERY, "16-bit", True, 16, 0, {tile!r}),')


def test_batches_have_names():
    names = [str(batch) for batch in candidates.batches()]
    assert names[:2] == [
        "depthwise 768 x 32x32 k7 relu, batch 64",
        "pointwise 768 x 32x32 relu, batch 64",
    ]
    assert len(set(names)) == len(names) == 18
    only = [str(batch) for batch in candidates.batches("bfloat16", "wise 768")]
    assert only[0] == "depthwise 768 x 32x32 k7 relu bfloat16, batch 64"
    assert len(only) == 6


def test_candidates_are_few_enough():
    """What is compiled for one run fits into its minutes: two seconds each on fourteen cores."""
    device = torch.device("cpu")
    assert sum(len(list(candidates.tiles_for(b, device))) for b in candidates.batches()) < 500


def test_nsight_compute_is_asked_for_sections():
    arguments = ncu.ncu_command("ncu", Path("x") / "ncu.txt")
    assert arguments[0] == "ncu"
    assert arguments[-2:] == ["benchmarks.gpu.profile", "--workload"]
    assert arguments[arguments.index("--section") + 1] == "SpeedOfLight"
