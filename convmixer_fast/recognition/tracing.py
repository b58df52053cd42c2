"""Any ``nn.Module`` -> one uniform graph of ATen operations, by ``torch.export``.

Wrappers are looked through, and the input that tracing needs is found from the
module's own weights. The source module is only read.
"""

import copy
import inspect
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.recognition.outputs import PlainOutputs
from convmixer_fast.spec import SizeCondition
from convmixer_fast.support.quiet import printing_nothing, without_logs

__all__ = ["TRACING", "Trace", "trace", "unwrap"]

TRACING = threading.RLock()
"""Held by all that traces: PyTorch keeps the state of it in globals, for one thread at a time."""

# With its separator: torchvision lies beside it.
_TORCH_ROOT = os.path.join(os.path.dirname(torch.__file__), "")


@dataclass(frozen=True)
class Trace:
    """The graph of a module, and what it was traced under."""

    program: torch.export.ExportedProgram
    prefix: nn.Module | None
    """Leading modules of an ``nn.Sequential`` without a convolution: run as they are, untraced."""
    conditions: tuple[SizeCondition, ...]
    """Input sizes for which the graph is what the module computes."""
    guessed: bool
    """Whether the input was guessed rather than given."""
    input_name: str
    """What the module's forward calls the image."""
    input_layout: str
    """Of the image: ``"NCHW"`` or ``"NHWC"``."""
    types: tuple[type, ...]
    """Dataclasses in what it returns: see :class:`outputs.PlainOutputs`; () for none."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``DataParallel``, its distributed kin, or ``torch.compile``."""
    # Exactly these types: a subclass may compute something else.
    wrappers: dict[type, str] = {
        nn.DataParallel: "module",
        nn.parallel.DistributedDataParallel: "module",
        torch._dynamo.OptimizedModule: "_orig_mod",
    }
    while type(model) in wrappers:
        if _has_hooks(model):
            raise UnsupportedModelError(
                f"the {type(model).__name__} around the model has hooks, which would be lost; "
                "pass the model inside, or put the hooks on it"
            )
        model = getattr(model, wrappers[type(model)])
    return model


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def trace(model: nn.Module, example_input: Tensor | None = None) -> Trace:
    """Trace ``model`` on ``example_input``, or on an input guessed from its weights.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``example_input`` is not a tensor (N, C, H, W) or (N, H, W, C).
        UnsupportedModelError: it cannot be traced on one image batch (N, C, H, W).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    _refuse_opaque(model)
    name = _input_name(model)
    prefix, body = _split_prefix(model)
    if example_input is not None:
        if not isinstance(example_input, Tensor) or example_input.dim() != 4:
            found = getattr(example_input, "shape", type(example_input).__name__)
            raise ValueError(
                f"example_input must be a tensor (N, C, H, W) or (N, H, W, C), got {found}"
            )
        if prefix is not None:
            with torch.no_grad():
                example_input = prefix(example_input)
        # Only the shape matters, and a batch of 1 would be taken for a constant.
        example_input = example_input.new_zeros((2, *example_input.shape[1:]))
        layout = _layout(body, example_input)
        return _finish(_exported(body, example_input, layout), prefix, name, layout)
    failures: list[UnsupportedModelError] = []
    for candidate, layout in _candidate_inputs(body):
        try:
            exported = _exported(body, candidate, layout)
        except UnsupportedModelError as error:
            failures.append(error)
            continue
        return _finish(exported, prefix, name, layout, guessed=True)
    raise UnsupportedModelError(f"{failures[0]}{_advice(body, failures)}")


def _input_name(model: nn.Module) -> str:
    """Return what ``model`` calls its image.

    Raises:
        UnsupportedModelError: it must be given more than one input.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    of_any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in of_any_number]
    needed = [p.name for p in named if p.default is inspect.Parameter.empty]
    if len(needed) > 1:
        raise UnsupportedModelError(
            f"expected a model of one input, a batch of images (N, C, H, W), found one of "
            f"{len(needed)}: {', '.join(needed)}; pass a module that calls it with the others fixed"
        )
    return next((p.name for p in named if p.kind is not p.KEYWORD_ONLY), "x")


def _advice(model: nn.Module, failures: list[UnsupportedModelError]) -> str:
    """Say what could help where no guessed input could be traced."""
    causes = [failure.__cause__ for failure in failures]
    if any(_depends_on_values(cause) for cause in causes):
        return (
            "; its code takes a path by the values of the image, which one graph cannot do: pass "
            "the part of the model that does not"
        )
    example = next(_candidate_inputs(model))[0][0]
    try:
        _export(model, example, "NCHW")
    except UnsupportedModelError:
        # What any size would meet is no matter of size.
        if all(isinstance(cause, TypeError | AttributeError | NameError) for cause in causes):
            return ""
        return "; if the model takes images of a particular size, pass example_input="
    return (
        f"; it takes a single image (C, H, W), such as {tuple(example.shape)}: pass a module that "
        "takes a batch (N, C, H, W)"
    )


def _depends_on_values(cause: BaseException | None) -> bool:
    names = ("GuardOnDataDependentSymNode", "DataDependentOutputException")
    return type(cause).__name__ in names or "data-dependent" in str(cause).lower()


def _refuse_opaque(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "the model is a TorchScript module, whose code cannot be read; "
            "pass the nn.Module that it was scripted from"
        )
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ and "torch" in type(module).__module__:
            raise UnsupportedModelError(
                f"{name or 'the model'}: expected floating-point weights, found the quantised "
                f"module {type(module).__name__}; pass the model as it was before quantisation"
            )
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise UnsupportedModelError(
            "the model has lazy modules that have not seen an input yet; call it once first"
        )
    if any(t.is_meta for t in tensors):
        raise UnsupportedModelError(
            "the model's tensors are on the meta device and hold no values; load its weights first"
        )
    if len({t.device for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise UnsupportedModelError(
            f"the model's tensors are on several devices ({devices}); move it to one of them"
        )


def _split_prefix(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    # What stands in front of the first convolution often checks its input with
    # Python code that cannot be traced (torchvision's Normalize does), and need
    # not be: it runs as it is.
    if type(model) is not nn.Sequential or _has_hooks(model):
        return None, model
    children = list(model)
    first = next((i for i, c in enumerate(children) if _first_convolution(c) is not None), 0)
    if first == 0:
        return None, model
    for name, module in model[:first].named_modules():
        stateful = nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd
        if module.training and isinstance(module, stateful):
            raise UnsupportedModelError(
                f"{name}: expected eval mode, found {type(module).__name__} in training mode; "
                "call model.eval() first"
            )
    prefix = copy.deepcopy(model[:first]).requires_grad_(False)
    return prefix, model[first] if first == len(children) - 1 else model[first:]


def _first_convolution(model: nn.Module) -> Tensor | None:
    return next((p for p in model.parameters() if p.dim() == 4), None)


def _layout(model: nn.Module, example: Tensor) -> str:
    """Return the layout of an image that was given: channels are what the stem reads, or few."""
    weight = _first_convolution(model)
    for fits in ((() if weight is None else weight.shape[1:2]), (1, 3, 4)):
        if example.shape[1] in fits or example.shape[3] in fits:
            return "NCHW" if example.shape[1] in fits else "NHWC"
    return "NCHW"


def _candidate_inputs(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    weight = _first_convolution(model)
    if weight is None:
        raise UnsupportedModelError(
            "expected a patch convolution, found no convolution weight in the model"
        )
    patch = max(weight.shape[2:])
    channels = list(dict.fromkeys((weight.shape[1], 3, 1)))
    # Any size should do; then the two that models are commonly made for.
    for height, width in ((8 * patch, 9 * patch), (224, 224), (32, 32)):
        for c in channels:
            yield weight.new_zeros(2, c, height, width), "NCHW"
    yield weight.new_zeros(2, 8 * patch, 9 * patch, weight.shape[1]), "NHWC"


def _exported(
    model: nn.Module, example: Tensor, layout: str
) -> tuple[torch.export.ExportedProgram, tuple[type, ...]]:
    """Export, and return the dataclasses that it returns too."""
    try:
        return _export(model, example, layout), ()
    except UnsupportedModelError as error:
        if "not a known type" not in str(error):
            raise
    plain = PlainOutputs(model)
    return _export(plain, example, layout), tuple(plain.seen.types)


def _export(model: nn.Module, example: Tensor, layout: str) -> torch.export.ExportedProgram:
    from torch.export import _trace
    from torch.fx.experimental import _config

    shapes = torch.export.ShapesCollection()
    auto = torch.export.Dim.AUTO
    shapes[example] = {layout.index(name): auto for name in "NHW"} if example.dim() == 4 else {}
    try:
        # A model that was compiled inside is traced through; gradients are off, so that a
        # no_grad() inside the model leaves no mark in the graph; height and width stay
        # apart when the example is square; and code that asks whether a size is 1 is seen. A
        # failed attempt, which PyTorch logs and prints in full, is reported once, by us.
        with (
            TRACING,
            torch.compiler.set_stance("force_eager"),
            # Tensors made in inference mode can be traced in it alone, others better outside.
            # Before no_grad(), because leaving inference mode turns gradients on.
            torch.inference_mode(any(p.is_inference() for p in model.parameters())),
            torch.no_grad(),
            _config.patch(use_duck_shape=False, backed_size_oblivious=True),  # type: ignore[attr-defined]
            without_logs("torch"),
            printing_nothing(_trace),
        ):
            return torch.export.export(
                model,
                (example,),
                dynamic_shapes=shapes.dynamic_shapes(model, (example,)),
                strict=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(
            f"the model could not be traced by torch.export on an input {tuple(example.shape)} "
            f"({type(error).__name__}: {reason[0]})"
        ) from error


def _finish(
    exported: tuple[torch.export.ExportedProgram, tuple[type, ...]],
    prefix: nn.Module | None,
    input_name: str,
    layout: str,
    guessed: bool = False,
) -> Trace:
    program, types = exported
    inputs = program.graph_signature.user_inputs
    values = [n.meta["val"] for n in program.graph.nodes if n.name in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        raise UnsupportedModelError(
            f"expected a model of one input (N, C, H, W), found inputs {list(inputs)}"
        )
    conditions = tuple(_size_conditions(values[0], layout))
    for condition in conditions:
        _check_condition(condition)
    return Trace(program, prefix, conditions, guessed, input_name, layout, types)


def _check_condition(condition: SizeCondition) -> None:
    # Now, and not in the first call of the optimized module.
    try:
        condition.holds(2, 64, 64)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise UnsupportedModelError(
            f"the model's code looks at its input's size in a way that is not understood: "
            f"{condition.text} ({error})"
        ) from error


def _size_conditions(value: Any, layout: str) -> Iterator[SizeCondition]:
    """Yield the conditions on the input's size that the model's own code put there.

    ``torch.export`` records every condition; those that arise inside PyTorch (strides,
    broadcasting) hold of any size that the operations take, and are left out.
    """
    import sympy
    from torch.utils._sympy.printers import PythonPrinter

    names: dict[Any, Any] = {}
    for name in "NHW":
        size = value.shape[layout.index(name)]
        symbol = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        if symbol.is_Symbol and symbol not in names:
            names[symbol] = sympy.Symbol(name, integer=True)
        else:
            yield SizeCondition(f"{name} == {symbol.xreplace(names)}")
    for guard in value.fake_mode.shape_env.guards:
        location = guard.sloc.framework_loc
        inside_torch = location is not None and location.filename.startswith(_TORCH_ROOT)
        if not inside_torch and guard.expr.free_symbols <= set(names):
            yield SizeCondition(PythonPrinter().doprint(guard.expr.xreplace(names)))
