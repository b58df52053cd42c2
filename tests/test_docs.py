"""The documentation: its programs run, its pages are all there, and it builds without a warning."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.sweeps import sparse

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PROGRAMS = [page for page in PAGES if "```python" in (DOCS / page).read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"how-to/int8.md": ("onnxruntime", "sklearn"), "how-to/exports.md": ("onnxruntime", "onnx")}


@pytest.mark.parametrize(
    "page",
    sparse(
        [page for page in PAGES if BLOCK.search((DOCS / page).read_text())],
        lambda page: page in ("quickstart.md", "how-to/segmentation.md"),
    ),
)
def test_programs_run(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, as somebody who follows it would type them."""
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module, reason=f"needs {module}: pip install '.[dev]'")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.findall((DOCS / page).read_text()):
        exec(compile(block, page, "exec"), names)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == set(PAGES)


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id":
                self.ids.add(value)


@pytest.mark.exhaustive
def test_it_builds_and_every_link_leads_somewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install '.[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text())
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//|/", link):  # elsewhere; the error page has absolute ones
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path}: {link}"
            if anchor and file in pages:
                assert anchor in pages[Path(file)].ids | {"__skip"}, f"{path}: {link}"
            followed += 1
    assert followed > 200
