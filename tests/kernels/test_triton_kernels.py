"""The Triton kernels against the float64 reference, element by element.

On a CUDA machine they run on the device; elsewhere Triton's interpreter runs them on
tiny shapes. Every output is allocated full of NaN between two bands of NaN, so that an
element that was never written, or was written outside, is seen.
"""

from collections.abc import Callable

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
    pointwise_block_triton,
)
from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    TF32_ERROR,
    activations,
    check,
    depthwise_args,
    dtypes,
    few_activations,
    make_vectors,
    pointwise_args,
    poisoned_outputs,  # noqa: F401 (a fixture for every test)
    random,
)
from tests.sweeps import sparse
from tests.tolerances import TOL

# NumPy, in the interpreter, warns of what the kernels do on purpose at the dtypes' limits.
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@dtypes
@few_activations
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 11])
def test_depthwise_kernel_sizes(kernel_size: int, activation: str, dtype: torch.dtype) -> None:
    x, weight = depthwise_args((1, 5, 7, 6), kernel_size, dtype)
    check(depthwise_block_triton, x, weight, *make_vectors(5), activation, True)


@few_activations
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("present", ["", "b", "s", "t", "bs", "bt", "st", "bst"])
def test_depthwise_epilogues(present: str, residual: bool, activation: str) -> None:
    for dtype in DTYPES:
        x, weight = depthwise_args((1, 5, 3, 4), 3, dtype)
        vectors = make_vectors(5, torch.float32, present)
        check(depthwise_block_triton, x, weight, *vectors, activation, residual)


@few_activations
@pytest.mark.parametrize("present", ["", "b", "s", "t", "bs", "bt", "st", "bst"])
def test_pointwise_epilogues(present: str, activation: str) -> None:
    for dtype in DTYPES:
        x, weight = pointwise_args((2, 20, 3, 4), 9, dtype)
        vectors = make_vectors(9, torch.float32, present)
        check(pointwise_block_triton, x, weight, *vectors, activation)


@dtypes
def test_vectors_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    x, weight = depthwise_args((1, 5, 3, 4), 3, dtype)
    check(depthwise_block_triton, x, weight, *make_vectors(5, dtype), "gelu", True)
    x, weight = pointwise_args((1, 5, 3, 4), 7, dtype)
    check(pointwise_block_triton, x, weight, *make_vectors(7, dtype), "gelu")


@dtypes
@pytest.mark.parametrize("batch", sparse([0, 1, 3], lambda batch: batch != 1))
def test_odd_shape(batch: int, dtype: torch.dtype) -> None:
    shape = (batch, 40, 13, 11)
    x, weight = depthwise_args(shape, 3, dtype)
    check(depthwise_block_triton, x, weight, *make_vectors(40), "gelu", True)
    x, weight = pointwise_args(shape, 72, dtype)
    check(pointwise_block_triton, x, weight, *make_vectors(72), "gelu")
    x, weight = random(batch, 3, 13, 11, dtype=dtype), random(40, 3, 3, 2, dtype=dtype)
    check(patch_embed_triton, x, weight / 4, *make_vectors(40), "gelu")


@dtypes
def test_one_position(dtype: torch.dtype) -> None:
    x, weight = depthwise_args((2, 40, 1, 1), 7, dtype)
    check(depthwise_block_triton, x, weight, *make_vectors(40), "gelu", True)
    x, weight = pointwise_args((2, 40, 1, 1), 24, dtype)
    check(pointwise_block_triton, x, weight, *make_vectors(24), "gelu")
    x, weight = random(2, 3, 7, 7, dtype=dtype), random(40, 3, 7, 7, dtype=dtype)
    check(patch_embed_triton, x, weight / 12, *make_vectors(40), "gelu")


@pytest.mark.parametrize(
    ("pixels", "patch"),
    [((6, 8), (2, 2)), ((7, 9), (3, 2)), ((5, 4), (1, 1)), ((5, 11), (5, 3)), ((8, 6), (7, 1))],
)
@dtypes
def test_patches(pixels: tuple[int, int], patch: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(2, 3, *pixels, dtype=dtype)
    weight = random(10, 3, *patch, dtype=dtype, fan_in=3 * patch[0] * patch[1])
    check(patch_embed_triton, x, weight, *make_vectors(10), "gelu")
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    check(patch_embed_triton, x, weight, *make_vectors(10), "gelu_tanh")


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
    x, weight = depthwise_args((2, 5, 6, 7), 3, torch.float16)
    x = VIEWS[view](x)
    vectors = tuple(random(10, dtype=torch.float32)[::2] for _ in range(3))
    strided_weight = _framed(weight, 3)
    check(depthwise_block_triton, x, strided_weight, *vectors, "gelu", True)
    weight = random(5, 5, dtype=torch.float16, fan_in=5).mT[:, :, None, None]
    check(pointwise_block_triton, x, weight, *vectors, "gelu")
    weight = _framed(random(5, 5, 3, 2, dtype=torch.float16, fan_in=30), 2)
    check(patch_embed_triton, x, weight, *vectors, "gelu")


SPECIAL = (0.0, -0.0, 1e-3, -1e-3, 0.75, -0.75, 3.0, -3.0, -5.5, 12.0, -12.0, 6e4, -6e4)
SPECIAL += (float("inf"), -float("inf"), float("nan"))


@dtypes
@activations
def test_activations_at_their_limits(activation: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([*SPECIAL, largest, -largest], device=DEVICE).to(dtype).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=DEVICE, dtype=dtype)
    none = (None, None, None)
    check(pointwise_block_triton, x, one, *none, activation)
    # The tensor cores' depthwise kernel multiplies zeros with what is beside a tap.
    x = x if dtype == torch.float32 else x[x.isfinite()].view(1, 1, 1, -1)
    out = check(depthwise_block_triton, x, one, *none, activation, False)
    torch.testing.assert_close(
        check(pointwise_block_triton, x, one, *none, activation), out, equal_nan=True
    )


@pytest.mark.parametrize(
    "dtype", sparse([torch.float16, torch.bfloat16], lambda dtype: dtype == torch.float16, ids=str)
)
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
@pytest.mark.parametrize("value", sparse(["nan", "inf", "-inf"], "-inf".__ne__))
def test_special_values_reach_their_window_alone(
    value: str, activation: str, dtype: torch.dtype
) -> None:
    x, weight = depthwise_args((2, 2, 7, 40), 3, dtype)
    x[0, 1, 3, 20] = float(value)
    out = _check_but_for_special(x, weight, make_vectors(2), activation)
    touched = ~out.isfinite()
    assert touched[0, 1, 3, 20]
    touched[0, 1, *_reach(dtype, 1, 3, 20)] = False
    assert not touched.any()

    x, weight = pointwise_args((1, 3, 2, 4), 5, dtype)
    x[0, 1, 1, 2] = float(value)
    out = check(pointwise_block_triton, x, weight, *make_vectors(5), activation)
    touched = ~out.isfinite()
    # ReLU6 has a value for the infinities.
    assert touched.any() == (value == "nan" or activation != "relu6")
    touched[0, :, 1, 2] = False
    assert not touched.any()


def _check_but_for_special(
    x: Tensor, weight: Tensor, vectors: tuple[Tensor | None, ...], activation: str
) -> Tensor:
    if x.dtype == torch.float32:
        return check(depthwise_block_triton, x, weight, *vectors, activation, True)
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
        assert (check(depthwise_block_triton, *args, False) == expected).all()
        assert (check(pointwise_block_triton, *args) == expected).all()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 1)
    monkeypatch.setattr(depthwise_block, "INT32_ELEMENTS", 1)
    x, weight = depthwise_args((2, 5, 7, 6), 3, torch.float16)
    check(depthwise_block_triton, x, weight, *make_vectors(5), "gelu", True)
    x, weight = pointwise_args((2, 70, 7, 6), 9, torch.float16)
    check(pointwise_block_triton, x, weight, *make_vectors(9), "gelu")


@pytest.mark.cuda
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    side, none = 2**13, (None, None, None)
    x = random(1, 1, side, side, dtype=torch.float16).expand(1, 33, side, side).contiguous()
    _, weight = depthwise_args((1, 33, 1, 1), 3, torch.float16)
    out = depthwise_block_triton(x, weight, *none, "relu", True)
    last = depthwise_block_triton(x[:, -1:], weight[-1:], *none, "relu", True)
    assert torch.equal(out[:, -1:], last)
    del out, last
    _, weight = pointwise_args((1, 33, 1, 1), 33, torch.float16)
    out = pointwise_block_triton(x, weight, *none, "relu")
    last = pointwise_block_triton(x[:, :, -1:], weight, *none, "relu")
    torch.testing.assert_close(out[:, :, -1:], last, **TOL[torch.float16])


@pytest.mark.cuda
def test_tf32_where_convolutions_use_it() -> None:
    x, weight = pointwise_args((2, 256, 16, 16), 256, torch.float32)
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
    x, weight = depthwise_args((1, 5, 3, 4), 3, torch.float32)
    out = ops.depthwise_block(x, weight, backend="triton")
    ref = ops.depthwise_block(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
    x, weight = pointwise_args((1, 5, 3, 4), 3, torch.float32)
    out = ops.pointwise_block(x, weight, backend="triton")
    ref = ops.pointwise_block(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
    weight = random(3, 5, 2, 2, dtype=torch.float32, fan_in=20)
    out = ops.patch_embed(x, weight, backend="triton")
    ref = ops.patch_embed(x, weight, backend="reference")
    torch.testing.assert_close(out, ref, **TOL[torch.float32])
