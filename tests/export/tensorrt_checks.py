"""A program: the export code against one version of TensorRT's real bindings.

``python -m tests.export.tensorrt_checks SITE FOLDER`` loads the bindings of a folder over stubs,
which are built in another, runs every function named ``check_*`` of the modules below, and prints
what each raised as JSON. A process of its own for every version: two do not fit into one, and
the interpreter of Triton, in which the other tests run, compiles nothing.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from tests.export import tensorrt_bindings

MODULES = ("network", "engine", "module")


def load_checks(site: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Load the bindings, and then the checks, by name."""
    trt = tensorrt_bindings.load(site, folder)
    registry = import_module("tests.export.tensorrt_aot").Registry()
    trt.get_plugin_registry = registry.itself  # type: ignore[attr-defined] # the stub has none
    found: dict[str, Callable[[], None]] = {}
    for name in MODULES:
        module = import_module(f"tests.export.tensorrt_{name}_checks")
        found |= {key: value for key, value in vars(module).items() if key.startswith("check_")}
    return found


def check_wrong_names_are_refused(checks: dict[str, Callable[[], None]]) -> None:
    """Put a wrong name wherever one of TensorRT's stands: a check must trip over it."""
    driving, mutations = (
        import_module(f"tests.export.tensorrt_{m}") for m in ("driving", "mutations")
    )
    for mutation in mutations.MUTATIONS:
        with mutations.mutated(mutation):
            try:
                found = driving.raised((AttributeError, TypeError), checks[mutation.check])
            except Exception as error:
                raise AssertionError(f"{mutation}: {error}") from error
        (wrong,) = re.findall(r"\w+", mutation.wrong)
        assert wrong in found, f"{mutation}: {found}"


def check_wrong_layers_are_noticed(checks: dict[str, Callable[[], None]]) -> None:
    """Make a mistake in the network: evaluating it must show it."""
    driving, mutations = (
        import_module(f"tests.export.tensorrt_{m}") for m in ("driving", "mutations")
    )
    for mutation in mutations.WRONG_LAYERS:
        with mutations.mutated(mutation):
            try:
                driving.raised((AssertionError, RuntimeError), checks[mutation.check])
            except Exception as error:
                raise AssertionError(f"{mutation}: {error}") from error


def main() -> None:
    """Print what each check raised, None for nothing."""
    torch.set_num_threads(1)  # the models are small
    checks = load_checks(Path(sys.argv[1]), Path(sys.argv[2]))
    own = dict(checks)
    for check in (check_wrong_names_are_refused, check_wrong_layers_are_noticed):
        checks[check.__name__] = partial(check, own)
    found: dict[str, str | None] = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
