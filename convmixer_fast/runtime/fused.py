"""FusedConvMixer: the folded form as an ``nn.Module``, drop-in for the one it was made from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from convmixer_fast.choices import BackendName, CudaGraphs, InTraining
from convmixer_fast.errors import InferenceOnlyError, UnsupportedModelError
from convmixer_fast.models.convmixer import ConvMixerInterface, GlobalPool
from convmixer_fast.ops import asks_for_gradient, check_dense
from convmixer_fast.runtime.blocks import (
    DepthwiseBlock,  # noqa: F401  # for pickles made with 0.1, which look for it here
    FusedBlock,
    PatchEmbed,
    PointwiseBlock,  # noqa: F401  # as well
    folded_layer,
    fused_layer,
)
from convmixer_fast.runtime.engine import Engine
from convmixer_fast.runtime.explanation import Explanation
from convmixer_fast.runtime.pretrained import Pretrained
from convmixer_fast.spec import FoldedConvMixer, FoldedLayer, Head

if TYPE_CHECKING:
    from convmixer_fast.runtime.tuning import Tuning

__all__ = ["FusedConvMixer"]


class FusedConvMixer(ConvMixerInterface, Pretrained):
    """A ConvMixer for inference: drop-in for the module that it was made from.

    Made by :func:`convmixer_fast.optimize`. Takes and returns what the source module
    does, in the same shapes and dtypes. The methods of timm's ConvMixer work on it;
    those that need a plain head (global pooling, then at most one linear layer) say so
    where the source has another one. Layers are ``blocks``; a layer that the source
    shares between positions is one module at each of them.

    Args:
        folded: the folded form; its tensors are taken over, not copied.
        backend: ``"auto"``, or one of :data:`backends.BACKENDS`.
        cuda_graphs: see :func:`optimize`.
        static_output: see :func:`optimize`.
        chunk: see :func:`optimize`.
        in_training: see :func:`optimize`.
    """

    source_head: nn.Module | None
    """The source's own head, where it is not a plain one; then ``head`` is not used."""

    # What modules pickled by former versions do not have.
    taps: tuple[int, ...] = ()
    input_name = "x"
    input_layout = "NCHW"
    in_training = "raise"
    made_from = ""
    """What the source is called, for messages."""
    quantization: Any = None
    """What 8-bit numbers cost, where some are; an :class:`export.quantized.QuantizationReport`."""

    def __init__(
        self,
        folded: FoldedConvMixer,
        backend: BackendName = "auto",
        *,
        cuda_graphs: CudaGraphs = "auto",
        static_output: bool = False,
        chunk: int | None = None,
        in_training: InTraining = "raise",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.in_training = in_training
        self.chunk = chunk
        # In plain form, which can be unpickled where Triton is not installed. Replaced and not
        # changed: copies may share it.
        self._tuned: dict[Any, Any] = {}
        self.cuda_graphs = cuda_graphs
        self.static_output = static_output
        self._engine = Engine()
        self.conditions = folded.conditions
        self.taps = folded.taps
        self.input_name = folded.input_name
        self.input_layout = folded.input_layout
        self.prefix = folded.prefix
        self.preprocess = folded.preprocess
        self.stem = PatchEmbed(folded.stem, backend)
        modules: dict[int, nn.Module] = {}
        for layer in folded.layers:
            if id(layer) not in modules:
                modules[id(layer)] = fused_layer(layer, backend)
        self.blocks = nn.Sequential(*(modules[id(layer)] for layer in folded.layers))
        last = folded.layers[-1].pointwise if folded.layers else folded.stem
        self.in_chans = folded.stem.weight.shape[1]
        self.num_features = last.weight.shape[0]
        self.head_drop = nn.Identity()
        if isinstance(folded.head, Head):
            self.source_head = None
            self._take_head(folded.head)
        else:
            self.source_head = folded.head
            self.global_pool, self.head = GlobalPool(""), nn.Identity()
            self.num_classes, self.head_hidden_size = 0, self.num_features
        self.eval()

    def _take_head(self, head: Head) -> None:
        if head.weight is None:
            self._set_head(head.global_pool, 0)
            return
        classes, features = head.weight.shape
        linear = nn.Linear(features, classes, bias=False, device="meta")
        linear.weight = nn.Parameter(head.weight, requires_grad=False)
        if head.bias is not None:
            linear.bias = nn.Parameter(head.bias, requires_grad=False)
        self._set_head(head.global_pool, classes, linear)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Any:
        """Map images (N, in_chans, H, W) to what the source module returns for them.

        They are in the layout and dtype that the source takes, and may also be given by the name
        that its forward has for them.

        Raises:
            ValueError: the shape is wrong: not 4-D, other channels, smaller than a patch,
                or a size for which the source computes something else than was recognised.
            TypeError: the dtype is not that of the weights, and autocast is off; or there is
                another argument than the images.
            InferenceOnlyError: the input requires a gradient, or the module is in training mode.
            BackendUnavailableError: the backend named at ``optimize`` cannot run the input.
        """
        if x is None or named:
            x = self._by_name(x, named)
        x, *extras = self._enter(x)
        if self.taps:
            *outs, features = self._run_steps(x, (*self.taps, len(self.blocks)))
            assert self.source_head is not None  # which takes them
            return self.source_head(features, *outs, *extras)
        ran = self._engine.run(self, x, head=True)
        if ran is None:
            features = super().forward_features(x)
        else:
            features, result = ran
            if result == "logits":
                return features
            if result == "mean":
                return self.head(self.head_drop(features))
        if self.source_head is not None:
            return self.source_head(features, *extras)
        return super().forward_head(features)

    def _by_name(self, x: Tensor | None, named: dict[str, Tensor]) -> Tensor | None:
        if not named:
            return x  # None, which is refused like everything else that is no tensor
        given = named if x is None else {"x": x, **named}
        if len(given) == 1 and next(iter(given)) in ("x", self.input_name):
            return next(iter(given.values()))
        raise TypeError(
            f"expected one batch of images, by position or as {self.input_name}=, got "
            f"{', '.join(f'{name}=' for name in given)}"
        )

    def folded(self) -> FoldedConvMixer:
        """Return what this module computes, as plain data; tensors and modules are its own.

        Raises:
            ReleasedWeightsError: the weights are gone.
        """
        stem: Any = self.stem
        made: dict[int, FoldedLayer] = {}
        layers: Any = self.blocks
        for layer in layers:
            if id(layer) not in made:
                made[id(layer)] = folded_layer(layer)
        head = self.source_head
        if head is None:
            linear: Any = self.head
            numbers = (linear.weight, linear.bias) if isinstance(linear, nn.Linear) else ()
            head_or_module: Head | nn.Module = Head(self.global_pool.pool_type, *numbers)
        else:
            head_or_module = head
        return FoldedConvMixer(
            stem=stem.folded(),
            layers=tuple(made[id(layer)] for layer in layers),
            head=head_or_module,
            prefix=self.prefix,
            preprocess=self.preprocess,
            conditions=self.conditions,
            taps=self.taps,
            input_name=self.input_name,
            input_layout=self.input_layout,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so the images must be."""
        stem: Any = self.stem
        return stem.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the input of the stem: the images', where nothing stands before it."""
        stem: Any = self.stem
        return stem.dtype  # type: ignore[no-any-return]

    def use_backend(self, backend: BackendName) -> None:
        """Run on another backend from the next call on.

        Raises:
            ReleasedWeightsError: the weights are gone.
        """
        for block in self.modules():
            if isinstance(block, FusedBlock):
                block.need_weights("another backend")
                block.backend = backend
        self.backend = backend
        self._engine = Engine()

    @property
    def tuned(self) -> dict[Any, Any]:
        """What :meth:`tune` chose, by device, dtype and shape, in plain form."""
        return self._tuned

    def explain(self, x: Tensor) -> Explanation:
        """Say how a call with ``x`` (N, in_chans, H, W) would run, and why not in one call.

        Nothing is computed but what stands before the stem.

        Raises:
            TypeError, ValueError, InferenceOnlyError: as a call would.
        """
        return self._engine.explain(self, self._enter(x)[0])

    def refresh(self) -> None:
        """Use the weights as they are now: what was made of them is made again at the next call.

        On a CPU that is packed weights, on a GPU CUDA graphs. Not needed after what PyTorch counts
        as a change (``load_state_dict``, in-place operations on a parameter, ``.to()``), which is
        noticed, and on a CPU seldom after writes to whole tensors that it does not count
        (``weight.data.mul_(2)``, through NumPy): a few numbers of each tensor are looked at in
        every call. Writes to single elements past PyTorch, and any on a GPU, need it.
        """
        self._engine.forget()

    def release(self) -> None:
        """Let go of the weights of stem and layers, of which the CPU backend has packed copies.

        That halves the memory that the module holds. It can then no longer be copied, pickled,
        saved, moved or cast, nor run where single operations are looked at (hooks, compilers,
        autocast): these raise.

        Raises:
            BackendUnavailableError: one call of the CPU backend does not run all layers.
        """
        stem: Any = self.stem
        image = torch.zeros(1, *stem.weight.shape[1:], dtype=stem.dtype, device=stem.weight.device)
        with torch.inference_mode():
            self._engine.release(self, image)

    def warmup(self, *shapes: Sequence[int]) -> None:
        """Run zeros of each shape (N, in_chans, H, W): later calls have nothing to prepare.

        On a GPU kernels are compiled (seconds) and CUDA graphs captured, on a CPU weights packed.
        For servers, before the first request, and under the same autocast as later calls. Images
        are contiguous and of the model's dtype: others, channels_last ones too, are other shapes.

        Raises:
            ValueError: a shape is none that the model takes.
        """
        stem: Any = self.stem
        with torch.no_grad():
            for shape in shapes:
                x = torch.zeros(tuple(shape), dtype=stem.dtype, device=stem.weight.device)
                for _ in range(2):  # a graph is captured when a shape comes again
                    self(x)

    def tune(
        self,
        example: Tensor,
        *,
        seconds: float = 2.0,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> "Tuning":
        """Measure on this GPU which tiles, and how many images at a time, suit inputs like this.

        Takes minutes, most of them compiling, and keeps what it finds on disk, by device, driver,
        versions and shapes: another process that calls this gets it at once. Without
        it the tables of ``convmixer_fast.kernels`` choose; nothing is ever tuned unasked. Call it
        under the same autocast as later calls. Copies of the module keep the choices.

        Args:
            example: an input batch (N, in_chans, H, W), on the GPU. Its shape and dtype count.
            seconds: of timing for each kernel, and for the whole network.
            folder: for the results; None for ``convmixer_fast`` in the user's cache folder.
            progress: whether to show on the terminal what is going on.

        Returns:
            The choices, and the times of a whole call before and after.

        Raises:
            BackendUnavailableError: the example does not run on Triton, in one call.
            RuntimeError: a kernel does not run or computes the wrong thing.
        """
        stem: Any = self.stem
        x = self._enter(example)[0]
        make_trunk, x = self._engine.bare_trunks(self, x)
        # Needs Triton, which is installed where there is something to tune.
        from convmixer_fast.runtime.tuning import cache_folder, tune
        from convmixer_fast.support.progress import status

        with torch.no_grad(), status("tuning", progress) as report:
            found = tune(
                make_trunk,
                x,
                width=stem.weight.shape[0],
                seconds=seconds,
                folder=cache_folder() if folder is None else Path(folder),
                chunk=self.chunk,
                graphs=self.cuda_graphs is not False,
                report=report,
            )
        self._tuned = {**self._tuned, found.what_for: found.tuned.to_json()}
        self._engine = Engine()
        return found

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the last layer's output (N, num_features, H', W')."""
        x = self._enter(x)[0]
        ran = self._engine.run(self, x, head=False)
        return super().forward_features(x) if ran is None else ran[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (N, num_features, H', W') to logits, or pooled features.

        Raises:
            UnsupportedModelError: the source's head is not pooling and one linear layer.
        """
        self._need_plain_head("forward_head")
        return super().forward_head(x, pre_logits)

    def forward_intermediates(
        self, x: Tensor, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features and the outputs of chosen layers, as timm's method does."""
        return super().forward_intermediates(self._enter(x)[0], *args, **kwargs)

    def _run_steps(self, x: Tensor, steps: Sequence[int]) -> list[Tensor]:
        run = self._engine.intermediates(self, x)
        return super()._run_steps(x, steps) if run is None else run(x, steps)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the head, or an ``nn.Identity`` where there is none."""
        self._need_plain_head("get_classifier")
        return super().get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised one; 0 classes leave the pooled features."""
        if global_pool is None:
            self._need_plain_head("reset_classifier without global_pool")
        super().reset_classifier(num_classes, global_pool)
        self.source_head = None
        self.head.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, so that a parent can be switched; in training mode a call raises.

        With ``optimize(in_training="stay")`` it stays in eval mode: as a frozen part of a module
        that is trained.
        """
        return super().train(mode and self.in_training != "stay")

    def _enter(self, x: Tensor | None) -> tuple[Tensor, ...]:
        """Check the image and prepare it: the stem's input, then what a source head takes."""
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor (N, C, H, W), got {type(x).__name__}")
        if self.training:
            raise InferenceOnlyError(
                "a FusedConvMixer cannot be trained: its BatchNorms are folded into the weights. "
                "Call eval(); train the source model and optimize it again; or, for a frozen part "
                'of a module that is trained, optimize(model, in_training="stay")'
            )
        check_dense("the input", x)
        if not torch.compiler.is_dynamo_compiling():
            x = x.resolve_neg()  # the kernels read memory, in which it is not negated yet
        if asks_for_gradient(x):
            raise InferenceOnlyError(
                "a FusedConvMixer has no backward pass, and its input requires a gradient; call it "
                "under torch.inference_mode() or torch.no_grad(), or detach the input"
            )
        if self.prefix is not None:
            x = self.prefix(x)
        if self.conditions and x.dim() == 4:
            sizes = [x.shape[self.input_layout.index(name)] for name in "NHW"]
            for condition in self.conditions:
                if not condition.holds(*sizes):
                    raise ValueError(
                        f"the source model's code looks at its input's size, and was recognised "
                        f"for sizes where {condition.text}; this input is {tuple(x.shape)}. "
                        "Pass optimize() an example_input of the size to be used"
                    )
        if self.preprocess is None:
            return x, x
        prepared: tuple[Tensor, ...] = self.preprocess(x)
        return prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._engine = Engine()
        super()._apply(fn, recurse)
        return self

    def _need_plain_head(self, what: str) -> None:
        if self.source_head is not None:
            raise UnsupportedModelError(
                f"{what} needs a head of global pooling and at most one linear layer, and the "
                "source model has another one; call the module itself, or forward_features"
            )
