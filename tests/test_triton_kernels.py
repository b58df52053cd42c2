"""The Triton kernels against the float64 reference, element by element.

On a CUDA machine they run on the device; elsewhere Triton's interpreter runs them on
tiny shapes. Every output is allocated full of NaN between two bands of NaN, so that an
element that was never written, or was written outside, is seen.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

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
    pointwise_tma,
)
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_tma import TmaTile, launch_tma, suits_tma
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


TF32_ERROR = 1e-2
"""TF32 keeps 10 bits of each operand. Of 256 products in a sum of unit variance, simulated, the
worst error is 1.5e-3 with rounded operands, 3.7e-3 with truncated ones."""


def _every_tile(configs: tuple[Any, ...]) -> Any:
    """Each row's tile, of the rows that run on this device: the interpreter has all of them."""
    tiles = {row.tile: row for row in configs}
    if DEVICE.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        every = (0, 1000)
        tiles = {
            tile: row
            for tile, row in tiles.items()
            if (limits := getattr(row, "capabilities", every))[0] <= 10 * major + minor < limits[1]
        }
    ids = [f"{type(tile).__name__}-{'-'.join(map(str, tile))}" for tile in tiles]
    return pytest.mark.parametrize("row", tiles.values(), ids=ids)


@_every_tile(depthwise_block.CONFIGS)
@pytest.mark.parametrize("shape", [(1, 3, 5, 70), (2, 5, 19, 3), (9, 2, 17, 16)])
def test_every_depthwise_config(
    row: depthwise_block.Config, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise_block, "choose_config", lambda *_: row)
    kernel_size = int(min(row.max_kernel_size, 17))
    x, weight = _depthwise_args(shape, kernel_size, torch.float16)
    _check(depthwise_block_triton, x, weight, *_vectors(shape[1]), "gelu", True)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 23)])
def test_largest_kernel(height: int, width: int) -> None:
    x, weight = _depthwise_args((1, 2, height, width), 31, torch.float32)
    _check(depthwise_block_triton, x, weight, *_vectors(2), "relu", True)


@_every_tile(pointwise_block.CONFIGS)
@pytest.mark.parametrize(
    ("shape", "channels_out"),
    [
        ((2, 72, 8, 9), 150),
        ((2, 584, 8, 16), 150),  # more steps than a pipeline has stages
        ((2, 70, 13, 11), 150),
        ((1, 1, 1, 17), 1),
        ((3, 129, 1, 1), 64),
    ],
)
def test_every_pointwise_config(
    row: pointwise_block.Config,
    shape: tuple[int, ...],
    channels_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pointwise_block, "choose_config", lambda *_: row)
    if row.operands == "tf32":
        monkeypatch.setattr(pointwise_block, "fp32_input_precision", lambda: "tf32")
    for dtype in (torch.float16, torch.bfloat16) if row.operands == "16-bit" else (torch.float32,):
        x, weight = _pointwise_args(shape, channels_out, dtype)
        if isinstance(row.tile, TmaTile) and not suits_tma(
            x.flatten(2), weight.reshape(channels_out, -1)
        ):
            pytest.skip("needs sizes that the TMA takes")
        if row.operands == "tf32" and DEVICE.type == "cuda":
            out = pointwise_block_triton(x, weight, None, None, None, "gelu")
            exact = reference.pointwise_block_ref(
                x.double(), weight.double(), None, None, None, "gelu"
            )
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=TF32_ERROR)
        else:
            _check(pointwise_block_triton, x, weight, *_vectors(channels_out), "gelu")


@pytest.mark.parametrize("persistent", [False, True], ids=["tiles", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_tma(persistent: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_tma, "_multiprocessors", lambda x: 2)  # several tiles each
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    x, weight = _pointwise_args((3, 72, 8, 9), 150, dtype)
    vectors = _vectors(150)
    out = torch.empty((3, 150, 8, 9), dtype=dtype, device=DEVICE)
    tile = TmaTile(64, 64, 32, persistent, 4, 3)
    launch_tma(x.flatten(2), weight.flatten(1), launch.Epilogue(*vectors, "gelu"), out, tile)
    exact = reference.pointwise_block_ref(
        x.cpu().double(),
        weight.cpu().double(),
        *(vector.cpu().double() for vector in vectors),
        "gelu",
    )
    torch.testing.assert_close(out.cpu().double(), exact, **TOL[dtype])


def test_configs_cover_every_shape() -> None:
    for dtype, kernel_size, images, height, width in product(
        DTYPES, (1, 9, 11, 15, 31, 63), (1, 256), (1, 9, 1000), (1, 17, 36, 1000)
    ):
        x = torch.zeros((), dtype=dtype).expand(images, 768, height, width)
        row = depthwise_block.choose_config(x, kernel_size)
        assert kernel_size <= row.max_kernel_size
        assert height <= row.max_height
        assert width <= row.max_width
        largest = 15 if width % 4 == 0 else 9
        toeplitz = dtype != torch.float32 and kernel_size <= largest and width >= 4
        assert isinstance(row.tile, ToeplitzTile) == toeplitz
        if isinstance(row.tile, ToeplitzTile):
            assert row.tile.programs(kernel_size, x.shape) >= row.min_programs
    for device, operands, aligned, tma, images, positions in product(
        (80, 86, 89, 90, 100, 120),
        ("16-bit", "tf32", "ieee"),
        (True, False),
        (True, False),
        (1, 1000),
        (1, 49, 10**6),
    ):
        row = pointwise_block.choose_config(device, operands, aligned, tma, images, 768, positions)
        assert row.operands == operands
        assert positions >= row.min_positions
        if isinstance(row.tile, TmaTile):
            assert tma
            assert device in (90, 100)
        else:
            assert aligned or not row.aligned


def test_offsets_of_a_large_plane_are_for_the_direct_kernel() -> None:
    x = torch.zeros((), dtype=torch.float16).expand(1, 1, 2**16, 2**15)
    assert isinstance(depthwise_block.choose_config(x, 7).tile, DirectTile)
    assert isinstance(depthwise_block.choose_config(x[:, :, 1:], 7).tile, ToeplitzTile)


@pytest.mark.parametrize("height", [1, 2, 7, 14, 16, 17, 18, 33, 36, 64])
@pytest.mark.parametrize("max_rows", [4, 8, 16])
def test_segments_of_rows(height: int, max_rows: int) -> None:
    rows = ToeplitzTile(16, max_rows).rows(height)
    assert rows <= max_rows
    assert rows % 2 == 0
    # No segment is empty, and those that there are waste less than two rows each.
    segments = -(-height // rows)
    assert segments == -(-height // max_rows)
    assert segments * rows - height < 2 * segments


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
    _check(pointwise_block_triton, x, one, *none, activation)
    # The tensor cores' depthwise kernel multiplies zeros with what is beside a tap.
    x = x if dtype == torch.float32 else x[x.isfinite()].view(1, 1, 1, -1)
    out = _check(depthwise_block_triton, x, one, *none, activation, False)
    torch.testing.assert_close(
        _check(pointwise_block_triton, x, one, *none, activation), out, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_gelu_of_every_16_bit_number(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[bits.view(dtype).isfinite()].to(DEVICE)
    one = torch.ones(1, 1, 1, 1, device=DEVICE, dtype=dtype)
    none = (None, None, None)
    x = x.view(1, 1, 1, -1)
    exact = torch.nn.functional.gelu(x.cpu().double()).flatten()
    out = pointwise_block_triton(x, one, *none, "gelu").cpu().flatten()
    # A unit in float16's last place; bfloat16's are larger, wherever float16 is not subnormal.
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-13) - 11)
    if dtype == torch.float16:
        error = (out.double() - exact).abs() / unit
        assert error.max() < 0.77
    else:
        # The interpreter truncates to bfloat16: less than a unit there is 8 of float16's.
        unit16 = torch.ldexp(torch.ones_like(exact), exponent - 8).clamp(min=2.0**-24)
        assert ((out.double() - exact).abs() / unit16).max() < 1.1


def _reach(dtype: torch.dtype, radius: int, row: int, column: int) -> tuple[slice, slice]:
    """Rows and columns of results that a special value may turn into NaN or an infinity."""
    first, last, left, right = row - radius, row + radius, column - radius, column + radius
    if dtype != torch.float32:
        # All of the windows that it is in, of 8 columns with 4 more on either side, and of
        # the pairs of rows.
        first, last = first // 2 * 2, last // 2 * 2 + 1
        left, right = (column - 4) // 8 * 8, (column + 4) // 8 * 8 + 7
    return slice(first, last + 1), slice(left, right + 1)


@dtypes
@activations
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_special_values_reach_their_window_alone(
    value: str, activation: str, dtype: torch.dtype
) -> None:
    x, weight = _depthwise_args((2, 2, 7, 40), 3, dtype)
    x[0, 1, 3, 20] = float(value)
    out = _check_but_for_special(x, weight, _vectors(2), activation)
    touched = ~out.isfinite()
    assert touched[0, 1, 3, 20]
    touched[0, 1, *_reach(dtype, 1, 3, 20)] = False
    assert not touched.any()

    x, weight = _pointwise_args((1, 3, 2, 4), 5, dtype)
    x[0, 1, 1, 2] = float(value)
    out = _check(pointwise_block_triton, x, weight, *_vectors(5), activation)
    touched = ~out.isfinite()
    assert touched.any()
    touched[0, :, 1, 2] = False
    assert not touched.any()


def _check_but_for_special(
    x: Tensor, weight: Tensor, vectors: tuple[Tensor | None, ...], activation: str
) -> Tensor:
    if x.dtype == torch.float32:
        return _check(depthwise_block_triton, x, weight, *vectors, activation, True)
    out = depthwise_block_triton(x, weight, *vectors, activation, True)
    args = [a if a is None else a.cpu().double() for a in (x, weight, *vectors)]
    exact = reference.depthwise_block_ref(*args, activation, True).where(out.cpu().isfinite(), 0)
    finite = out.cpu().double().where(out.cpu().isfinite(), 0)
    torch.testing.assert_close(finite, exact, **TOL[x.dtype])
    return out


def test_16_bit_results_overflow_to_infinity() -> None:
    x = torch.full((1, 1, 2, 2), 6e4, device=DEVICE, dtype=torch.float16)
    weight = torch.full((1, 1, 1, 1), 2.0, device=DEVICE, dtype=torch.float16)
    half = torch.full((1,), 0.25, device=DEVICE)
    for scale, expected in ((None, float("inf")), (half, 3e4)):
        args = (x, weight, None, scale, None, "relu")
        assert (_check(depthwise_block_triton, *args, False) == expected).all()
        assert (_check(pointwise_block_triton, *args) == expected).all()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 1)
    monkeypatch.setattr(depthwise_block, "INT32_ELEMENTS", 1)
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
    torch.testing.assert_close(tf32, ieee, rtol=0, atol=TF32_ERROR)


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
