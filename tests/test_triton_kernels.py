"""The Triton kernels against the float64 reference, element by element.

On a CUDA machine they run on the device; elsewhere Triton's interpreter runs them on
tiny shapes. Every output is allocated full of NaN between two bands of NaN, so that an
element that was never written, or was written outside, is seen.
"""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from convmixer_fast import ops, reference
from convmixer_fast.kernels import (
    depthwise_block,
    depthwise_block_triton,
    launch,
    patch_embed_triton,
    pointwise_block,
    pointwise_block_triton,
)
from tests.tolerances import TOL

# NumPy, in the interpreter, warns of what the kernels do on purpose at the dtypes' limits.
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
BAND = 64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    buffers: list[tuple[Tensor, int]] = []

    def poisoned_empty(shape: tuple[int, ...], **options: object) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), float("nan"), **options)
        buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    yield
    for buffer, size in buffers:
        assert buffer[:BAND].isnan().all()
        assert buffer[BAND + size :].isnan().all()


def _random(*shape: int, dtype: torch.dtype, fan_in: int = 1) -> Tensor:
    return (torch.randn(shape) / fan_in**0.5).to(DEVICE, dtype)


def _vectors(
    channels: int, dtype: torch.dtype = torch.float32, present: str = "bst"
) -> tuple[Tensor | None, ...]:
    """Bias, scale and shift; None for those whose letter is not in ``present``."""
    return tuple(_random(channels, dtype=dtype) if name in present else None for name in "bst")


def _depthwise_args(
    shape: tuple[int, ...], kernel_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight = _random(shape[1], 1, kernel_size, kernel_size, dtype=dtype, fan_in=kernel_size**2)
    return _random(*shape, dtype=dtype), weight


def _pointwise_args(
    shape: tuple[int, ...], channels_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight = _random(channels_out, shape[1], 1, 1, dtype=dtype, fan_in=shape[1])
    return _random(*shape, dtype=dtype), weight


def _check(launcher: Callable[..., Tensor], *args: object) -> Tensor:
    """Run a launcher and compare its result with the reference in float64."""
    ref = getattr(reference, launcher.__name__.replace("_triton", "_ref"))
    x = args[0]
    assert isinstance(x, Tensor)
    exact = ref(*(a.cpu().double() if isinstance(a, Tensor) else a for a in args))
    out = launcher(*args)
    assert out.dtype == x.dtype
    assert out.device == x.device
    assert out.is_contiguous()
    # Rounded to the dtype, so that what overflows there is an infinity on both sides.
    expected = torch.where(exact.to(x.dtype).isinf(), exact.to(x.dtype).double(), exact)
    torch.testing.assert_close(
        out.cpu().double(), expected, **TOL[x.dtype], equal_nan=bool(exact.isnan().any())
    )
    return out


@dtypes
@activations
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11])
def test_depthwise_kernel_sizes(kernel_size: int, activation: str, dtype: torch.dtype) -> None:
    x, weight = _depthwise_args((1, 5, 7, 6), kernel_size, dtype)
    _check(depthwise_block_triton, x, weight, *_vectors(5), activation, True)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("present", ["", "b", "s", "t", "bs", "bt", "st", "bst"])
def test_depthwise_epilogues(present: str, residual: bool) -> None:
    for activation, dtype in product(ACTIVATIONS, DTYPES):
        x, weight = _depthwise_args((1, 5, 3, 4), 3, dtype)
        vectors = _vectors(5, torch.float32, present)
        _check(depthwise_block_triton, x, weight, *vectors, activation, residual)


@pytest.mark.parametrize("present", ["", "b", "s", "t", "bs", "bt", "st", "bst"])
def test_pointwise_epilogues(present: str) -> None:
    for activation, dtype in product(ACTIVATIONS, DTYPES):
        x, weight = _pointwise_args((2, 20, 3, 4), 9, dtype)
        vectors = _vectors(9, torch.float32, present)
        _check(pointwise_block_triton, x, weight, *vectors, activation)


@dtypes
def test_vectors_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    x, weight = _depthwise_args((1, 5, 3, 4), 3, dtype)
    _check(depthwise_block_triton, x, weight, *_vectors(5, dtype), "gelu", True)
    x, weight = _pointwise_args((1, 5, 3, 4), 7, dtype)
    _check(pointwise_block_triton, x, weight, *_vectors(7, dtype), "gelu")


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_odd_shape(batch: int, dtype: torch.dtype) -> None:
    shape = (batch, 40, 13, 11)
    x, weight = _depthwise_args(shape, 3, dtype)
    _check(depthwise_block_triton, x, weight, *_vectors(40), "gelu", True)
    x, weight = _pointwise_args(shape, 72, dtype)
    _check(pointwise_block_triton, x, weight, *_vectors(72), "gelu")
    x, weight = _random(batch, 3, 13, 11, dtype=dtype), _random(40, 3, 3, 2, dtype=dtype)
    _check(patch_embed_triton, x, weight / 4, *_vectors(40), "gelu")


@dtypes
def test_one_position(dtype: torch.dtype) -> None:
    x, weight = _depthwise_args((2, 40, 1, 1), 7, dtype)
    _check(depthwise_block_triton, x, weight, *_vectors(40), "gelu", True)
    x, weight = _pointwise_args((2, 40, 1, 1), 24, dtype)
    _check(pointwise_block_triton, x, weight, *_vectors(24), "gelu")
    x, weight = _random(2, 3, 7, 7, dtype=dtype), _random(40, 3, 7, 7, dtype=dtype)
    _check(patch_embed_triton, x, weight / 12, *_vectors(40), "gelu")


@pytest.mark.parametrize("row", depthwise_block.CONFIGS, ids=lambda r: f"{r[:3]}".replace(" ", ""))
@pytest.mark.parametrize(("shape", "kernel_size"), [((1, 3, 5, 70), 3), ((2, 5, 19, 3), 5)])
def test_every_depthwise_config(
    row: depthwise_block.Config,
    shape: tuple[int, ...],
    kernel_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(depthwise_block, "choose_config", lambda *_: row)
    x, weight = _depthwise_args(shape, kernel_size, torch.float16)
    _check(depthwise_block_triton, x, weight, *_vectors(shape[1]), "gelu", True)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 23)])
def test_largest_kernel(height: int, width: int) -> None:
    x, weight = _depthwise_args((1, 2, height, width), 31, torch.float32)
    _check(depthwise_block_triton, x, weight, *_vectors(2), "relu", True)


@pytest.mark.parametrize("row", pointwise_block.CONFIGS, ids=lambda r: f"{r[0]}-{r[4:7]}")
@pytest.mark.parametrize(
    ("shape", "channels_out"), [((2, 70, 13, 11), 150), ((1, 1, 1, 17), 1), ((3, 129, 1, 1), 64)]
)
def test_every_pointwise_config(
    row: pointwise_block.Config,
    shape: tuple[int, ...],
    channels_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pointwise_block, "choose_config", lambda *_: row)
    for dtype in (torch.float16, torch.bfloat16) if row.operands == "16-bit" else (torch.float32,):
        x, weight = _pointwise_args(shape, channels_out, dtype)
        _check(pointwise_block_triton, x, weight, *_vectors(channels_out), "gelu")


def test_configs_cover_every_shape() -> None:
    for kernel_size, height, width in product((1, 9, 11, 31, 63), (1, 9, 1000), (1, 17, 1000)):
        row = depthwise_block.choose_config(kernel_size, height, width)
        assert kernel_size <= row.max_kernel_size
        assert height <= row.max_height
        assert width <= row.max_width
    for operands, aligned, images, positions in product(
        ("16-bit", "tf32", "ieee"), (True, False), (1, 1000), (1, 49, 10**6)
    ):
        row = pointwise_block.choose_config(operands, aligned, images, 768, positions)
        assert row.operands == operands
        assert aligned or not row.aligned
        assert positions >= row.min_positions


@pytest.mark.parametrize(
    ("pixels", "patch"),
    [((6, 8), (2, 2)), ((7, 9), (3, 2)), ((5, 4), (1, 1)), ((5, 11), (5, 3)), ((8, 6), (7, 1))],
)
@dtypes
def test_patches(pixels: tuple[int, int], patch: tuple[int, int], dtype: torch.dtype) -> None:
    x = _random(2, 3, *pixels, dtype=dtype)
    weight = _random(10, 3, *patch, dtype=dtype, fan_in=3 * patch[0] * patch[1])
    _check(patch_embed_triton, x, weight, *_vectors(10), "gelu")
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    _check(patch_embed_triton, x, weight, *_vectors(10), "gelu_tanh")


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda x: _framed(x, 1),
    "row_slice": lambda x: _framed(x, 2),
    "crop": lambda x: _framed(_framed(x, 2), 3),
    "every_second_column": lambda x: torch.stack((x, x * float("nan")), -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded_batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded_rows": lambda x: x[:, :, :1].expand_as(x),
}
"""The same numbers (but for the expanded ones) in other strides, with NaN around them."""


def _framed(x: Tensor, dim: int) -> Tensor:
    border = torch.full_like(x, float("nan"))
    return torch.cat((border, x, border), dim).narrow(dim, x.shape[dim], x.shape[dim])


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    x, weight = _depthwise_args((2, 5, 6, 7), 3, torch.float16)
    x = VIEWS[view](x)
    vectors = tuple(_random(10, dtype=torch.float32)[::2] for _ in range(3))
    strided_weight = _framed(weight, 3)
    _check(depthwise_block_triton, x, strided_weight, *vectors, "gelu", True)
    weight = _random(5, 5, dtype=torch.float16, fan_in=5).mT[:, :, None, None]
    _check(pointwise_block_triton, x, weight, *vectors, "gelu")
    weight = _framed(_random(5, 5, 3, 2, dtype=torch.float16, fan_in=30), 2)
    _check(patch_embed_triton, x, weight, *vectors, "gelu")


SPECIAL = (0.0, -0.0, 1e-3, -1e-3, 0.75, -0.75, 3.0, -3.0, -5.5, 12.0, -12.0, 6e4, -6e4)
SPECIAL += (float("inf"), -float("inf"), float("nan"))


@dtypes
@activations
def test_activations_at_their_limits(activation: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([*SPECIAL, largest, -largest], device=DEVICE).to(dtype).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=DEVICE, dtype=dtype)
    none = (None, None, None)
    out = _check(depthwise_block_triton, x, one, *none, activation, False)
    torch.testing.assert_close(
        _check(pointwise_block_triton, x, one, *none, activation), out, equal_nan=True
    )


@dtypes
@activations
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_special_values_reach_their_window_alone(
    value: str, activation: str, dtype: torch.dtype
) -> None:
    x, weight = _depthwise_args((1, 2, 7, 8), 3, dtype)
    x[0, 1, 3, 4] = float(value)
    out = _check(depthwise_block_triton, x, weight, *_vectors(2), activation, True)
    touched = ~out.isfinite()
    assert touched.any()
    touched[0, 1, 2:5, 3:6] = False
    assert not touched.any()

    x, weight = _pointwise_args((1, 3, 2, 4), 5, dtype)
    x[0, 1, 1, 2] = float(value)
    out = _check(pointwise_block_triton, x, weight, *_vectors(5), activation)
    touched = ~out.isfinite()
    assert touched.any()
    touched[0, :, 1, 2] = False
    assert not touched.any()


def test_16_bit_results_overflow_to_infinity() -> None:
    x = torch.full((1, 1, 2, 2), 6e4, device=DEVICE, dtype=torch.float16)
    weight = torch.full((1, 1, 1, 1), 2.0, device=DEVICE, dtype=torch.float16)
    half = torch.full((1,), 0.25, device=DEVICE)
    for scale, expected in ((None, float("inf")), (half, 3e4)):
        args = (x, weight, None, scale, None, "relu")
        assert (_check(depthwise_block_triton, *args, False) == expected).all()
        assert (_check(pointwise_block_triton, *args) == expected).all()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INT32_ELEMENTS", 1)
    x, weight = _depthwise_args((2, 5, 7, 6), 3, torch.float16)
    _check(depthwise_block_triton, x, weight, *_vectors(5), "gelu", True)
    x, weight = _pointwise_args((2, 70, 7, 6), 9, torch.float16)
    _check(pointwise_block_triton, x, weight, *_vectors(9), "gelu")


@pytest.mark.cuda
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    side, none = 2**13, (None, None, None)
    x = _random(1, 1, side, side, dtype=torch.float16).expand(1, 33, side, side).contiguous()
    _, weight = _depthwise_args((1, 33, 1, 1), 3, torch.float16)
    out = depthwise_block_triton(x, weight, *none, "relu", True)
    last = depthwise_block_triton(x[:, -1:], weight[-1:], *none, "relu", True)
    assert torch.equal(out[:, -1:], last)
    del out, last
    _, weight = _pointwise_args((1, 33, 1, 1), 33, torch.float16)
    out = pointwise_block_triton(x, weight, *none, "relu")
    last = pointwise_block_triton(x[:, :, -1:], weight, *none, "relu")
    torch.testing.assert_close(out[:, :, -1:], last, **TOL[torch.float16])


@pytest.mark.cuda
def test_tf32_where_convolutions_use_it() -> None:
    x, weight = _pointwise_args((2, 256, 16, 16), 256, torch.float32)
    ieee = pointwise_block_triton(x, weight, None, None, None, "gelu")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    tf32 = pointwise_block_triton(x, weight, None, None, None, "gelu")
    assert not torch.equal(ieee, tf32)
    # TF32 keeps 10 bits of each operand, of which there are 256 in a sum of unit variance:
    # simulated, the worst error is 1.5e-3 with rounded operands, 3.7e-3 with truncated ones.
    torch.testing.assert_close(tf32, ieee, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cudnn.allow_tf32": False}, "ieee"),
        ({"cudnn.allow_tf32": True}, "tf32"),
        ({"cudnn.conv.fp32_precision": "ieee"}, "ieee"),
        ({"cudnn.conv.fp32_precision": "tf32"}, "tf32"),
        ({"cudnn.conv.fp32_precision": "ieee", "cudnn.allow_tf32": True}, "tf32"),
        ({"cudnn.allow_tf32": False, "cudnn.conv.fp32_precision": "tf32"}, "tf32"),
    ],
    ids=str,
)
def test_fp32_precision_follows_the_convolutions(
    settings: dict[str, object], expected: str
) -> None:
    try:
        for name, value in settings.items():
            *path, attribute = name.split(".")
            owner = torch.backends
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, attribute, value)
        assert launch.fp32_input_precision() == expected
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_offset_dtype() -> None:
    assert launch.offset_dtype(2**31 - 1, 5).primitive_bitwidth == 32
    assert launch.offset_dtype(5, 2**31).primitive_bitwidth == 64


def test_public_ops_reach_the_kernels() -> None:
    x, weight = _depthwise_args((1, 5, 3, 4), 3, torch.float32)
    out = ops.depthwise_block(x, weight, backend="triton")
    ref = ops.depthwise_block(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
    x, weight = _pointwise_args((1, 5, 3, 4), 3, torch.float32)
    out = ops.pointwise_block(x, weight, backend="triton")
    ref = ops.pointwise_block(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
    weight = _random(3, 5, 2, 2, dtype=torch.float32, fan_in=20)
    out = ops.patch_embed(x, weight, backend="triton")
    ref = ops.patch_embed(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
