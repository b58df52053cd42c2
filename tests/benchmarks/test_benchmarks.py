"""The harness: what is wrong is excluded, what is found is kept, a run goes on where it ended."""

import copy
import csv
import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from convmixer_fast.accuracy import relative_error
from convmixer_fast.benchmarks import harness
from convmixer_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from convmixer_fast.benchmarks.compare import changes, compare_summary, compare_table
from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.harness import DeviceLostError, Settings, run_cases
from convmixer_fast.benchmarks.memory import peak_memory
from convmixer_fast.benchmarks.model_cases import convmixer_case, named_case
from convmixer_fast.benchmarks.op_cases import depthwise_case, patch_embed_case, pointwise_case
from convmixer_fast.benchmarks.options import Measured, batch_sizes
from convmixer_fast.benchmarks.providers import PROVIDERS, Provider, choose
from convmixer_fast.benchmarks.results import ResultFile, Row, read_folder, read_results
from convmixer_fast.benchmarks.subjects import Case, Subject
from convmixer_fast.benchmarks.tables import best, case_tables, number, speedup, summary_table
from convmixer_fast.benchmarks.work import Step, Work, counted_flops, model_steps
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.runtime.backends import cpu_rates
from tests.sweeps import sparse

CPU = torch.device("cpu")
QUICK = Settings(seconds=0.0, min_rounds=2, pause_s=0.0)
TINY = Architecture(8, 2, 3, 2, "gelu", num_classes=4)
CEILINGS = Ceilings(1e10, {"float32": 1e11, "float64": 5e10})


def tiny_case(only=None) -> Case:
    return convmixer_case(
        "tiny", lambda: randomize(TINY.build()), (3, 3, 8, 8), torch.float32, only=only
    )


def provider(name, wrap, **options) -> Provider:
    """A provider that runs the eager module and lets ``wrap`` spoil its output."""
    return Provider(
        name,
        "planted",
        lambda device, dtype: None,
        lambda subject, example: lambda x: wrap(subject.module(x)),
        **options,
    )


def measure(cases, providers, path=None, settings=QUICK) -> ResultFile:
    results = ResultFile.open(path, environment(CPU), lambda: CEILINGS)
    with Progress(console=Console(file=io.StringIO())) as progress:
        run_cases(cases, providers, CPU, results, settings, progress)
    return results


def raising(_):
    raise RuntimeError("planted\nfailure")


PLANTED = {
    "wrong in one value": lambda out: out.index_fill(1, torch.tensor([2]), 0.0),
    "wrong in the last image": lambda out: torch.cat((out[:-1], -out[-1:])),
    "NaN": lambda out: torch.where(out == out.max(), torch.nan, out),
    "half the images": lambda out: torch.cat((out[:1], torch.zeros_like(out[1:]))),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_wrong_candidate_is_named_and_not_timed(kind, capsys):
    results = measure([tiny_case()], [PROVIDERS["eager"], provider("planted", PLANTED[kind])])
    eager, planted = results.rows
    assert eager.status == "ok"
    assert eager.p50_s > 0
    assert planted.provider == "planted"
    assert planted.status == "wrong"
    assert "its error is" in planted.note
    assert planted.p50_s is None
    assert not planted.error <= planted.limit
    assert best({"planted": planted}, ours=False) is None


def test_a_candidate_of_another_shape_or_that_raises_fails_alone():
    fewer = provider("fewer classes", lambda out: out[:, :2])
    broken = provider("broken", raising)
    results = measure([tiny_case()], [fewer, broken, PROVIDERS["eager"]])
    status = {row.provider: (row.status, row.note) for row in results.rows}
    assert status["fewer classes"][0] == "failed"
    assert status["broken"][0] == "failed"
    assert status["broken"][1].startswith("RuntimeError: planted failure (raising, line ")
    assert status["eager"][0] == "ok"


def test_rows_say_what_was_measured():
    (row,) = measure([tiny_case()], [PROVIDERS["eager"]]).rows
    assert (row.bench, row.case) == ("model", "tiny, 8 px, batch 3")
    assert row.labels == {"model": "tiny", "image_size": 8, "batch": 3}
    assert row.p20_s <= row.p50_s <= row.p80_s
    assert row.samples == 2
    assert row.launch == "call"
    assert row.images_per_s == pytest.approx(3 / row.p50_s)
    assert row.flop_per_s == pytest.approx(row.flops / row.p50_s)
    assert row.bytes_per_s == pytest.approx(row.bytes / row.p50_s)
    assert row.roofline_share == pytest.approx(row.floor_s / row.p50_s)
    assert 0 < row.error < 1e-6


def test_inputs_differ_and_repeat_few_images():
    subject = Subject(nn.Conv2d(1, 1, 1), (12, 1, 2, 2), Work((Step(1, 1),), 12), None)
    x = subject.input(0)
    assert x.shape == (12, 1, 2, 2)
    assert torch.equal(x[0], x[5])
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x, subject.input(1))
    exact = copy.deepcopy(subject.module).double()(x.double())
    assert relative_error(subject.truth(x).detach(), exact.detach()) < 1e-12


@pytest.mark.parametrize("name", sparse(PUBLISHED, "convmixer_768_32".__eq__))
def test_flops_are_those_that_pytorch_counts(name):
    model = PUBLISHED[name].build()
    x = torch.empty(2, 3, 224, 224)
    steps = model_steps(recognize(model), tuple(x.shape), 4)
    counted = counted_flops(copy.deepcopy(model).to("meta"), x.to("meta"))
    assert sum(step.flops for step in steps) == counted


def test_bytes_and_floor_of_an_op():
    subject = depthwise_case(6, 5, 3, 2, torch.float32).make(CPU)
    (step,) = subject.work.steps
    assert step.bytes == 4 * (2 * 2 * 6 * 25 + 6 * 9)
    assert step.flops == 2 * 2 * 6 * 25 * 9
    assert subject.work.floor_s(CEILINGS, "float32") == max(step.bytes / 1e10, step.flops / 1e11)
    subject = patch_embed_case(8, 6, 3, 2, torch.float32).make(CPU)
    assert subject.work.bytes == 4 * (2 * 3 * 36 + 2 * 8 * 4 + 8 * 27)


@pytest.mark.parametrize("make", [depthwise_case, pointwise_case, patch_embed_case])
def test_ops_of_every_live_provider_are_right(make):
    sizes = {depthwise_case: (6, 5, 3), pointwise_case: (6, 5), patch_embed_case: (6, 9, 3)}
    chosen, absent = choose("all", CPU, [torch.float32])
    plain = [p for p in chosen if not p.name.startswith("compile")]
    case = make(*sizes[make], 2, torch.float32)
    rows = measure([case], plain).rows
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    assert {"eager", "eager-nhwc", "ours-reference"} <= {row.provider for row in rows}
    assert "openvino" not in {row.provider for row in rows}
    assert "needs a CUDA device" in absent["eager-graph"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_models_of_every_live_provider_are_right():
    chosen, _ = choose("all", CPU, [torch.float32])
    rows = measure([tiny_case()], [p for p in chosen if "max-autotune" not in p.name]).rows
    assert {row.status for row in rows} == {"ok"}, [row.note for row in rows]
    names = {row.provider for row in rows}
    assert {"eager", "compile", "compile-nhwc", "torchscript", "ours-reference"} <= names
    for module in ("onnxruntime", "openvino"):
        assert (module in names) == (PROVIDERS[module].why_not(CPU, torch.float32) is None)


def test_the_digits_model_is_a_case():
    (row,) = measure([named_case("digits", 2, torch.float32)], [PROVIDERS["eager"]]).rows
    assert row.status == "ok"


def test_a_case_may_be_for_some_providers_alone():
    assert tiny_case().wants("compile")
    assert tiny_case(only=("eager", "ours")).wants("ours-cpu")
    assert not tiny_case(only=("eager", "ours")).wants("compile")
    rows = measure([tiny_case(only=("eager",))], [PROVIDERS["eager"], PROVIDERS["eager-nhwc"]]).rows
    assert [row.provider for row in rows] == ["eager"]


def test_results_are_kept_and_a_run_goes_on_where_it_ended(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    made = []
    op = depthwise_case(6, 5, 3, 1, torch.float32)
    model = tiny_case()
    counted = dataclasses.replace(
        model, make=lambda device: (made.append(device), model.make(device))[1]
    )
    first = measure([counted], [PROVIDERS["eager"]], path)
    measure([counted, op], [PROVIDERS["eager"]], path)
    assert len(made) == 1
    results = read_results(path)
    assert [row.bench for row in results.rows] == ["model", "depthwise_block"]
    assert results.rows[0] == first.rows[0]
    assert results.ceilings == CEILINGS
    assert results.environment.commit == first.environment.commit
    # A provider more: the case is measured again, with all of them in turns.
    measure([counted], [PROVIDERS["eager"], PROVIDERS["eager-nhwc"]], path)
    assert len(made) == 2
    assert len(read_results(path).rows) == 3
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["provider"] for row in table] == ["eager", "eager", "eager-nhwc"]
    assert float(table[1]["images_per_s"]) > 0
    assert table[0]["kernel_size"] == "3"
    assert sorted(file.name for file in path.parent.iterdir()) == ["results.csv", "results.json"]


def test_results_of_other_conditions_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    results = measure([tiny_case()], [PROVIDERS["eager"]], path)
    here = environment(CPU)
    other = dataclasses.replace(here, threads=here.threads + 1, commit="another")
    with pytest.raises(ValueError, match=r"results of another threads, commit; choose another"):
        ResultFile.open(path, other, lambda: CEILINGS)
    assert ResultFile.open(path, other, lambda: CEILINGS, fresh=True).rows == []
    assert results.environment.differing(dataclasses.replace(here, command="x", date="y")) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"environment": {"device": 1}}'])
def test_files_that_are_no_results(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is no results file"):
        read_results(path)


def test_a_folder_is_read_as_one(tmp_path):
    with pytest.raises(ValueError, match="has no results"):
        read_folder(tmp_path)
    measure([tiny_case()], [PROVIDERS["eager"]], tmp_path / "models.json")
    op = depthwise_case(6, 5, 3, 1, torch.float32)
    measure([op], [PROVIDERS["eager"]], tmp_path / "ops.json")
    assert [row.bench for row in read_folder(tmp_path).rows] == ["model", "depthwise_block"]


def test_nothing_is_begun_after_the_deadline():
    late = dataclasses.replace(QUICK, deadline=0.0)
    assert measure([tiny_case()], [PROVIDERS["eager"]], settings=late).rows == []


def test_what_is_not_built_at_the_deadline_is_skipped(monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(Settings, "time_is_up", lambda self: next(answers))
    rows = measure([tiny_case()], [PROVIDERS["eager"], PROVIDERS["eager-nhwc"]]).rows
    assert [row.status for row in rows] == ["ok", "skipped"]


def test_a_case_that_cannot_be_made_fails_alone():
    broken = dataclasses.replace(tiny_case(), make=raising, name="broken")
    rows = measure([broken, tiny_case()], [PROVIDERS["eager"]]).rows
    assert [(row.case, row.status) for row in rows] == [
        ("broken", "failed"), ("tiny, 8 px, batch 3", "ok"),
    ]  # fmt: skip


def test_a_candidate_that_breaks_the_device_is_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    alive = True

    def crash(_):
        nonlocal alive
        alive = False
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(harness, "_device_is_alive", lambda device: alive)
    candidates = [PROVIDERS["eager"], provider("crasher", crash), PROVIDERS["eager-nhwc"]]
    with pytest.raises(DeviceLostError, match="crasher broke the device in model tiny"):
        measure([tiny_case()], candidates, path)
    status = {row.provider: row.status for row in read_results(path).rows}
    assert status == {"eager": "skipped", "crasher": "crashed", "eager-nhwc": "skipped"}
    alive = True
    measure([tiny_case()], candidates, path)
    status = {row.provider: row.status for row in read_results(path).rows}
    assert status == {"eager": "ok", "crasher": "crashed", "eager-nhwc": "ok"}


def test_choosing_providers():
    names = [p.name for p in choose("eager,ours-reference,eager", CPU, [torch.float32])[0]]
    assert names == ["eager", "ours-reference"]
    default = [p.name for p in choose(None, CPU, [torch.float32])[0]]
    assert "compile-max-autotune" not in default
    assert "ours-reference" not in default
    with pytest.raises(ValueError, match=r"providers must be of eager, .*, or all, got 'egaer'"):
        choose("egaer", CPU, [torch.float32])
    with pytest.raises(ValueError, match="'eager-graph' cannot run here: needs a CUDA device"):
        choose("eager-graph", CPU, [torch.float32])
    assert "float32 on a CPU only" in choose(None, CPU, [torch.float16])[1]["openvino"]


def test_lists_of_the_command_line():
    assert batch_sizes("1,8") == [1, 8]
    for wrong in ("", "0", "1,x", "-1"):
        with pytest.raises(ValueError, match="batches must be numbers above 0"):
            batch_sizes(wrong)
    assert Measured(device="cpu").chosen_dtypes() == [torch.float32]
    assert Measured(device="cuda").chosen_dtypes() == [torch.float16]
    with pytest.raises(ValueError, match="dtypes must be one of 'auto', .*, got 'f16'"):
        Measured("f16").chosen_dtypes()
    assert Measured("bfloat16,int8", device="cpu").precisions() == ["bfloat16", "int8"]
    with pytest.raises(ValueError, match="int8 is of whole models"):
        Measured("int8").chosen_dtypes()


def row(provider, p50_s, case="a") -> Row:
    return Row("model", case, {}, "float32", provider, "ok", p20_s=p50_s, p50_s=p50_s, p80_s=p50_s)


def test_ratios_and_their_changes():
    before = [row("eager", 4.0), row("compile", 3.0), row("ours-cpu", 2.0), row("ours-b", 5.0)]
    after = [row("eager", 4.0), row("ours-cpu", 2.5), row("eager", 1.0, "b")]
    assert speedup({r.provider: r for r in before}) == 1.5
    assert speedup({"eager": before[0]}) is None
    (change,) = changes(before, after)
    assert (change.before, change.after) == (1.5, 1.6)
    assert change.relative == change.undisturbed == pytest.approx(1.6 / 1.5 - 1)
    assert compare_table([change]).row_count == 1
    busy = [dataclasses.replace(r, p50_s=2 * r.p50_s) if r.ours else r for r in before]
    (change,) = changes(before, busy)
    assert (change.relative, change.undisturbed) == (-0.5, 0)
    summary = compare_summary([change])
    assert "ratios of medians: 0 of 1 within 10%, largest change: 50.0%" in summary
    assert "ratios of undisturbed times: 1 of 1 within 10%, largest change: 0.0%" in summary


def test_tables():
    results = measure([tiny_case()], [PROVIDERS["eager"], provider("planted", torch.zeros_like)])
    console = Console(file=io.StringIO(), width=150)
    for table in (*case_tables(results.rows), summary_table(results.rows)):
        console.print(table)
    text = console.file.getvalue()
    assert "model: tiny, 8 px, batch 3, float32" in text
    assert "wrong" in text
    assert [number(value) for value in (None, 0.012345, 12.345, 12345.6)] == [
        "", "0.0123", "12.3", "12,346",
    ]  # fmt: skip


def test_ceilings_are_positive_and_plausible():
    ceilings = measure_ceilings(CPU, [torch.float32, torch.bfloat16], seconds=0.0)
    assert 1e8 < ceilings.bytes_per_s < 1e13
    rates = ceilings.flop_per_s
    assert set(rates) >= {"float32", "bfloat16"}
    assert 1e9 < rates["float32"] < 1e15
    # Smaller numbers may be computed in float32.
    assert min(rates.values()) == rates["float32"]
    # In registers, and so no less than any product can reach.
    own = cpu_rates(torch.get_num_threads())
    assert set(own) <= set(rates)
    assert rates["float32"] >= 0.5 * own.get("float32", 0)
    assert Ceilings(**json.loads(json.dumps(ceilings.to_json()))) == ceilings


def test_memory_of_a_call_is_seen():
    x = torch.ones(2**24)
    out, peak = peak_memory(CPU, lambda x: (x + 1).sum(), x)
    assert out == 2 * x.numel()
    if peak is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert 0.9 * x.nbytes < peak < 3 * x.nbytes


def test_environment_stamps_the_run():
    stamp = environment(CPU)
    assert stamp.device
    assert stamp.threads == torch.get_num_threads()
    assert stamp.versions["torch"] == torch.__version__
    assert stamp.command
    assert stamp.slug().endswith(f"-{stamp.threads}-threads-{stamp.date[:10]}")
    assert dataclasses.replace(
        stamp, device="NVIDIA H100 80GB HBM3", device_type="cuda"
    ).slug() == (f"nvidia-h100-80gb-hbm3-{stamp.date[:10]}")
    assert type(stamp)(**json.loads(json.dumps(stamp.to_json()))) == stamp
