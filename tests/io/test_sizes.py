"""Numbers of bytes as text, and values in messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.io.sizes import InvalidSizeError, format_bytes, format_duration, parse_bytes, shorten


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), ("1.5kb", 1500), (7, 7), (" 12 ", 12), ("1B", 1)]
)
def test_sizes_are_decimal_or_binary(text: object, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, "", "GB", "5XB", "-1", "1e9", "٣GB", "0.5B", 0, -1, 16**5000],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(InvalidSizeError) as caught:
        parse_bytes(value)
    assert caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("count", "text"), [(4_980_000_000, "4.98 GB"), (12_300_000, "12.30 MB"), (1500, "1.50 kB"), (17, "17 B")]
)
def test_bytes_are_formatted_with_a_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 10**18))
def test_a_number_of_bytes_is_its_own_size(count: int) -> None:
    assert parse_bytes(count) == parse_bytes(str(count)) == parse_bytes(f"{count}B") == count


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, [["x" * 90] * 90] * 90, 16**5000, {"a": {"b": {"c": {}}}}, b"x" * 999],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_shortened(value: object) -> None:
    assert len(shorten(value)) <= 120


def test_short_values_are_shown_as_they_are() -> None:
    assert [shorten(value) for value in ("bf16", [1, 2], 2**64, None)] == ["'bf16'", "[1, 2]", str(2**64), "None"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.5, "9.5 s"), (42, "42 s"), (720, "12 min"), (6480, "1.8 h")]
)
def test_durations_are_rounded_to_what_matters(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("start", range(40, 80))
def test_no_part_of_a_password_is_left_where_an_address_is_cut(start: int) -> None:
    text = "x" * start + " http://user:sekret@host/?key=sekret " + "y" * 60
    shown = shorten(text) + shorten([text])
    assert "sek" not in shown
    assert "ret" not in shown
