import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.units import (
    format_bandwidth,
    format_bytes,
    format_flop_rate,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flop_rate,
    parse_seconds,
)

KINDS = [(parse_bytes, "B"), (parse_bandwidth, "B/s"), (parse_seconds, "s"), (parse_flop_rate, "FLOP/s")]
FORMATS = [
    (parse_bytes, format_bytes),
    (parse_bandwidth, format_bandwidth),
    (parse_seconds, format_seconds),
    (parse_flop_rate, format_flop_rate),
]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "141 GB", 141e9),
        (parse_bytes, "64 MiB", 64 * 2**20),
        (parse_bytes, " 1.5kB ", 1500.0),
        (parse_bandwidth, "400 Gbps", 50e9),
        (parse_bandwidth, "400 Gb/s", 50e9),
        (parse_bandwidth, "400 Gbit/s", 50e9),
        (parse_bandwidth, "450 GB/s", 450e9),
        (parse_bandwidth, "1e2 GiB/s", 100 * 2**30),
        (parse_seconds, "3.3 us", 3.3e-6),
        (parse_seconds, "3.3 µs", 3.3e-6),
        (parse_seconds, ".5 ms", 0.5e-3),
        (parse_flop_rate, "148 TFLOP/s", 148e12),
        (parse_flop_rate, "1.9 PFLOPS", 1.9e15),
    ],
)
def test_texts_with_units_become_si_numbers(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("parse", [parse_bytes, parse_bandwidth, parse_seconds])
@pytest.mark.parametrize(
    "value", ["400", "GB", "", "1.2.3 GB", "400 gbps", "4 furlongs", 400, 4.0, None, True, "-1 GB", "-1 GB/s", "-1 s"]
)
def test_a_missing_or_wrong_unit_is_refused_with_an_example(parse, value):
    with pytest.raises(ValueError, match="write"):
        parse(value)


@pytest.mark.parametrize(("parse", "unit"), KINDS)
def test_an_amount_beyond_floats_is_refused(parse, unit):
    with pytest.raises(ValueError, match="not finite"):
        parse(f"1e999 {unit}")


@pytest.mark.parametrize(("parse", "unit"), KINDS)
@given(value=st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_the_plain_unit_round_trips_to_the_bit(parse, unit, value):
    assert parse(f"{value!r} {unit}") == value


@pytest.mark.parametrize(("parse", "write"), FORMATS)
@given(value=st.floats(min_value=1e-9, max_value=1e17), digits=st.integers(min_value=2, max_value=12))
def test_what_is_formatted_parses_back_within_its_digits(parse, write, value, digits):
    assert parse(write(value, digits=digits)) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


@pytest.mark.parametrize(("parse", "write"), FORMATS)
@given(value=st.floats(min_value=1e-9, max_value=9e17))
def test_formatting_is_stable(parse, write, value):
    once = write(value)
    assert write(parse(once)) == once


@given(value=st.floats(min_value=1, max_value=9e17))
def test_a_readable_number_has_at_most_three_digits_before_the_point(value):
    assert 1 <= float(format_bytes(value).split()[0]) < 1000


def test_bits_are_an_eighth_of_bytes():
    assert math.isclose(8 * parse_bandwidth("1 Tbps"), parse_bandwidth("1 TB/s"))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (format_bytes(1.5e9), "1.5 GB"),
        (format_bytes(999_999), "1 MB"),
        (format_bytes(0), "0 B"),
        (format_bandwidth(450e9), "450 GB/s"),
        (format_seconds(0.0123), "12.3 ms"),
        (format_seconds(3.3e-6), "3.3 us"),
        (format_seconds(2e-9), "2 ns"),
        (format_seconds(0), "0 s"),
        (format_seconds(75), "75 s"),
    ],
)
def test_formats(written, text):
    assert written == text
