"""Modules that have moved, under their former names.

Pickles, and programs, made with 0.1 name them. Each name is the moved module itself, so that a
class has one identity, whatever the name it was imported by.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["FORMER_PATHS", "install"]

_WINGS = {
    "commands": ("cli", "demo", "demo_picture", "export_commands", "predict"),
    "models": ("checkpoint", "digits", "images", "named_models", "published", "randomize"),
    "recognition": ("recognize", "surroundings", "tracing"),
    "runtime": ("backends", "cpu", "cuda_graphs", "engine", "fused", "sweep", "tuning"),
}
FORMER_PATHS = {
    "convmixer_fast.graphs": "convmixer_fast.recognition.aten_graph",
    "convmixer_fast.model": "convmixer_fast.models.convmixer",
    "convmixer_fast.timing": "convmixer_fast.support.timing",
} | {
    f"convmixer_fast.{name}": f"convmixer_fast.{wing}.{name}"
    for wing, names in _WINGS.items()
    for name in names
}
"""The modules' names now, by their former ones."""


class _Finder(MetaPathFinder, Loader):
    """Imports a former name as the module that it stands for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in FORMER_PATHS else None

    def exec_module(self, module: ModuleType) -> None:
        # What stands in sys.modules when this returns is what was imported.
        sys.modules[module.__name__] = importlib.import_module(FORMER_PATHS[module.__name__])


def install() -> None:
    """Let the former names be imported."""
    for former, name in FORMER_PATHS.items():
        if name in sys.modules:
            # At once: importing ``convmixer_fast.recognize`` later would set the package's
            # attribute of that name, which is a function, to the module.
            sys.modules[former] = sys.modules[name]
    sys.meta_path.append(_Finder())
