"""Values of command line options."""

import argparse

import pytest

from tools.values import (
    format_size,
    parse_count,
    parse_name_and_path,
    parse_port,
    parse_seconds,
    parse_share,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("512MiB", 512 << 20),
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("0.001kb", 1),
        (" 3tib ", 3 << 40),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_a_size_is_read_to_the_byte(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size such as 512MiB, 2GB or a number of bytes, got ''"),
        ("-1GB", "expected a size such as 512MiB, 2GB or a number of bytes, got '-1GB'"),
        ("1e9", "expected a size such as 512MiB, 2GB or a number of bytes, got '1e9'"),
        ("lots", "expected a size such as 512MiB, 2GB or a number of bytes, got 'lots'"),
        (
            "2G",
            "expected one of the units TiB, GiB, MiB, KiB, TB, GB, MB, KB, B, got 'G' in '2G'",
        ),
        ("0MiB", "expected a whole number of bytes, got '0MiB'"),
        ("0.3B", "expected a whole number of bytes, got '0.3B'"),
    ],
)
def test_what_is_no_size_is_refused_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_size(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(512 << 20, "512MiB"), (2_000_000_000, "2GB"), (1, "1B"), (1025, "1025B"), (4 << 30, "4GiB")],
)
def test_a_size_is_shown_as_it_would_be_written(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_a_count_is_a_whole_number_from_one_on(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number at least 1"):
        parse_count(text)


def test_a_port_may_be_zero_but_not_beyond_sixteen_bits() -> None:
    assert (parse_port("0"), parse_port("65535")) == (0, 65535)
    with pytest.raises(argparse.ArgumentTypeError, match=r"of \[0, 65535\], got '65536'"):
        parse_port("65536")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_are_finite_and_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of seconds above 0"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["0", "-0.1", "1.01", "nan", "most"])
def test_a_share_is_above_zero_and_at_most_one(text: str) -> None:
    assert (parse_share("0.25"), parse_share("1")) == (0.25, 1.0)
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a number of \(0, 1\], got"):
        parse_share(text)


def test_a_name_ends_at_the_first_equals_sign() -> None:
    assert parse_name_and_path("shout=/a=b") == ("shout", "/a=b")
    for text in ("shout", "=path", "name="):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=PATH, got"):
            parse_name_and_path(text)
