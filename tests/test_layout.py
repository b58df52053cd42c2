"""Imports run one way: read from the code itself, those inside functions and for types included."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

FLOORS = (
    {"_version", "activations", "choices", "errors", "spec", "support"},
    {"_C", "reference"},
    {"kernels"},
    {"models"},
    {"accuracy", "recognition"},
    {"folding", "ops", "runtime"},
    {"export"},
    {"optimize", "verify"},
    {"benchmarks"},
    {"commands", "integrations"},
    {"_former_paths", ""},
    {"__main__"},
)
"""Wings and single files, the lowest first. Each may import from its own floor and those below."""
BESIDE = ("kernels", "export", "benchmarks")


def _modules() -> dict[str, Path]:
    """Return the files by the module's name after ``convmixer_fast.``; the package's own is ''."""
    folders = {"": ROOT / "convmixer_fast"} | {name: ROOT / name for name in BESIDE}
    found = {}
    for prefix, folder in folders.items():
        for path in folder.rglob("*.py*"):
            if path.suffix in (".py", ".pyi") and "results" not in path.parts:
                parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
                name = ".".join(part for part in parts if part and part != "__init__")
                found[name] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a module itself.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _local(name) in MODULES else node.module for name in full]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "convmixer_fast":
                yield _local(name)


def _local(name: str) -> str:
    return name.removeprefix("convmixer_fast").removeprefix(".")


GRAPH = {name: set(_imports(path)) for name, path in MODULES.items()}


def _floor(module: str) -> int:
    wing = module.partition(".")[0]
    return next(index for index, wings in enumerate(FLOORS) if wing in wings)


def test_the_graph_is_read_from_the_code():
    assert {"runtime.fused", "runtime.engine", "kernels.trunk", "export.preparation", "_C"} <= set(
        GRAPH
    )
    assert "runtime.engine" in GRAPH["runtime.fused"]
    assert "runtime.tuning" in GRAPH["runtime.fused"], "an import inside a function"
    assert "export.onnx_export" in GRAPH["export"], "an import for type checkers"


def test_no_two_files_import_each_other():
    # A package's own file may name what is inside it.
    graph = {name: {other for other in found if other != name} for name, found in GRAPH.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_nothing_imports_from_a_higher_floor(module):
    higher = [name for name in GRAPH[module] if _floor(name) > _floor(module)]
    assert not higher, f"{module} imports {higher}"


def test_exporters_know_no_kernel_but_the_plugin_file():
    kernels = {
        module
        for module, found in GRAPH.items()
        if module.startswith("export.") and any(name.startswith("kernels") for name in found)
    }
    assert kernels == {"export.trt_plugin"}


def test_the_top_level_is_a_short_list():
    rooms = {name for name in (module.partition(".")[0] for module in MODULES) if name}
    assert len(rooms - set(BESIDE) - {"__main__", "_C", "_version", "_former_paths"}) <= 16


def test_every_folder_is_in_the_package_that_is_built():
    (line,) = (x for x in (ROOT / "setup.py").read_text().splitlines() if x.startswith("WINGS"))
    folders = {path.parent.name for path in (ROOT / "convmixer_fast").glob("*/__init__.py")}
    assert set(ast.literal_eval(line.partition("=")[2].strip())) == folders - set(BESIDE)
