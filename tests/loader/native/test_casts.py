"""Casts round as numpy's and torch's do, and nothing becomes, or stays, infinite."""

import tempfile
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from loader.native.runs import IMAGE_FORMATS, STEP_VALUES, TILE_VALUES, Fault, Format
from tests.loader.native.filling import converted
from tests.loader.native.reference_casts import BITS, Bits, cast

PAIRS = tuple(product(IMAGE_FORMATS.values(), repeat=2))
TORCH = {
    Format.FLOAT32: torch.float32,
    Format.FLOAT16: torch.float16,
    Format.BFLOAT16: torch.bfloat16,
}


def tensor(bits: Bits, format: Format) -> torch.Tensor:
    signed = bits.view(np.int32 if format is Format.FLOAT32 else np.int16)
    return torch.from_numpy(signed.copy()).view(TORCH[format])


def bits_of(values: torch.Tensor) -> Bits:
    if values.dtype is torch.float32:
        return values.view(torch.int32).numpy().view(np.uint32)
    return values.view(torch.int16).numpy().view(np.uint16)


def every_value(format: Format) -> Bits:
    """All values of 16 bits; of float32 all upper halves, with lower ones around the ties."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    if format is not Format.FLOAT32:
        return upper.astype(np.uint16)
    around_ties = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    return ((upper[:, None] << np.uint32(16)) | np.array(around_ties, np.uint32)).reshape(-1)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_cast_rounds_as_torch_does(tmp_path: Path, source: Format, target: Format) -> None:
    values = tensor(every_value(source), source)
    expected = values.to(TORCH[target])
    finite = values.isfinite() & expected.isfinite()
    fault, result = converted(tmp_path, bits_of(values[finite]), source, target)
    assert fault is Fault.NONE
    assert (result == bits_of(expected[finite])).all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_reference_rounds_as_torch_does(source: Format, target: Format) -> None:
    bits = every_value(source)
    values = tensor(bits, source)
    expected = values.to(TORCH[target])
    kept = ~values.isnan()
    assert (cast(bits[kept.numpy()], source, target)[1] == bits_of(expected[kept])).all()


# Float32 bits in which float16's subnormal numbers and both overflows are not rare.
SINGLES = st.one_of(
    st.integers(0, 0xFFFF_FFFF),
    st.builds(
        lambda sign, exponent, mantissa: sign << 31 | exponent << 23 | mantissa,
        st.integers(0, 1),
        st.one_of(st.integers(100, 115), st.integers(140, 143), st.integers(253, 255)),
        st.integers(0, 0x7F_FFFF),
    ),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    singles=arrays(np.uint32, st.integers(0, 200), elements=SINGLES),
)
def test_any_values_become_what_the_reference_makes_of_them(
    pair: tuple[Format, Format], singles: Bits
) -> None:
    source, target = pair
    bits = singles if source is Format.FLOAT32 else (singles >> 16).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        fault, result = converted(Path(folder), bits, source, target)
    expected_fault, expected = cast(bits, source, target)
    assert fault is expected_fault
    if fault is Fault.NONE:
        assert (result == expected).all()


def test_tiles_of_random_values_become_what_the_reference_makes_of_them(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for source, target in PAIRS:
        # Magnitudes of 2^-30 to 2^15: within and below what float16 holds.
        exponents = rng.integers(97, 142, 2 * TILE_VALUES + 77, np.uint32)
        singles = rng.integers(0, 1 << 32, exponents.size, np.uint32) & np.uint32(0x807F_FFFF)
        _, bits = cast(singles | exponents << np.uint32(23), Format.FLOAT32, source)
        fault, result = converted(tmp_path, bits, source, target)
        assert (fault, cast(bits, source, target)[0]) == (Fault.NONE, Fault.NONE)
        assert (result == cast(bits, source, target)[1]).all(), (source, target)


@pytest.mark.parametrize(
    ("source", "target", "greatest"),
    [
        (Format.FLOAT32, Format.FLOAT16, 65519.996),
        (Format.FLOAT32, Format.BFLOAT16, 3.39617732e38),
        (Format.BFLOAT16, Format.FLOAT16, 65280.0),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_greatest_value_that_fits_is_cast_and_the_next_is_refused(
    tmp_path: Path, source: Format, target: Format, greatest: float, sign: float
) -> None:
    values = bits_of(torch.tensor([1.0, sign * greatest]).to(TORCH[source])).copy()
    assert converted(tmp_path, values, source, target)[0] is Fault.NONE
    values[1] += 1
    assert converted(tmp_path, values, source, target)[0] is Fault.TOO_GREAT


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_value_that_is_not_finite_is_found_wherever_it_stands(
    tmp_path: Path, source: Format, target: Format
) -> None:
    places = (0, 77, STEP_VALUES - 1, STEP_VALUES, TILE_VALUES - 1, TILE_VALUES, TILE_VALUES + 30)
    infinity, nan = float("inf"), float("nan")
    for position, value in zip(places, cycle((infinity, -infinity, nan, -nan)), strict=False):
        values = torch.full((TILE_VALUES + 31,), -1.0).to(TORCH[source])
        values[position] = value
        fault, _ = converted(tmp_path, bits_of(values), source, target)
        assert fault is Fault.NOT_FINITE, (position, value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_no_value_that_is_not_finite_passes(
    tmp_path: Path, source: Format, target: Format, value: float
) -> None:
    values = torch.tensor([0.0, value, 0.0]).to(TORCH[source])
    assert converted(tmp_path, bits_of(values), source, target)[0] is Fault.NOT_FINITE


def test_worse_fault_of_a_step_is_told_and_of_several_steps_the_first(tmp_path: Path) -> None:
    for distance, expected in ((1, Fault.NOT_FINITE), (STEP_VALUES, Fault.TOO_GREAT)):
        values = torch.zeros(distance + 1)
        values[0], values[distance] = 1e6, float("nan")
        fault, _ = converted(tmp_path, bits_of(values), Format.FLOAT32, Format.FLOAT16)
        assert fault is expected


@pytest.mark.parametrize("format", IMAGE_FORMATS.values())
def test_greatest_numbers_of_a_format_are_finite(tmp_path: Path, format: Format) -> None:
    values = torch.full((1000,), torch.finfo(TORCH[format]).max, dtype=TORCH[format])
    values[::2] *= -1
    fault, result = converted(tmp_path, bits_of(values), format, format)
    assert fault is Fault.NONE
    assert result.dtype == BITS[format] and (result == bits_of(values)).all()


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        (Format.FLOAT8_E4M3, torch.float8_e4m3fn),
        (Format.FLOAT8_E5M2, torch.float8_e5m2),
        (Format.INT8, torch.int8),
    ],
)
@pytest.mark.parametrize("target", IMAGE_FORMATS.values())
def test_every_value_of_eight_bits_is_what_it_is_to_torch(
    tmp_path: Path, source: Format, dtype: torch.dtype, target: Format
) -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(codes).view(dtype).float()
    finite = values.isfinite().numpy()
    fault, result = converted(tmp_path, codes[finite], source, target)
    assert fault is Fault.NONE
    assert (result == bits_of(values[finite].to(TORCH[target]))).all()
    for code in codes[~finite]:
        fault, _ = converted(tmp_path, np.array([code]), source, target)
        assert fault is Fault.NOT_FINITE, code
