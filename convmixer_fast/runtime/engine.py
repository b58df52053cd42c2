"""The engine of a FusedConvMixer: its trunk in one call, where a backend has such a call.

What a backend makes of the weights (packed for the CPU, CUDA graphs on a GPU) is derived from
the module's parameters and kept beside them. It is made again when they are not the same any
more; ``source.py`` says what is noticed. It is no part of ``state_dict``, copies and pickles.

Where one call would not do what the ops one by one do, :meth:`Engine.run` returns None: while
something looks at single operations (compiling, exporting, dispatch and function modes, function
transforms, hooks on layers), and for inputs and weights that the ops refuse, with their own errors.
One function, :meth:`Engine._find`, decides that, and so says why: a warning says it once for a
module and a reason, and :meth:`Engine.explain` whenever it is asked.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from convmixer_fast.choices import BackendName
from convmixer_fast.errors import BackendUnavailableError
from convmixer_fast.runtime import backends
from convmixer_fast.runtime.cuda_graphs import CudaGraphs
from convmixer_fast.runtime.explanation import Explanation, parts_outside
from convmixer_fast.runtime.source import Model, Reason, Source

__all__ = ["Engine"]

Trunk = Callable[..., Tensor]
Intermediates = Callable[[Tensor, Sequence[int]], list[Tensor]]

_log = logging.getLogger("convmixer_fast")
_KEPT = 3
"""Trunks of one module: with autocast to either dtype, and without."""


class _Found(NamedTuple):
    """What there is for a call."""

    reason: Reason | None
    """Why the trunk cannot run it."""
    where: tuple[object, ...] = ()
    """What of the call the trunk depends on."""
    backend: BackendName = "auto"
    dtype: torch.dtype = torch.float32
    source: Source | None = None
    misfit: Reason | None = None
    """Why no trunk can be made of the source."""
    bare: Any = None
    """The backend's trunk; None where it is not made yet."""
    trunk: Trunk | None = None
    """That by CUDA graphs, and with the input cast."""


class Engine:
    """Makes, keeps and renews the trunk of one module.

    A copy begins without one: what is kept belongs to the tensors that it was made from.
    """

    def __init__(self) -> None:
        # Replaced and not changed, so that several Python threads see all of it or nothing.
        self._made: dict[object, _Found] = {}
        self._said: set[str] = set()

    def __deepcopy__(self, memo: object) -> "Engine":
        return Engine()

    def __reduce__(self) -> tuple[type["Engine"], tuple[()]]:
        return Engine, ()

    def forget(self) -> None:
        """Drop what was made of the weights: the next call makes it again."""
        self._made = {}

    def run(self, model: Model, x: Tensor, *, head: bool) -> tuple[Tensor, str] | None:
        """Compute stem and layers of ``model`` for ``x`` in one call; None for the ops.

        On a GPU the kernels are launched before it is looked whether the weights are still those
        that they were made of, which takes Python 50 to 200 us: the device works meanwhile. What
        they compute is given up where they are not, and the memory that they read is kept until
        then.

        Args:
            model: the module.
            x: (N, C, H, W), what its stem takes.
            head: whether more than the features may be computed.

        Returns:
            What was computed, and what that is: ``"features"``, or if the head begins so ``"mean"``
            (over the positions), or if it is so ``"logits"``.
        """
        late = _looks_late(x)
        found = self._ready(model, x, trusted=late)
        if found is None or found.trunk is None or found.source is None:
            return None
        result = found.source.result() if head else "features"
        out = found.trunk(x, result)
        if late and not found.source.unchanged():
            self._made = {key: made for key, made in self._made.items() if made is not found}
            return self.run(model, x, head=head)
        return out, result

    def intermediates(self, model: Model, x: Tensor) -> Intermediates | None:
        """Return what computes the outputs of chosen steps for ``x``, or None for the ops.

        It is called with the batch and the steps: 0 for the stem, n for layer n counted from 1, in
        rising order; the last of them is the last that is run. On a GPU it is no CUDA graph.
        """
        found = self._ready(model, x)
        return None if found is None else partial(_intermediates, found.bare, found.dtype)

    def explain(self, model: Model, x: Tensor) -> Explanation:
        """Say how ``x``, the stem's input, would run. Nothing is run, made or kept."""
        found = self._find(model, x)
        reason, backend, source = found.reason, found.backend, found.source
        one_call = reason is None and source is not None
        working = _working_dtype(x)
        result = source.result() if source is not None and one_call else ""
        outside = {"logits": (), "mean": ("head_drop", "head")}.get(
            result, ("global_pool", "head_drop", "head")
        )
        return Explanation(
            backend=model.backend if backend == "auto" else backend,
            one_call=one_call,
            reason=None if reason is None else reason.text,
            device=x.device,
            dtype=working,
            computed_in=torch.float32 if backend == "cpu" else working,
            ready=found.trunk is not None,
            graph=_graph(model, found, x) if one_call else None,
            outside=parts_outside(model, outside if model.source_head is None else ()),
        )

    def release(self, model: Model, x: Tensor) -> None:
        """Make the trunk for ``x``, the stem's input, and let go of the weights that it has packed.

        Raises:
            BackendUnavailableError: there is no such trunk; says why.
        """
        found = self._ready(model, x)
        if found is None or found.source is None or not backends.row(found.backend).packs:
            reason = self._find(model, x).reason
            why = reason.text if reason else f"the backend {model.backend!r} reads them in place"
            raise BackendUnavailableError(
                f"the weights cannot be released: {why}. That is for the CPU backend, where one "
                "call runs all layers on packed copies"
            )
        found.source.release()
        self._made = {found.where: found._replace(source=Source(model))}

    def bare_trunks(self, model: Model, x: Tensor) -> tuple[Callable[..., Trunk], Tensor]:
        """Return what makes Triton trunks of ``model`` with given options, and their input.

        Raises:
            BackendUnavailableError: ``x`` is not for Triton, or the trunk is not for ``x``.
        """
        dtype = _working_dtype(x)
        backend = backends.resolve(model.backend, x.device, dtype)
        if not backends.row(backend).tunes:
            raise BackendUnavailableError(
                f"tune() measures Triton kernels, and {x.dtype} on {x.device} runs on the backend "
                f"{backend!r}, which has nothing to tune. Move model and example to a CUDA device; "
                "convmixer_fast.backend_info() says what can run here"
            )
        found = self._find(model, x)
        if found.reason is not None or found.source is None:
            raise BackendUnavailableError(
                f"the model's layers do not run in one call for {x.dtype} {tuple(x.shape)} on "
                f"{x.device}: {found.reason.text if found.reason else ''}. Tune the module as "
                "optimize() returned it, with an example like its later inputs"
            )
        source, make = found.source, backends.trunk_maker(backend)
        assert make is not None  # else there would be a reason

        def trunk(**options: Any) -> Trunk:
            with torch.inference_mode(False), torch.no_grad():
                made: Trunk = source.make_trunk(make, dtype, **options)
            return made

        return trunk, x.to(dtype)

    def _ready(self, model: Model, x: Tensor, *, trusted: bool = False) -> _Found | None:
        """Return what runs ``x``, made where it was not yet; None for the ops, said if need be."""
        if torch.compiler.is_dynamo_compiling():
            return None  # here too, as a compiler does not follow what is below
        found = self._find(model, x, trusted=trusted)
        if found.reason is not None:
            if found.misfit is not None:
                self._made = {**self._made, found.where: found}  # looked at once
            if found.reason.said and found.reason.text not in self._said:
                self._said.add(found.reason.text)
                _log.warning(
                    "a FusedConvMixer runs op by op, which takes several times as long: %s "
                    "(said once; explain(x) tells for an input)",
                    found.reason.text,
                )
            return None
        return found if found.trunk is not None else self._make(model, found, x)

    def _find(self, model: Model, x: Tensor, *, trusted: bool = False) -> _Found:
        """Decide whether the trunk can run ``x``, and return it if it is made.

        Whether it is made of the weights as they are now is not looked at if it is ``trusted``.
        """
        reason = _who_looks(x)
        if reason is not None:
            return _Found(reason)
        dtype = _working_dtype(x)
        where: tuple[object, ...] = (
            *(model.backend, model.cuda_graphs, model.static_output, model.chunk),
            *(x.device, x.dtype, dtype),
        )
        if x.is_cuda:
            where = *where, *_float32_products()  # compiled in
        found = self._made.get(where)
        source = None if found is None else found.source
        # A shallow copy has another module's engine.
        if (
            found is None
            or source is None
            or source.modules is not model._modules
            or not (trusted or source.unchanged())
        ):
            found = _new(model, x, where, dtype)
            source = found.source
        if found.reason is not None or source is None:
            return found
        reason = found.misfit or source.why_not(x)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if reason is None and found.trunk is None and capturing:
            # What is made while a graph is captured has no values before its replay.
            reason = Reason(
                "a CUDA graph is being captured before the module has been called; "
                "call warmup() before"
            )
        return found if reason is None else found._replace(reason=reason)

    def _make(self, model: Model, found: _Found, x: Tensor) -> _Found:
        source, make = found.source, backends.trunk_maker(found.backend)
        assert source is not None
        assert make is not None  # else there would be a reason
        row = backends.row(found.backend)
        # Before memory for another one is asked for; the others that stay are still right.
        kept = {
            key: made for key, made in self._made.items() if made.source and made.source.unchanged()
        }
        kept.pop(found.where, None)
        self._made = dict(list(kept.items())[1 - _KEPT :])
        with torch.inference_mode(False), torch.no_grad():
            options = {name: getattr(model, name) for name in row.options}
            bare = source.make_trunk(make, found.dtype, **options)
            if x.is_cuda:  # other threads may use it on other streams
                torch.cuda.current_stream(x.device).synchronize()
        trunk: Trunk = bare
        if found.dtype != x.dtype:
            trunk = _casting(trunk, found.dtype)
        if model.cuda_graphs is not False and _has_graphs(found.backend, x.device):
            trunk = CudaGraphs(
                trunk,
                first_calls=0 if model.cuda_graphs is True else 1,
                static_output=model.static_output,
            )
        found = found._replace(bare=bare, trunk=trunk)
        self._made = {**self._made, found.where: found}
        return found


def _looks_late(x: Tensor) -> bool:
    """Whether the device computes while the host looks, and what it computes can be given up."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _new(model: Model, x: Tensor, where: tuple[object, ...], dtype: torch.dtype) -> _Found:
    """Look at the module as it is now."""
    try:
        backend = backends.resolve(model.backend, x.device, dtype)
        make = backends.trunk_maker(backend)
    except BackendUnavailableError as error:
        # What is wrong with the input is for the ops to say first.
        return _Found(Reason(str(error), said=False), where)
    if make is None:
        return _Found(
            Reason(f"the backend {backend!r} has no call for all layers", said=False),
            *(where, backend, dtype),
        )
    source = Source(model)
    return _Found(None, where, backend, dtype, source, source.misfit(backend, dtype))


def _who_looks(x: Tensor) -> Reason | None:
    """Say what happens to operations on ``x`` besides the arithmetic; None for nothing."""
    # Not is_compiling(), which is true in all threads while one of them exports: what is traced
    # here shows by a dispatch mode, or by what its tensors are.
    if torch.compiler.is_dynamo_compiling() or torch._C._is_tracing():
        return Reason("it is being compiled, exported or traced", said=False)
    if torch._C._len_torch_dispatch_stack() > 0:
        keys = torch._C._TorchDispatchModeKey
        tracing = any(
            torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
        )
        return Reason("a dispatch mode looks at single operations", said=not tracing)
    if _function_modes_look():
        return Reason("a function mode looks at single operations")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return Reason("a function transform, such as vmap, looks at single operations")
    if type(x) not in (Tensor, nn.Parameter):
        tracing = isinstance(x, torch._subclasses.FakeTensor)
        return Reason(f"the input is a {type(x).__name__}, a subclass of Tensor", said=not tracing)
    return None


def _function_modes_look() -> bool:
    """Whether there are function modes other than that of the default device."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def _intermediates(bare: Any, dtype: torch.dtype, x: Tensor, steps: Sequence[int]) -> list[Tensor]:
    outs: list[Tensor] = bare.intermediates(x.to(dtype), steps)
    return outs


def _graph(model: Model, found: _Found, x: Tensor) -> str | None:
    if not _has_graphs(found.backend, x.device):
        return None
    if model.cuda_graphs is False:
        return "off"
    return (
        "from the first call of a shape on"
        if model.cuda_graphs is True
        else ("from the second call of a shape on")
    )


def _float32_products() -> tuple[str, str]:
    """Return how products of float32 are to be made: in convolutions, and in the head."""
    conv, linear = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return conv.fp32_precision, linear.fp32_precision


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return what the trunk computes in: the dtype of autocast, where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _casting(trunk: Trunk, dtype: torch.dtype) -> Trunk:
    def cast_first(x: Tensor, result: str) -> Tensor:
        return trunk(x.to(dtype), result)

    return cast_first


def _has_graphs(backend: BackendName, device: torch.device) -> bool:
    return backends.row(backend).graphs and device.type == "cuda"
