"""The kernel's command line, through the public API."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kho import errors
from kho._kho import ScratchSpec, kho_is_enabled, kho_scratch_of, parse_kho_scratch

MIB = 1 << 20


@pytest.mark.parametrize(
    ("cmdline", "expected"),
    [
        ("", None),
        ("quiet kho", None),
        ("kho=", None),
        ("kho=maybe", None),
        ("console=ttyS0 kho=on liveupdate=on nokaslr panic=-1 cap_hostonly", True),
        ("console=ttyS0 kho=on liveupdate=on nokaslr panic=-1 kho=off cap_hostonly", False),
        ("kho=1 kho=what", True),
        ('"kho=y"', True),
        ('kho="0"', False),
        ('x="kho=on"', None),
        ("kho=off -- kho=on", False),
        ("kho=off\0kho=on", False),
        ("日本=x kho=T", True),
    ],
)
def test_kho_is_enabled(cmdline: str, expected: bool | None) -> None:
    for default in (False, True):
        assert kho_is_enabled(cmdline, default) is (default if expected is None else expected)
    assert kho_is_enabled(cmdline) is bool(expected)


def test_a_percentage() -> None:
    spec = parse_kho_scratch("200%")
    assert (spec.percent, spec.low, spec.global_, spec.pernode) == (200, None, None, None)
    assert repr(spec) == "ScratchSpec(percent=200)"
    assert spec == parse_kho_scratch("0200%")
    assert spec != parse_kho_scratch("201%")
    assert len({spec, parse_kho_scratch("+200%")}) == 1


def test_three_sizes() -> None:
    spec = parse_kho_scratch("16M,0x2000000,16384K")
    assert (spec.percent, spec.low, spec.global_, spec.pernode) == (None, 16 * MIB, 32 * MIB, 16 * MIB)
    assert repr(spec) == "ScratchSpec(low=0x1000000, global_=0x2000000, pernode=0x1000000)"
    # The scratch areas of the captures, which were booted with these sizes.
    assert spec.sizes(0, 0, [0]) == [16 * MIB, 32 * MIB, 16 * MIB]
    assert spec.sizes(0, 0, [0], align=512 * MIB) == [512 * MIB] * 3


def test_sizes_of_a_percentage() -> None:
    spec = parse_kho_scratch("50%")
    assert spec.sizes(9 * MIB, 40 * MIB, (30 * MIB, 10 * MIB)) == [6 * MIB, 14 * MIB, 16 * MIB, 6 * MIB]
    with pytest.raises(errors.ParameterError, match="0x3 is not a power of two"):
        spec.sizes(0, 0, [], 3)
    with pytest.raises(errors.OutOfRangeError):
        parse_kho_scratch("4294967295%").sizes(2**63, 0, [])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "empty"),
        ("64M,64M", "needs three sizes LOW,GLOBAL,PERNODE; only 2 given"),
        ("lots", '"lots" is not a size'),
        ("%", "is not a number before %"),
        ("99999999999%", "at most 10 digits"),
        ("4294967296%", "exceeds 4294967295 %"),
        ("0,0,0", "are 0 bytes"),
        ("1M,1M,1MB", '"B" follows the third size'),
        ("1M/1M/1M", "where a comma was expected"),
    ],
)
def test_a_malformed_kho_scratch_is_explained(value: str, why: str) -> None:
    with pytest.raises(errors.ParameterError, match="^kho_scratch: ") as caught:
        parse_kho_scratch(value)
    assert why in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_older_kernels_ignore_trailing_text() -> None:
    assert parse_kho_scratch("1M,2M,3MB", trailing_garbage=True) == parse_kho_scratch("1M,2M,3M")


def test_the_last_kho_scratch_of_a_command_line_counts() -> None:
    assert kho_scratch_of("quiet") is None
    assert kho_scratch_of('kho_scratch=1% kho-scratch="64M,3G,64M" --') == "64M,3G,64M"


@given(st.text(), st.text('khoscratc_-=" \t0123456789KMGTPE,%onf', max_size=60))
def test_any_text_is_parsed_or_refused(text: str, near: str) -> None:
    for line in (text, near, f"{text} kho={near}", f"kho_scratch={near}"):
        kho_is_enabled(line)
        value = kho_scratch_of(line)
        assert value is None or value in line
        for trailing in (False, True):
            try:
                spec = parse_kho_scratch(line, trailing_garbage=trailing)
            except errors.ParameterError:
                continue
            assert (spec.percent is None) == (spec.low is not None)


@given(st.lists(st.integers(0, 2**40), min_size=3, max_size=3).filter(any), st.sampled_from(["", "k", "M"]))
def test_sizes_are_read_back(sizes: list[int], suffix: str) -> None:
    unit = {"": 1, "k": 1 << 10, "M": 1 << 20}[suffix]
    spec = parse_kho_scratch(",".join(f"{size}{suffix}" for size in sizes))
    assert isinstance(spec, ScratchSpec)
    assert [spec.low, spec.global_, spec.pernode] == [size * unit for size in sizes]
