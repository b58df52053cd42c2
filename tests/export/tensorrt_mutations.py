"""The export code with one name of TensorRT's replaced by one that does not exist."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple


class Mutation(NamedTuple):
    """One replacement, and the check of ``tensorrt_checks.py`` that must trip over it."""

    module: str
    right: str
    wrong: str
    check: str


def _mutations() -> Iterator[Mutation]:
    for right, wrong in (
        ("add_input", "add_inputs"),
        ("add_convolution_nd", "add_convolution_dn"),
        ("channel_axis=", "channel_axes="),
        ("keep_dims=", "keepdims="),
        ("ElementWiseOperation", "ElementwiseOperation"),
        ("mark_output", "mark_outputs"),
        ("padding_nd", "padding_dn"),
        ("add_cast", "add_casting"),
    ):
        yield Mutation("export.trt_network", right, wrong, "check_numbers_fp16")
    yield Mutation("activations", "GELU_ERF", "GELU_EFR", "check_numbers_fp16")
    for right, wrong in (
        ("STRONGLY_TYPED", "STRONG_TYPED"),
        ("VERSION_COMPATIBLE", "VERSIONS_COMPATIBLE"),
        ("progress_monitor =", "progres_monitor ="),
        ("set_memory_pool_limit", "set_memory_limit"),
        ("create_timing_cache", "make_timing_cache"),
        (".serialize()", ".serialise()"),
        ("set_shape", "set_shapes"),
    ):
        yield Mutation("export.trt_build", right, wrong, "check_settings")
    yield Mutation("export.trt_build", "parse_from_file", "parse_file", "check_onnx")
    yield Mutation("export.trt_bindings", '"BF16"', '"BF61"', "check_numbers_bf16")
    for right, wrong in (
        ("deserialize_cuda_engine", "deserialise_cuda_engine"),
        ("device_memory_size_v2", "device_memory_size_v3"),
        ("execute_async_v3", "execute_async_v4"),
        ("set_tensor_address", "set_address"),
        ("USER_MANAGED", "USERS_MANAGED"),
        ("TensorIOMode", "TensorIoMode"),
    ):
        yield Mutation("export.trt_module", right, wrong, "check_module_runs")


MUTATIONS = tuple(_mutations())

WRONG_LAYERS = tuple(
    Mutation("export.trt_network", right, wrong, check)
    for right, wrong, check in (
        ('("shift", block.shift)', '("shift", block.scale)', "check_numbers_fp32"),
        ("axes = (1 << 2)", "axes = (1 << 1)", "check_numbers_fp32"),
        ("side // 2", "side // 3", "check_numbers_fp32"),
        ("tuple(patch)", "tuple(patch[::-1])", "check_numbers_fp32"),
        ("both.axis = 1", "both.axis = 0", "check_numbers_fp32"),
        ("(1, 1), 0.5", "(1, 1), 1.0", "check_numbers_fp32"),
        ("channel_axis=1", "channel_axis=2", "check_numbers_fp32"),
        ("epilogue(y, block, x, name)", "epilogue(y, block, y, name)", "check_numbers_fp32"),
        # Types that differ, as TensorRT would say itself.
        (
            "self.cast(residual, dtype, ",
            "self.cast(residual, torch.float32, ",
            "check_numbers_fp16",
        ),
        ("self.weights(vector.float())", "self.weights(vector.half())", "check_numbers_fp16"),
        ("block.bias.to(block.weight.dtype)", "block.bias", "check_numbers_bf16"),
        ("self.cast(y, torch.float32, dtype,", "self.cast(y, dtype, dtype,", "check_numbers_fp16"),
    )
)
"""Networks that TensorRT might take, and that compute something else."""


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Make functions, methods and tables of a module those of the changed source, for a while.

    They change in place, because other modules have imported them already.
    """
    module = sys.modules[f"convmixer_fast.{mutation.module}"]
    source = Path(str(module.__file__)).read_text()
    assert mutation.right in source, mutation
    changed: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(mutation.right, mutation.wrong), "mutated", "exec"), changed)
    undo: list[Callable[[], object]] = []
    _change(vars(module), changed, module.__name__, undo)
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _change(
    old: Mapping[str, Any], new: Mapping[str, Any], module: str, undo: list[Callable[[], object]]
) -> None:
    for name, value in list(old.items()):
        if isinstance(value, dict) and not name.startswith("__"):
            undo.append(partial(value.update, dict(value)))
            value.update(new[name])
        elif getattr(value, "__module__", None) != module:
            continue
        elif isinstance(value, type):
            _change(vars(value), vars(new[name]), module, undo)
        elif isinstance(value, FunctionType):
            undo.append(partial(setattr, value, "__code__", value.__code__))
            value.__code__ = new[name].__code__
