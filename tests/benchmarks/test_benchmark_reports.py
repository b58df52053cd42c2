"""Pictures, reports and the commands that make them."""

import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")

from PIL import Image
from typer.testing import CliRunner

from convmixer_fast.benchmarks.__main__ import app as benchmarks_app
from convmixer_fast.benchmarks.ceilings import Ceilings
from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.plots import PICTURES, THEMES, draw, save_pictures
from convmixer_fast.benchmarks.report import write_report
from convmixer_fast.benchmarks.results import ResultFile, Row, read_results
from convmixer_fast.commands.cli import app
from tests.benchmarks.test_benchmarks import CPU


def made_up(path: Path | None) -> ResultFile:
    """Results with something for every picture, and a provider that failed."""
    rows = []

    def add(bench, case, labels, provider, seconds, **more):
        more = {"status": "ok", "p20_s": seconds, "p50_s": seconds, "p80_s": seconds} | more
        rows.append(
            Row(
                bench, case, labels, "float32", provider, images=1, flops=1e9, bytes=1e7,
                floor_s=0.001, error=1e-7, limit=2e-5, **more,
            )
        )  # fmt: skip

    for provider, seconds in {"eager": 0.02, "onnxruntime": 0.01, "ours-cpu": 0.005}.items():
        add("model", "tiny <&>, batch 1", {"model": "tiny"}, provider, seconds)
        add("depthwise_block", "8 x 5x5 k3", {"dim": 8}, provider, seconds)
        for dim in (8, 16):
            labels = {"sweep": "growth", "batch": 1, "image_size": 8, "depth": 2, "dim": dim}
            add("model", f"{dim}/2", labels, provider, seconds * dim)
    failed = {"status": "failed", "note": "planted <failure>", "p50_s": None}
    add("model", "tiny <&>, batch 1", {"model": "tiny"}, "openvino", 0.0, **failed)
    absent = {"tensorrt": "not installed"}
    return ResultFile(path, environment(CPU), Ceilings(1e10, {"float32": 1e11}), rows, absent)


def test_pictures_in_both_themes(tmp_path):
    written = save_pictures(made_up(None), tmp_path)
    assert len(written) == len(PICTURES) * len(THEMES) * 2
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                colors = image.convert("RGB").getcolors(maxcolors=2**20)
            assert len(colors) > 20
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    light, dark = (draw(made_up(None), "roofline", theme, "svg") for theme in ("light", "dark"))
    assert light != dark
    assert light == draw(made_up(None), "roofline", "light", "svg")


def test_pictures_of_nothing():
    empty = made_up(None)
    empty.rows = []
    assert all(draw(empty, name, "light", "svg") is None for name in PICTURES)


def test_report_stands_alone(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(made_up(None), path)
    page = path.read_text()
    assert "tiny &lt;&amp;&gt;, batch 1" in page
    assert "planted &lt;failure&gt;" in page
    assert "not here: tensorrt" in page
    assert "versions: torch</td>" in page
    assert "{" not in page.partition("<h2>Conditions")[2]  # no dictionary as Python prints it
    # Nothing is fetched: the only addresses are names of XML namespaces.
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#)|@import|<script", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<svg") == 2 * 2 * len(PICTURES)  # themes, widths
    # The best peer of the made-up model takes twice our time.
    assert re.search(r"<td>2.00</td><td>ours-cpu, 5 ms</td><td>onnxruntime, 10 ms</td>", page)


def test_report_and_compare_commands(tmp_path):
    for name in ("a", "b"):
        made_up(tmp_path / name / "results.json").write()
    result = CliRunner().invoke(benchmarks_app, ["report", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "report.html").exists()
    assert (tmp_path / "a" / "throughput-dark.svg").exists()
    result = CliRunner().invoke(
        benchmarks_app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    )
    assert "largest change: 0.0%" in result.output


@pytest.mark.exhaustive
def test_bench_command(tmp_path):
    arguments = ["bench", "8/1/3/2", "--batch", "1,2", "--image-size", "8", "--seconds", "0"]
    arguments += ["--device", "cpu", "--providers", "eager,ours-reference"]
    arguments += ["--output", str(tmp_path), "--report", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "8/1/3/2, 8 px, batch 2" in result.output
    assert "ours-reference" in (tmp_path / "page.html").read_text()
    rows = read_results(tmp_path / "bench.json").rows
    assert [row.provider for row in rows] == ["eager", "ours-reference"] * 2


@pytest.mark.exhaustive
def test_bench_command_without_a_file():
    arguments = ["bench", "convmixer_fast/data/digits.safetensors", "--seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--providers", "eager"])
    assert "digits.safetensors, 8 px, batch 1" in result.output
    assert result.exit_code == 1  # nothing of ours was measured
