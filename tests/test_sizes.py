"""Memory sizes as text."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.sizes import format_gib, parse_size

MIB = 2**20
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6G", 6 * GIB),
        ("6GiB", 6 * GIB),
        ("6GB", 6 * 10**9),
        ("6gib", 6 * GIB),
        ("6gb", 6 * 10**9),
        ("2.5G", 5 * GIB // 2),
        ("0.5T", 2**39),
        ("3TB", 3 * 10**12),
        ("512M", 512 * MIB),
        ("512MB", 512 * 10**6),
        ("16k", 16 * 1024),
        ("16KB", 16_000),
        ("4294967296", 4 * GIB),
        ("17B", 17),
        (" 6 G ", 6 * GIB),
        ("80%", 800),
        ("12.5 %", 125),
        ("150%", 1500),
        ("0.1KB", 100),
        ("900000T", 900000 * 2**40),  # more than any machine has is for the caller to judge
    ],
)
def test_a_size_is_read(text: str, expected: int) -> None:
    assert parse_size(text, total_bytes=1000) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "-1", "4X", "nan", "inf", "0%", "0.0G", "G", "%", "1e9", "1_000", "4 G B", "4GiBB", "4ib", "2.5",
     ".5G", "5.G", "--4G", "+4G", "0x10", "٤G", "4G\n8G", "0.0001B", "0.0000000001K", "9" * 5000 + "G"],
)  # fmt: skip
def test_a_text_that_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, total_bytes=1000)
    assert repr(text) in str(caught.value)
    assert "6GiB" in str(caught.value)
    assert "80%" in str(caught.value)


@given(st.integers(1, 2**53), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "iB"]))
def test_binary_units_multiply_exactly(number: int, prefix: str, suffix: str) -> None:
    power = " KMGT".index(prefix or " ")
    suffix = suffix if prefix else ""
    assert parse_size(f"{number}{prefix}{suffix}", 1) == number * 1024**power
    if prefix:
        assert parse_size(f"{number}{prefix}B".lower(), 1) == number * 1000**power


@given(st.integers(1, 100), st.integers(100, 2**60))
def test_percent_is_an_exact_share(percent: int, total_bytes: int) -> None:
    assert parse_size(f"{percent}%", total_bytes) == percent * total_bytes // 100


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text, 10**6) >= 1


@given(st.integers(2**20, 2**50))
def test_formatted_gib_reads_back_within_its_digits(size_bytes: int) -> None:
    text = format_gib(size_bytes)
    assert text.endswith(" GiB")
    resolution = GIB / (200 if size_bytes >= 0.1 * GIB else 20000)
    assert abs(parse_size(text, 1) - size_bytes) <= resolution + 1


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0.00 GiB"), (4 * MIB, "0.0039 GiB"), (int(7.8 * GIB), "7.80 GiB"), (-3 * GIB, "-3.00 GiB")],
)
def test_format_gib(size_bytes: int, text: str) -> None:
    assert format_gib(size_bytes) == text
